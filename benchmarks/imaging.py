"""What another stain, lamp or focus does to a network: real cells as they are, and the same cells changed at random.

    BLASTOSCOPE_DATA=... python -m benchmarks.imaging [CHECKPOINT ...] [--cells 1000]
    BLASTOSCOPE_DATA=... python -m benchmarks.imaging RUN ...

Each cell gets its own draw (`training.augment`). Of a checkpoint, every bundled one unless named: how many calls change at its
operating point; it may have been trained on these very cells, so no AUROC is given. Of a run over folds, whose folder
still holds each fold's network, AUROC on held-out cells as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import benchmarks
import model_zoo

# stain, gamma, and blur in pixels of the 300 px that are cut out
CHANGES = {
    "as they are": (0.0, 0.0, 0.0),
    "stain, weakly": (0.1, 0.15, 0.0),
    "stain, strongly": (0.2, 0.3, 0.0),
    "focus": (0.0, 0.0, 2.0),
    "stain, strongly, and focus": (0.2, 0.3, 2.0),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="checkpoints by name, folders, or run folders; default every bundled one")
    parser.add_argument("--cells", type=int, default=1000, help="spread evenly over those at hand (default 1000)")
    options = parser.parse_args(arguments)
    root = benchmarks.data_root()
    found = [benchmarks.checkpoint(name) for name in options.networks or [card.name for card in model_zoo.list_checkpoints()]]
    benchmarks.print_machine("onnxruntime", "keras", "numpy")
    rows = [row for checkpoint in found for row in measure(checkpoint, root, options.cells)]
    benchmarks.print_table(["network, what changes", "cells", "AUROC", "calls that change"], rows)


def measure(checkpoint: model_zoo.Checkpoint, root: Path, n: int) -> list[list[str]]:
    from inference.engine import Engine
    from inference.images import decode_image, frame_cell
    from training.data import index_cells
    from training.metrics import auroc

    cells, framing = index_cells(root), checkpoint.card.framing
    cells = cells.choose(np.unique(np.linspace(0, len(cells) - 1, n).astype(int)))
    framed = np.stack([frame_cell(decode_image(f.read_bytes(), name=f.name)[0], framing) for f in cells.files])
    held = [(Engine(network), of) for network, of in _held_out(checkpoint, [file.name for file in cells.files])]
    rows, plain = [], None
    for name, (stain, gamma, blur) in CHANGES.items():
        pictures = _changed(framed, stain, gamma, blur * framing.size / framing.crop)
        p_all = np.full(len(cells), np.nan)
        for engine, of in held:
            p_all[of] = engine.predict(pictures[of])[0]
        read = np.isfinite(p_all)
        called = p_all[read] >= checkpoint.card.threshold
        plain = called if plain is None else plain
        figure = f"{auroc(cells.y_true[read], p_all[read]):.3f}" if len(held) > 1 else "–"
        rows.append([f"{checkpoint.card.title}, {name}", f"{read.sum():,}", figure, f"{np.mean(called != plain):.1%}"])
    return rows


def _held_out(checkpoint: model_zoo.Checkpoint, files: list[str]) -> list[tuple[model_zoo.Checkpoint, np.ndarray]]:
    """Networks, and which of the files each is asked: a fold's about its held-out cells, else the served one about all."""
    from training.compare import read_predictions

    folders = sorted(checkpoint.path.glob("fold_*/"))
    if not folders:
        return [(checkpoint, np.ones(len(files), bool))]
    table = read_predictions(checkpoint.path)
    fold_of = dict(zip(table["file"], table["fold"], strict=True))
    fold = np.array([fold_of.get(file, "") for file in files])
    return [(model_zoo.Checkpoint(path=folder, card=checkpoint.card), fold == folder.name) for folder in folders]


def _changed(framed: np.ndarray, stain: float, gamma: float, blur: float) -> np.ndarray:
    import keras

    from training.augment import Defocus, StainJitter

    layers = [Defocus(blur, seed=1)] * (blur > 0) + [StainJitter(stain, gamma, seed=0)] * (stain > 0)
    batches = []
    for i in range(0, len(framed), 64):
        batch = framed[i : i + 64]
        for layer in layers:
            batch = layer(batch, training=True)
        batches.append(np.rint(keras.ops.convert_to_numpy(batch)).astype("uint8"))
    return np.concatenate(batches)


if __name__ == "__main__":
    main()
