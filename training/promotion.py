"""Make a run's network the one that reads cells, by a person's choice alone, and take that back."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from datetime import datetime

from filelock import FileLock

import model_zoo
from model_zoo import Card, load_checkpoint, promoted_folder
from model_zoo._checkpoint import weights_files
from model_zoo._files import write_json
from training.compare import shared_cells
from training.errors import RunError
from training.jobs import read_run
from training.metrics import cell_metrics, paired_difference

BESIDE = ("recipe.toml", "history.csv", "predictions.csv")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two networks on the held-out cells that both were measured on.

    Attributes:
        cells, subjects: how many they share; neither network saw these subjects.
        figures: name -> (of the default, of the new one, [difference, low, high]), 95% by paired subject bootstrap;
            {} where they share too few.
    """

    cells: int
    subjects: int
    figures: dict[str, tuple[float, float, list[float]]]


def check_promotable(run: str) -> Card:
    """The card of a finished run whose network may become the default.

    Raises:
        RunError: not finished, tiny, no network to serve, or no figures on held-out subjects. CheckpointError: damaged files.
    """
    found = read_run(run)
    if found.state != "finished":
        raise RunError(f"Run {run} is {found.state}. Only a finished run can be promoted.")
    if found.told.get("tiny"):
        raise RunError(f"Run {run} was a tiny run: it shows that all works, and its figures mean nothing. Promote a whole one.")
    card = found.card
    check_split(card)
    if not card.weights_sha256:
        raise RunError(
            f"Run {run} measured the recipe on {card.training.get('networks', 'several')} networks and kept none to serve. "
            "To promote one, hold out a single fold, or have one more network trained on all subjects."
        )
    load_checkpoint(found.folder)  # verifies the weights
    return card


def check_split(card: Card) -> None:
    """Make sure that a card's figures are of held-out subjects of both classes.

    Raises:
        RunError: they are not.
    """
    if card.split["protocol"].startswith("image"):
        raise RunError(
            f"{card.name} was split by image: cells of a patient lie on both sides, so nothing is known about unseen "
            "patients. Train it by subject to compare or promote it."
        )
    if {y_true for _, y_true, *_ in card.subjects} != {0, 1}:
        raise RunError(f"{card.name} was not measured on held-out subjects of both classes, so it cannot be promoted.")


def compare_with_default(run: str) -> Comparison:
    """A run's network against the current default, on the held-out cells that both have predictions for.

    Raises:
        RunError: a folder without predictions.
    """
    default = model_zoo.find_checkpoint(model_zoo.default_checkpoint())
    shared, subjects = shared_cells(default.path, read_run(run).folder)
    y_true = shared["y_true"]
    if len(set(y_true)) < 2:
        return Comparison(cells=len(y_true), subjects=subjects, figures={})
    old, new = (cell_metrics(y_true, shared[p], t) for p, t in zip(("p_a", "p_b"), shared["thresholds"], strict=True))
    differences = paired_difference(**shared)
    figures = {name: (old[name], new[name], gap) for name, gap in differences.items()}
    return Comparison(cells=len(y_true), subjects=subjects, figures=figures)


def promote(run: str) -> str:
    """Copy a run's checkpoint beside the bundled ones and make it the default.

    The copy appears whole or not at all, and outlives the run folder.

    Returns:
        The checkpoint's name in the menus.
    Raises:
        RunError, CheckpointError: as `check_promotable`, or the disk is full.
    """
    card, source, shelf = check_promotable(run), read_run(run).folder, promoted_folder()
    name = f"{run}-{card.weights_sha256[:8]}"
    partial = shelf / f".{name}.partial"
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        with FileLock(shelf / "lock"):
            history = _history()
            if name in [entry["name"] for entry in history]:
                raise RunError(f"Run {run} was promoted already, as {name}.")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for file in (*weights_files(source / "model.onnx"), *(source / other for other in BESIDE)):
                shutil.copy(file, partial)
            replace(card, name=name, title=f"{card.title} (run {run})").write(partial / "card.json")
            shutil.rmtree(shelf / name, ignore_errors=True)  # taken back before
            partial.rename(shelf / name)
            when = datetime.now().astimezone().isoformat(timespec="minutes")
            write_json(shelf / "history.json", [*history, {"name": name, "run": run, "promoted": when}])
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{shelf} cannot take the network: {error.strerror}. Free space, then promote again.") from error
    return name


def undo_promotion() -> str:
    """Take the last promotion back; the default before it is the default again.

    Returns:
        Name of the checkpoint that is the default now.
    Raises:
        RunError: nothing was promoted.
    """
    shelf = promoted_folder()
    shelf.mkdir(parents=True, exist_ok=True)
    with FileLock(shelf / "lock"):
        history = _history()
        if not history:
            raise RunError("Nothing was promoted, so there is nothing to take back.")
        write_json(shelf / "history.json", history[:-1])  # first: from here on it is in no menu
        shutil.rmtree(shelf / history[-1]["name"], ignore_errors=True)
    return model_zoo.default_checkpoint()


def last_promotion() -> dict | None:
    """{name, run, promoted}: of the current default, or None while that is a bundled one."""
    names = model_zoo.promoted_names()
    return next((entry for entry in reversed(_history()) if entry["name"] == names[-1]), None) if names else None


def _history() -> list[dict]:
    file = promoted_folder() / "history.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else []
