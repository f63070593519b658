"""Join checkpoints to an ensemble that averages their logits: a card and held-out predictions, no weights of its own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from model_zoo import Card, FrameSpec, load_checkpoint
from model_zoo._checkpoint import hash_members
from training.calibration import (
    BALANCED,
    ESTIMATED,
    calibrate,
    calibrate_parts,
    operating_points,
    pool_parts,
    subject_rows,
    write_predictions,
)
from training.compare import read_predictions
from training.data import Cells
from training.errors import RunError
from training.metrics import bootstrap_metrics
from training.splits import Part


def join(folders: list[Path], out: Path, *, title: str) -> Card:
    """Write an ensemble of checkpoints; its figures are of the mean of their held-out logits, fold by fold.

    Operating point and temperature of each fold are found as in a run.

    Args:
        folders: checkpoints measured out of fold on the same cells and folds, by subject, in windows of one size and over as
            many rotations.
        out: folder to make, beside them.
    Raises:
        RunError: they do not fit together. CheckpointError: damaged files.
    """
    out = Path(out)
    checkpoints = [load_checkpoint(Path(folder)) for folder in folders]
    cards = [checkpoint.card for checkpoint in checkpoints]
    tables = [read_predictions(checkpoint.path) for checkpoint in checkpoints]
    if len({checkpoint.path.resolve() for checkpoint in checkpoints}) < max(2, len(cards)):
        raise RunError(f"An ensemble needs two checkpoints or more, each once. Received: {', '.join(map(str, folders))}")
    if (out / "card.json").exists():
        raise RunError(f"{out} already holds a checkpoint. Give another --out.")
    for card, checkpoint, table in zip(cards, checkpoints, tables, strict=True):
        if checkpoint.path.resolve().parent != out.resolve().parent:
            raise RunError(f"{checkpoint.path} must lie beside {out}: an ensemble names its members, it does not copy them.")
        if card.members or card.framing.crop != cards[0].framing.crop:
            raise RunError(f"{card.name} is an ensemble itself, or cuts another window than {cards[0].name}.")
        if card.rotations != cards[0].rotations:
            raise RunError(
                f"{card.name} was measured over {card.rotations} rotations, {cards[0].name} over {cards[0].rotations}, and an "
                "ensemble reads each cell over one number of them. Train both by recipes with the same rotations."
            )
        measured_on = ("file", "subject", "fold")
        same = all(np.array_equal(table[column], tables[0][column]) for column in measured_on)
        if not same or card.split["protocol"] != "by subject" or len(set(table["fold"])) < 2:
            raise RunError(
                f"{card.name} and {cards[0].name} were not measured on the same cells in the same folds by subject, so nothing "
                "can be said of their mean. Train both by recipes with one seed, one folds_by and no test_folds."
            )
    logit = np.mean([table["logit"] for table in tables], axis=0)
    columns = ("y_true", "subject", "group", "fold", "cell_hash")
    y_true, subjects, groups, fold, hashes = (tables[0][column] for column in columns)
    files = [Path(file) for file in tables[0]["file"]]
    cells = Cells(files=files, y_true=y_true, subjects=subjects, groups=groups, hashes=hashes)
    rows, none = np.arange(len(cells)), np.zeros(0, int)
    parts = [Part(name=str(k), training=none, validation=none, test=rows[fold == k]) for k in dict.fromkeys(fold)]
    results = [{"test": logit[part.test]} for part in parts]
    balanced = all(not card.training["epochs"] for card in cards)
    calibrations = calibrate_parts(cells, parts, results, "test", balanced=balanced)
    rows, logit, p_all, threshold, fold = pool_parts(parts, results, calibrations, "test")
    y_true, subjects = y_true[rows], subjects[rows]
    temperature, operating_point = calibrate(cells, rows, logit, balanced=balanced)
    metrics = bootstrap_metrics(y_true, p_all, subjects, groups[rows], threshold)
    names = [checkpoint.path.resolve().name for checkpoint in checkpoints]  # by which `load_checkpoint` finds them
    training = [card.training for card in cards]
    card = replace(
        cards[0],
        name=out.name,
        title=title,
        architecture="ensemble",
        framing=FrameSpec(crop=cards[0].framing.crop, size=cards[0].framing.crop),
        summary=f"The mean of the logits of {', '.join(card.title for card in cards[:-1])} and {cards[-1].title}.",
        data=cards[0].data | {"training_subjects": sorted({s for c in cards for s in c.data["training_subjects"]})},
        split=cards[0].split
        | {"seen_unlabelled": sorted({k for c in cards for k in c.split.get("seen_unlabelled", ())})}
        | {"sentence": " ".join(dict.fromkeys(s for card in cards for s in re.split(r"(?<=\.) ", card.split["sentence"])))},
        training=training[0]
        | {
            "cells_drawn": sum(told["cells_drawn"] for told in training),
            "networks": sum(told["networks"] for told in training),
            "hours": round(sum(told["hours"] for told in training), 4),
            "start": "; ".join(dict.fromkeys(told["start"] for told in training)),
            "teacher": "; ".join(dict.fromkeys(told["teacher"] for told in training if told["teacher"])),
            "validation_auroc": None,
        },
        metrics=metrics,
        operating_points=operating_points(metrics, operating_point, BALANCED if balanced else ESTIMATED),
        temperature=temperature,
        subjects=subject_rows(y_true, subjects, p_all >= threshold),
        weights_sha256=hash_members([card.weights_sha256 for card in cards]),
        members=names,
        paper="",
    )
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(out / "predictions.csv", cells, rows, logit, p_all, threshold, fold)
    card.write(out / "card.json")
    return card
