"""Figures beside each other: a checkpoint on other cells, and runs on the cells they share."""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from inference.cells import score_files
from inference.engine import Engine
from inference.patients import carries_weight
from inference.sources import open_paths
from model_zoo import Card, load_checkpoint
from training.data import Cells, cell_label, index_cells, join_copies, name_cells
from training.errors import DataError, RunError
from training.metrics import bootstrap_metrics, paired_difference

# columns of predictions.csv; subjects of one group share pictures, `cell_hash` is that of `inference.images`
PREDICTIONS = ("file", "subject", "group", "cell_hash", "y_true", "logit", "p_all", "threshold", "fold")
SHOWN = ("auroc", "sensitivity", "specificity", "accuracy", "weighted_f1", "subject_accuracy", "ece", "brier")


def read_predictions(folder: Path) -> dict[str, np.ndarray]:
    """predictions.csv of a run or checkpoint, by column; `y_true` int, `logit`, `p_all` and `threshold` float, the others
    str; and `cell`, which tells cells apart: one converted from BMP is the same cell.

    Raises:
        RunError: there is none, it is not one, or the run has not finished.
    """
    try:
        with (Path(folder) / "predictions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("no rows")
        rows = [{"group": row["subject"], "cell_hash": ""} | row for row in rows]  # up to 0.17.0 and 0.18.0 there were none
        columns = {name: np.array([row[name] for row in rows]) for name in PREDICTIONS}
        columns |= {name: columns[name].astype(float) for name in ("logit", "p_all", "threshold")}
        columns["y_true"] = columns["y_true"].astype(int)
        columns["cell"] = np.array([name_once(row["file"], row["subject"]) for row in rows])
    except (OSError, LookupError, ValueError, TypeError) as error:
        raise RunError(f"{folder} holds no held-out predictions. Let its run finish first.") from error
    return columns


def name_once(file: str, subject: str) -> str:
    """What tells a cell apart from any other: a file's name in whatever format, of one subject."""
    return f"{subject} {Path(file).with_suffix('')}"


def read_card(folder: Path) -> Card:
    """The card of a checkpoint or of a finished run.

    Raises:
        RunError: the run has not finished. CheckpointError: no readable card.
    """
    file = Path(folder) / "card.json"
    if not file.exists() and file.with_name("run.json").exists():
        raise RunError(f"The run in {folder} has not finished. Let it, or go on with it: python -m training {folder}")
    return Card.read(file)


def evaluate(
    checkpoint: Path, data: Path, *, rotations: int | None = None, out: Path | None = None, other_people: bool = False
) -> str:
    """A checkpoint's figures on the labelled cells of a folder, as served; subjects with ids of those that trained it stay out,
    and so do those, whatever their ids, of whom a picture trained it.

    Args:
        out: CSV to write: every cell's file, subject, y_true, p_all and whether it was called ALL.
        other_people: the subjects are none of those that trained it, whatever their ids: nobody is left out for them.
    Returns:
        a table as text.
    Raises:
        RunError: no folder for `out`. CheckpointError, DataError: no labelled cells, or none of a subject that is new to the
        network.
    """
    if out and not Path(out).parent.is_dir():
        raise RunError(f"{Path(out).parent} is no folder. Make it, or give another --out.")
    engine = Engine(load_checkpoint(checkpoint), rotations=rotations)
    card, cells = engine.card, index_cells(data)
    known = set(card.data.get("training_subjects", ()))
    if not (known or other_people):
        raise DataError(f"The card of {checkpoint} does not say which subjects trained it, so nothing can be called unseen.")
    met = subjects_met(cells, known)
    new = ~met | other_people
    if not new.any():
        raise DataError(
            f"Every subject of {data} has the id of one that trained {checkpoint}, so nothing shows that any is new to it. If "
            "they are other people, add --other-people. If not, its own predictions.csv holds what was held out."
        )
    kept = cells.choose(new)
    results = list(score_files(open_paths(kept.files), engine))
    read = np.flatnonzero([result.p_all is not None for result in results])
    if not len(read):
        raise DataError(
            f"None of the {len(results):,} cells could be read. First: {cell_label(kept.files[0])}: {results[0].note}"
        )
    notes = [(cell_label(file), result) for file, result in zip(kept.files, results, strict=True)]
    not_read = [f"not read: {name}: {result.note}" for name, result in notes if result.p_all is None]
    names, results = np.array(name_cells(kept.files, kept.subjects))[read], [results[i] for i in read]
    kept, copies = join_copies(replace(kept.choose(read), hashes=np.array([result.hash for result in results])))
    known = recognised(kept, engine.trained_on)
    if known.all():
        raise DataError(f"Pictures of every subject of {data} took part in training {checkpoint}, whatever they are called.")
    lines = [cells.passed_over] if cells.unlabelled else []
    if met.any():
        ids = sorted(set(cells.subjects[met]))
        which = f"{len(ids)} subjects with the id of one that trained it, or that shares pictures with such"
        left = f"left out: {met.sum():,} cells of {which}: {', '.join(ids)}. If they are other people, add --other-people."
        said = f"said to be other people than those that trained it, though they have their ids: {', '.join(ids)}"
        lines.append(said if other_people else left)
    if known.any():
        ids = ", ".join(sorted(set(kept.subjects[known])))
        lines.append(f"left out: {known.sum():,} cells of subjects whose pictures took part in its training: {ids}")
    lines += [*copies, *not_read]
    new = np.flatnonzero(~known)
    kept, names, results = kept.choose(new), names[new], [results[i] for i in new]
    y_true, subjects, p_all = kept.y_true, kept.subjects, np.array([result.p_all for result in results])
    if noted := [i for i, result in enumerate(results) if carries_weight(result.note)]:
        first = f"{cell_label(kept.files[noted[0]])}: {results[noted[0]].note}"
        lines.append(f"carry a note: {len(noted):,} of {len(kept):,} cells; first: {first}")
    lines.append(f"{card.title} on {kept.told()}, operating point {card.threshold}, {engine.rotations} rotation(s)")
    figures = bootstrap_metrics(y_true, p_all, subjects, kept.groups, card.threshold)
    if len(set(y_true)) < 2:
        lines.append("cells of one class alone: what tells two classes apart cannot be measured")
        figures = {name: figures[name] for name in ("accuracy", "subject_accuracy")}
    for name, (value, low, high) in figures.items():
        lines.append(f"  {name:20} {value:.3f} ({low:.3f} to {high:.3f})")
    called = p_all >= card.threshold
    right = {
        s: (int((called[subjects == s] == (y_true[subjects == s] == 1)).sum()), int((subjects == s).sum()))
        for s in sorted(set(subjects))
    }
    lines.append("cells called right, by subject: " + ", ".join(f"{s} {n} of {of}" for s, (n, of) in right.items()))
    if out:
        with Path(out).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "subject", "y_true", "p_all", "called_all"])
            for name, s, y, p, c in zip(names, subjects, y_true, p_all, called, strict=True):
                writer.writerow([name, s, int(y), f"{p:.9g}", int(c)])
    return "\n".join(lines)


