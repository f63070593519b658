"""Make a run's network the one that reads cells, by a person's choice alone, and take that back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
from filelock import FileLock

import model_zoo
from inference.cells import score_files
from inference.engine import Engine
from inference.sources import open_paths
from model_zoo import Card, load_checkpoint, promoted_folder
from model_zoo._checkpoint import TRAINED_ON, weights_files
from model_zoo._files import whole_file, write_json
from training.calibration import write_predictions
from training.compare import name_once, read_predictions, recognised, shared_cells, subjects_met
from training.data import cache_folder, index_cells, name_cells, verify_cells
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
        as_served: the cells are the run's, which the default read as it reads any.
    """

    cells: int
    subjects: int
    figures: dict[str, tuple[float, float, list[float]]]
    as_served: bool = False


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
    """A run's network against the current default, on the held-out cells that both have predictions for; where there are none,
    on those that `read_with_default` had it read.

    Raises:
        RunError: a folder without predictions.
    """
    default, folder = model_zoo.find_checkpoint(model_zoo.default_checkpoint()), read_run(run).folder
    shared, subjects = shared_cells(default.path, folder)
    read = _read_by(default.card, folder)
    as_served = len(set(shared["y_true"])) < 2 and (read / "predictions.csv").exists()
    if as_served:
        shared, subjects = shared_cells(read, folder)
    y_true = shared["y_true"]
    if len(set(y_true)) < 2:
        return Comparison(cells=len(y_true), subjects=subjects, figures={})
    old, new = (cell_metrics(y_true, shared[p], t) for p, t in zip(("p_a", "p_b"), shared["thresholds"], strict=True))
    differences = paired_difference(**shared)
    figures = {name: (old[name], new[name], gap) for name, gap in differences.items()}
    return Comparison(cells=len(y_true), subjects=subjects, figures=figures, as_served=as_served)


def read_with_default(run: str, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Have the default network read a run's held-out cells of subjects that are new to it, as it reads any cell. Whose pictures
    trained it is not new, whatever the id.

    Args:
        progress: called with the cells read and all that are to be read.
    Raises:
        RunError: no cells of both classes are there, new to the default, and readable. DataError, CheckpointError: as they say.
    """
    found, default = read_run(run), model_zoo.find_checkpoint(model_zoo.default_checkpoint())
    # as the run did: what is left out, and so what each is called, and which subjects share pictures are the same
    cells, _ = verify_cells(index_cells(Path(found.told["data"])), cache=cache_folder())
    held = set(read_predictions(found.folder)["cell"])
    names = map(name_once, name_cells(cells.files, cells.subjects), cells.subjects)
    there = np.array([name in held for name in names])
    met = subjects_met(cells, set(default.card.data["training_subjects"])) | recognised(cells, default.trained_on)
    rows = np.flatnonzero(there & ~met)
    if len(set(cells.y_true[rows])) < 2:
        raise RunError(
            f"Of {len(held):,} held-out cells {there.sum():,} are in {found.told['data']}, {(there & met).sum():,} of these of "
            f"subjects with the id, or a picture, of one that trained {default.card.title}; the rest is not of both classes. "
            f"Are they other people? Measure it by: python -m training evaluate {default.path} --data FOLDER --other-people"
        )
    p_all = np.full(len(rows), np.nan)
    for done, result in enumerate(score_files(open_paths(cells.files[row] for row in rows), Engine(default))):
        p_all[done] = np.nan if result.p_all is None else result.p_all
        progress(done + 1, len(rows))
    rows, p_all = rows[~np.isnan(p_all)], np.clip(p_all[~np.isnan(p_all)], 1e-9, 1 - 1e-9)
    if len(set(cells.y_true[rows])) < 2:
        raise RunError(f"{default.card.title} could not read held-out cells of both classes.")
    folder = _read_by(default.card, found.folder)
    folder.mkdir(parents=True, exist_ok=True)
    alike = np.full(len(rows), default.card.threshold), np.full(len(rows), "as served")
    with whole_file(folder / "predictions.csv") as unfinished:
        write_predictions(unfinished, cells, rows, np.log(p_all / (1 - p_all)), p_all, *alike)


def _read_by(card: Card, run: Path) -> Path:
    """Where a run keeps what another network read of its held-out cells."""
    return run / "as_served" / f"{card.name}-{card.weights_sha256[:8]}"


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
            if (source / TRAINED_ON).exists():  # runs up to 0.18.0 have none
                shutil.copy(source / TRAINED_ON, partial)
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
