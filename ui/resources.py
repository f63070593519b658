"""Loaded once, shared by every session, read-only."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import numpy as np
import streamlit as st

import model_zoo
from inference.engine import Engine
from inference.layers import LayerTaps
from model_zoo import Card, FrameSpec
from training import jobs, promotion
from training.compare import read_predictions
from training.data import Cells, index_cells
from training.estimate import draw_samples
from training.results import System, list_systems

_loading = threading.Lock()


@st.cache_data(ttl=5, show_spinner=False)
def cards() -> list[Card]:
    """Every checkpoint's card, the default first."""
    default = model_zoo.default_checkpoint()
    return sorted(model_zoo.list_checkpoints(), key=lambda card: card.name != default)


def card(name: str) -> Card:
    return next(c for c in cards() if c.name == name)


def engine(name: str, rotations: int | None = None) -> Engine:
    """A checkpoint's engine; over as many rotations as its card was measured with, unless told otherwise."""
    loaded = _engine(name, card(name).weights_sha256)
    return loaded if rotations is None else loaded.over(rotations)


@st.cache_resource(max_entries=4, show_spinner=False)
def _engine(name: str, weights_sha256: str) -> Engine:
    return Engine(model_zoo.find_checkpoint(name))


def layer_taps(name: str) -> LayerTaps:
    return _layer_taps(name, card(name).weights_sha256)


@st.cache_resource(max_entries=2, show_spinner=False)
def _layer_taps(name: str, weights_sha256: str) -> LayerTaps:
    return LayerTaps(model_zoo.find_checkpoint(name))


def explainer(name: str):
    """The Grad-CAM of a checkpoint. The first call of a process loads TensorFlow (seconds)."""
    with _loading:
        return _explainer(name, card(name).weights_sha256)


# not st.cache_resource: `warm_explainer` calls it outside any session
@functools.lru_cache(maxsize=2)
def _explainer(name: str, weights_sha256: str):
    from inference.explain import Explainer

    return Explainer(model_zoo.find_checkpoint(name))


def warm_explainer(name: str) -> None:
    """Load the Grad-CAM in the background, while the user looks at the first results."""
    sha = card(name).weights_sha256

    def load():
        with _loading:
            _explainer(name, sha)

    threading.Thread(target=load, daemon=True, name=f"warm {name}").start()


@st.cache_data(ttl=5, show_spinner=False)
def systems() -> list[System]:
    """Every network with its recipe, measured or still to be run."""
    return list_systems()


def held_out(folder: Path) -> dict[str, np.ndarray]:
    """predictions.csv of a checkpoint folder, by column; see `training.compare.read_predictions`."""
    file = folder / "predictions.csv"
    return _held_out(folder, file.stat().st_mtime_ns if file.exists() else 0)


@st.cache_data(show_spinner=False, max_entries=16)
def _held_out(folder: Path, written: int) -> dict[str, np.ndarray]:
    return read_predictions(folder)


@st.cache_data(show_spinner="Drawing the demo patients…", max_entries=1)
def demo() -> dict[str, list[tuple[str, bytes]]]:
    """Synthetic patients, generated on first use."""
    from inference.synthetic import demo_patients

    return demo_patients()


@st.cache_resource(ttl=60, max_entries=8, show_spinner="Counting cells")
def cells(folder: str) -> Cells:
    """The labelled cells of a folder, by names alone."""
    return index_cells(Path(folder))


@st.cache_data(ttl=600, max_entries=8, show_spinner=False)
def sample_sheet(folder: str) -> tuple[bytes, list[str]]:
    """PNG of some cells of a folder, and their names."""
    return draw_samples(cells(folder), FrameSpec(crop=300, size=96))


@st.cache_data(ttl=60, show_spinner=False)
def device() -> str:
    """What a run would be computed on."""
    return jobs.describe_device()


@st.cache_data(ttl=4, show_spinner=False)
def gpu_use() -> str:
    """How busy and how full the GPUs are; "" where there is none."""
    return "; ".join(
        f"GPU {gpu['index']}: {gpu['busy_percent'] or 0:.0f} % busy, {(gpu['used_mb'] or 0) / 1024:.0f} of "
        f"{(gpu['memory_mb'] or 0) / 1024:.0f} GB in use"
        for gpu in jobs.gpus()
    )


@st.cache_data(max_entries=32, show_spinner=False)
def comparison(run: str, weights_sha256: str, default: str) -> promotion.Comparison:
    """A run's network against the default on the held-out cells they share; the hash and the name are part of the key."""
    return promotion.compare_with_default(run)
