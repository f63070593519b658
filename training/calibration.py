"""From held-out logits to a card's figures: temperature and operating point of each part, and what predictions.csv holds."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from training.compare import PREDICTIONS
from training.data import Cells, name_cells
from training.metrics import fit_temperature, sigmoid, youden_threshold
from training.splits import Part

ESTIMATED = "largest sensitivity + specificity, smoothed, on cells not measured; a subject weighs as the root of its cells"
BALANCED = "where ALL and HEM are as likely; both classes weigh alike in the regression, so nothing was estimated"
UNCHOSEN = (1.0, 0.5)  # temperature and operating point
GIVEN = "P(ALL) .5: there were no cells but those measured to choose it on"


def calibrate_parts(
    cells: Cells, parts: list[Part], results: list[dict], reported: str, *, balanced: bool
) -> list[tuple[float, float]]:
    """Temperature and threshold for each part, from cells that are not its `reported` ones: its validation cells, or,
    where it has none, the other parts' held-out ones, else UNCHOSEN; `balanced` as in `calibrate`."""
    found = []
    for i, (part, result) in enumerate(zip(parts, results, strict=True)):
        others = [j for j in range(len(parts)) if j != i]
        if len(part.validation) and reported != "validation":
            found.append(calibrate(cells, part.validation, result["validation"], balanced=balanced))
        elif others:
            rows = np.concatenate([parts[j].test for j in others])
            found.append(calibrate(cells, rows, np.concatenate([results[j]["test"] for j in others]), balanced=balanced))
        else:
            found.append(UNCHOSEN)
    return found


def calibrate(cells: Cells, rows, logit, *, balanced: bool) -> tuple[float, float]:
    """Temperature and threshold, rounded as the card gives them: figures are measured with what is served.

    Args:
        balanced: the network is a regression in which the classes weigh alike. Its operating point is logit 0: an estimate
            from some 40 persons only adds noise to it (docs/decisions/0012).
    """
    y_true = cells.y_true[rows]
    temperature = round(fit_temperature(y_true, logit), 4)
    if balanced:
        return temperature, 0.5
    operating_point = sigmoid(youden_threshold(y_true, logit, cells.subjects[rows]) / temperature)
    return temperature, round(float(np.clip(operating_point, 0.01, 0.99)), 4)


def pool_parts(parts: list[Part], results: list[dict], calibrations, reported: str) -> list[np.ndarray]:
    """The `reported` cells of all parts, each with its part's calibration: rows, logit, p_all, threshold, fold; (n,) each."""
    columns = []
    for part, result, (temperature, operating_point) in zip(parts, results, calibrations, strict=True):
        rows, logit = getattr(part, reported), result[reported]
        alike = np.full(len(rows), operating_point), np.full(len(rows), part.name)
        columns.append((rows, logit, sigmoid(logit / temperature), *alike))
    return [np.concatenate(column) for column in zip(*columns, strict=True)]


def operating_points(metrics: dict, threshold: float, chosen: str) -> dict:
    """A card's operating points: one, the default."""
    figures = {name: metrics[name] for name in ("sensitivity", "specificity")}
    return {"default": {"threshold": threshold, "chosen": chosen} | figures}


def subject_rows(y_true, subjects, called) -> list[list]:
    """A card's `subjects`: [subject, y_true, cells, cells called ALL] of each; twice one that has cells of both classes."""
    return [
        [subject, value, int(of.sum()), int(called[of].sum())]
        for subject in sorted(set(subjects))
        for value in (0, 1)
        if (of := (subjects == subject) & (y_true == value)).any()
    ]


def write_predictions(path: Path, cells: Cells, rows, logit, p_all, threshold, fold) -> None:
    """P(ALL) in full: nine digits do not tell the cells of a saturated network apart. `cells` have their hashes."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(PREDICTIONS)
        names = name_cells(cells.files, cells.subjects)
        for row, z, p, t, k in zip(rows, logit, p_all, threshold, fold, strict=True):
            whose = names[row], cells.subjects[row], cells.groups[row], cells.hashes[row]
            writer.writerow([*whose, int(cells.y_true[row]), f"{z:.9g}", float(p), t, k])
