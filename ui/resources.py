"""Loaded once, shared by every session, read-only."""

from __future__ import annotations

import csv
import functools
import threading

import numpy as np
import streamlit as st

import model_zoo
from inference.engine import Engine
from inference.layers import LayerTaps
from model_zoo import Card

_loading = threading.Lock()


@st.cache_data(ttl=5, show_spinner=False)
def cards() -> list[Card]:
    """Every checkpoint's card, the default first."""
    default = model_zoo.default_checkpoint()
    return sorted(model_zoo.list_checkpoints(), key=lambda card: card.name != default)


def card(name: str) -> Card:
    return next(c for c in cards() if c.name == name)


def engine(name: str) -> Engine:
    return _engine(name, card(name).weights_sha256)


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


def predictions(name: str) -> dict[str, np.ndarray]:
    """Held-out cells of a checkpoint: `y_true` int (n,), `p_all` float (n,)."""
    return _predictions(name, card(name).weights_sha256)


@st.cache_data(show_spinner=False)
def _predictions(name: str, weights_sha256: str) -> dict[str, np.ndarray]:
    with (model_zoo.find_checkpoint(name).path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {"y_true": np.array([int(r["y_true"]) for r in rows]), "p_all": np.array([float(r["p_all"]) for r in rows])}


@st.cache_data(show_spinner=False, max_entries=1)
def demo() -> dict[str, list[tuple[str, bytes]]]:
    """Synthetic patients, generated on first use."""
    from inference.synthetic import demo_patients

    return demo_patients()
