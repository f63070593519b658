"""What a ruler reaches: cells ranked by their size alone, no network, on the subjects that networks are measured on.

    BLASTOSCOPE_DATA=... python -m benchmarks.size_alone

ALL blasts are larger than healthy precursors in C-NMC. A network that does no better has learnt to see size. There is
nothing to train: every subject is unseen. Folds are those of the bundled recipes (5, by subject group, seed 7).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import benchmarks

SEED = 7


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    root = benchmarks.data_root()
    benchmarks.print_machine("numpy", "pillow")
    measure(root)


def measure(root: Path) -> None:
    from training.data import index_cells
    from training.metrics import auroc, bootstrap_metrics
    from training.splits import split_by_subject

    cells = index_cells(root)
    area = np.array([size_of(file) for file in cells.files])
    ranks = np.argsort(np.argsort(area)) / len(area)  # AUROC is a matter of rank
    fold_of = split_by_subject(cells, folds=5, seed=SEED)
    rows = [["all", *_counts(cells, np.ones(len(cells), bool)), _interval(auroc, bootstrap_metrics, cells, ranks)]]
    for fold in range(5):
        of = fold_of == fold
        rows.append([f"fold {fold}", *_counts(cells, of), f"{auroc(cells.y_true[of], ranks[of]):.3f}"])
    benchmarks.print_table(["subjects", "ALL cells", "HEM cells", "AUROC of the cell's area (95% by subject)"], rows)


def size_of(file: Path) -> float:
    """Pixels of a segmented cell: those that are not black."""
    return float((np.asarray(Image.open(file).convert("RGB")).max(-1) > 0).sum())


def _counts(cells, of: np.ndarray) -> list[str]:
    return [f"{(cells.y_true[of] == value).sum():,}" for value in (1, 0)]


def _interval(auroc, bootstrap_metrics, cells, ranks) -> str:
    _, low, high = bootstrap_metrics(cells.y_true, ranks, cells.subjects, cells.groups, 0.5)["auroc"]
    return f"{auroc(cells.y_true, ranks):.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
