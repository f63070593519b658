"""AUROC on each held-out fold, every bundled network that was measured on all of them, side by side.

    python -m benchmarks.folds [CHECKPOINT ...]

One fold's figure is of few subjects and says little; a network that leads on every fold leads. Networks that were shown
pictures of held-out subjects in lessons without labels are marked on those folds: if that flattered them, they would lose
their place on the folds that are not marked. Reads predictions.csv of each folder; needs no data.
"""

from __future__ import annotations

import argparse

import numpy as np

import benchmarks
import model_zoo
from training.compare import read_predictions
from training.metrics import auroc


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="names or folders; default every bundled one measured on several folds")
    names = parser.parse_args(arguments).checkpoints
    cards = [card for card in model_zoo.list_checkpoints() if len(card.split.get("test_folds", ())) > 1]
    benchmarks.print_machine("numpy")
    rows, folds = [], []
    for checkpoint in map(benchmarks.checkpoint, names or [card.name for card in cards]):
        table = read_predictions(checkpoint.path)
        folds = folds or sorted(set(table["fold"]))
        seen = checkpoint.card.split.get("seen_unlabelled", ())
        figures = [f"{_auroc(table, table['fold'] == fold):.3f}{' *' if fold in seen else ''}" for fold in folds]
        rows.append([checkpoint.card.title, *figures, f"{_auroc(table, slice(None)):.3f}"])
    benchmarks.print_table(["network", *folds, "all cells"], rows)
    print("* shown pictures of these subjects, without labels")


def _auroc(table: dict[str, np.ndarray], where) -> float:
    return auroc(table["y_true"][where], table["p_all"][where])


if __name__ == "__main__":
    main()
