"""Which cells and persons are called unlike those that a network knows, and what is lost and gained by it.

    BLASTOSCOPE_DATA=... python -m benchmarks.unlike [CHECKPOINT] [--persons 12]

First persons, by the medians of their cells: each of those at hand against the ranges of all others (nobody should lie outside:
one laboratory), and each half by stain, as `folds_by = "stain"` divides them, against the other (where networks are known to
fail: docs/decisions/0016). Then cells as another laboratory's might look: how many carry a note, how many of their persons
would lie outside, and what the network calls them; it was trained on these very cells as they are.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
from PIL import Image

import benchmarks


def _gamma(exponent: float):
    return lambda x: np.rint(255 * (x / 255) ** exponent).astype("uint8")


def _lamp(*channels: float):
    return lambda x: np.clip(np.rint(x * channels), 0, 255).astype("uint8")


def _half(x: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(x).resize([side // 2 for side in x.shape[1::-1]], Image.Resampling.BILINEAR))


CHANGES = {
    "as they are": _gamma(1),
    "paler (gamma 0.7)": _gamma(0.7),
    "paler (gamma 0.85)": _gamma(0.85),
    "darker (gamma 1.2)": _gamma(1.2),
    "darker (gamma 1.4)": _gamma(1.4),
    "warm lamp (red 1.2, blue 0.85)": _lamp(1.2, 1, 0.85),
    "cold lamp (red 0.85, blue 1.2)": _lamp(0.85, 1, 1.2),
    "red and blue exchanged": lambda x: np.ascontiguousarray(x[..., ::-1]),
    "grey": lambda x: np.rint(x.mean(axis=-1, keepdims=True)).astype("uint8").repeat(3, axis=-1),
    "half the size": _half,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", default="mobilenet_v2_pyramid", help="default %(default)s")
    parser.add_argument("--persons", type=int, default=12, help="20 cells of each are changed (default %(default)s)")
    options = parser.parse_args(arguments)
    root = benchmarks.data_root()
    benchmarks.print_machine("onnxruntime", "pillow", "numpy")
    persons(root)
    print()
    changed(benchmarks.checkpoint(options.network), root, options.persons)


def persons(root) -> None:
    from training.data import index_cells, usual_ranges, verify_cells
    from training.splits import split_by_stain

    with tempfile.TemporaryDirectory() as cache:
        cells, _ = verify_cells(index_cells(root), cache=cache)
    darker = split_by_stain(cells, folds=2) == 0
    rows = []
    for name, divisions in (
        ("each person, ranges of all others", [cells.subjects == s for s in sorted(set(cells.subjects))]),
        ("the lighter half, ranges of the darker", [~darker]),
        ("the darker half, ranges of the lighter", [darker]),
    ):
        n = outside = 0
        for tested in divisions:
            usual = usual_ranges(cells.choose(~tested))
            found = [_outside(cells.measures[cells.subjects == s], usual) for s in sorted(set(cells.subjects[tested]))]
            n, outside = n + len(found), outside + sum(found)
        rows.append([name, str(n), str(outside)])
    benchmarks.print_table(["persons", "n", "outside"], rows)


def changed(checkpoint, root, n: int) -> None:
    from inference.engine import Engine
    from inference.gate import inspect_cell, unlike
    from inference.images import decode_image, frame_cell
    from inference.patients import MIN_CELLS
    from training.data import index_cells

    engine, cells, usual = Engine(checkpoint), index_cells(root), checkpoint.card.data["usual"]
    rows_of = [np.flatnonzero(cells.subjects == s) for s in sorted(set(cells.subjects))]
    rows_of = [rows for rows in rows_of if len(rows) >= MIN_CELLS]
    chosen = [rows_of[i] for i in np.linspace(0, len(rows_of) - 1, n).astype(int)]
    cells = cells.choose(np.concatenate([rows[np.linspace(0, len(rows) - 1, MIN_CELLS).astype(int)] for rows in chosen]))
    pictures = [decode_image(file.read_bytes(), name=file.name)[0] for file in cells.files]
    rows, plain = [], None
    for name, change in CHANGES.items():
        seen = [change(picture) for picture in pictures]
        verdicts = [inspect_cell(picture) for picture in seen]
        measures = np.array([verdict.measures for verdict in verdicts])
        p_all, _ = engine.predict(np.stack([frame_cell(picture, checkpoint.card.framing) for picture in seen]))
        called = p_all >= checkpoint.card.threshold
        plain = called if plain is None else plain
        outside = [_outside(measures[cells.subjects == s], usual) for s in sorted(set(cells.subjects))]
        noted = [bool(verdict.reasons or unlike(verdict.measures, usual, "cell")) for verdict in verdicts]
        right = called == cells.y_true
        shares = noted, outside, right[cells.y_true == 1], right[cells.y_true == 0], called != plain
        rows.append([name, *(f"{np.mean(share):.1%}" for share in shares)])
    print(f"{len(cells)} cells of {n} persons, {checkpoint.card.title}\n")
    columns = ["cells", "with a note", "persons outside", "ALL called ALL", "HEM called HEM", "calls that change"]
    benchmarks.print_table(columns, rows)


def _outside(measures: np.ndarray, usual: dict) -> bool:
    from inference.gate import unlike

    return bool(unlike(np.median(measures, axis=0), usual, "person"))


if __name__ == "__main__":
    main()
