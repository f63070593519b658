"""What lossy compression does to calls: real cells, lossless and as JPEG or WebP, with the traces on black left and removed.

    BLASTOSCOPE_DATA=... python -m benchmarks.compression [CHECKPOINT ...] [--cells 80]

Each bundled network, unless named, at its operating point; half of the cells are ALL. It may have been trained on these very
cells, so what counts is how many calls change, not how many are right.
"""

from __future__ import annotations

import argparse
import io

import numpy as np
from PIL import Image

import benchmarks
import model_zoo

FORMS = {
    "JPEG, quality 95": ("JPEG", {"quality": 95}),
    "JPEG, quality 90": ("JPEG", {"quality": 90}),
    "JPEG, quality 75": ("JPEG", {"quality": 75}),
    "lossy WebP, quality 90": ("WEBP", {"quality": 90}),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="checkpoints by name or folder; default every bundled one")
    parser.add_argument("--cells", type=int, default=80, help="half of them ALL, spread evenly (default %(default)s)")
    options = parser.parse_args(arguments)
    names = options.networks or [card.name for card in model_zoo.list_checkpoints()]
    root = benchmarks.data_root()
    benchmarks.print_machine("onnxruntime", "pillow", "numpy")
    rows = [row for name in names for row in measure(benchmarks.checkpoint(name), root, options.cells)]
    benchmarks.print_table(["network, compression", "traces", "ALL called ALL", "HEM called HEM", "calls that change"], rows)


def measure(checkpoint: model_zoo.Checkpoint, root, n: int) -> list[list[str]]:
    from inference.engine import Engine
    from inference.gate import blacken
    from inference.images import decode_image, frame_cell
    from training.data import index_cells

    engine, cells = Engine(checkpoint), index_cells(root)
    of_class = [np.flatnonzero(cells.y_true == value) for value in (1, 0)]
    cells = cells.choose(np.concatenate([of[np.linspace(0, len(of) - 1, n // 2).astype(int)] for of in of_class]))
    pictures = [decode_image(file.read_bytes(), name=file.name)[0] for file in cells.files]

    def called(pictures) -> np.ndarray:
        framed = np.stack([frame_cell(picture, checkpoint.card.framing) for picture in pictures])
        return engine.predict(framed)[0] >= checkpoint.card.threshold

    def row(name: str, traces: str, found: np.ndarray) -> list[str]:
        rates = (f"{np.mean(found[cells.y_true == value] == value):.1%}" for value in (1, 0))
        return [f"{checkpoint.card.title}, {name}", traces, *rates, f"{np.mean(found != plain):.1%}"]

    plain = called(pictures)
    rows = [row("lossless", "–", plain)]
    for name, (form, settings) in FORMS.items():
        lossy = [_compressed(picture, form, settings) for picture in pictures]
        rows.append(row(name, "left", called(lossy)))
        rows.append(row(name, "removed", called([blacken(picture)[0] for picture in lossy])))
    return rows


def _compressed(picture: np.ndarray, form: str, settings: dict) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, form, **settings)
    return np.asarray(Image.open(buffer).convert("RGB"))


if __name__ == "__main__":
    main()