def recognised(cells: Cells, trained_on: Collection[str]) -> np.ndarray:
    """bool (n,): a picture of the cell's group of subjects is among those that trained a network. `cells` have their hashes."""
    return np.isin(cells.groups, cells.groups[np.isin(cells.hashes, list(trained_on))])


def subjects_met(cells: Cells, known: set[str]) -> np.ndarray:
    """bool (n,): a network trained on the subjects `known` met the cell's subject, or one that shares pictures with it."""
    names = {group: known & ({group} | set(group.split("+"))) for group in set(cells.groups)}
    return np.array([bool(names[group]) for group in cells.groups])


def compare(folders: list[Path]) -> str:
    """Runs or checkpoints beside each other, and each one's difference from the first on the cells both held out."""
    cards = [read_card(folder) for folder in folders]
    lines = ["| network | split | " + " | ".join(SHOWN) + " |", "|---|---|" + "---|" * len(SHOWN)]
    for card in cards:
        figures = (card.metrics.get(name) for name in SHOWN)
        told = ("" if f is None else f"{f[0]:.3f} ({f[1]:.3f}–{f[2]:.3f})" for f in figures)
        lines.append(f"| {card.name} | {card.split['protocol']} | " + " | ".join(told) + " |")
    for folder, card in zip(folders[1:], cards[1:], strict=True):
        lines.append("")
        shared, _ = shared_cells(folders[0], folder)
        if len(set(shared["y_true"])) < 2:
            what = "held-out cells of one class alone" if len(shared["y_true"]) else "no held-out cells"
            lines.append(f"{card.name} and {cards[0].name} share {what}: their difference cannot be measured.")
            continue
        lines.append(f"{card.name} minus {cards[0].name} on {len(shared['y_true'])} shared held-out cells:")
        for name, (value, low, high) in paired_difference(**shared).items():
            lines.append(f"  {name:20} {value:+.3f} ({low:+.3f} to {high:+.3f})")
    return "\n".join(lines)


def shared_cells(a: Path, b: Path) -> tuple[dict[str, np.ndarray], int]:
    """The arguments of `paired_difference` for the cells that two runs both held out, and of how many subjects they are."""
    tables = [read_predictions(folder) for folder in (a, b)]
    cells, shared = pair_cells(*tables)
    return shared, len(set(tables[0]["subject"][np.isin(tables[0]["cell"], cells)]))


def pair_cells(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The cells that two tables of `read_predictions` both hold, and the arguments of `paired_difference` for them."""
    cells, i, j = np.intersect1d(a["cell"], b["cell"], return_indices=True)
    return cells, {
        "y_true": a["y_true"][i],
        # either may have seen more subjects share pictures than the other
        "groups": np.array([max(pair, key=len) for pair in zip(a["group"][i], b["group"][j], strict=True)]),
        "p_a": a["p_all"][i],
        "p_b": b["p_all"][j],
        "thresholds": (a["threshold"][i], b["threshold"][j]),
    }
