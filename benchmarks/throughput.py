"""From the bytes of a file to P(ALL): this app, what is usually done, and the runtime's bare forward pass.

    BLASTOSCOPE_DATA=... python -m benchmarks.throughput

Expected on two cores: at least 6 times the throughput of `model.predict` one by one, within 2 times the time of
the best forward pass over cells that are already framed.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

import benchmarks
from benchmarks import BATCH
from inference.cells import score_files
from inference.engine import Engine
from inference.images import decode_image, frame_cell
from inference.sources import open_paths

FORWARD_BATCHES = (1, 8, 16, 32)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="medians are of this many (default 3)")
    parser.add_argument("--checkpoint", help="name or folder; default: the one the app opens with")
    options = parser.parse_args(arguments)
    cells, checkpoint = benchmarks.real_cells(options.cells), benchmarks.network(options.checkpoint)

    import tensorflow as tf

    engine, model = Engine(checkpoint), checkpoint.keras_model()
    session = onnxruntime.InferenceSession(str(checkpoint.weights), providers=["CPUExecutionProvider"])
    graph = tf.function(lambda batch: model(batch, training=False), reduce_retracing=True)
    framing = checkpoint.card.framing
    framed = np.stack([frame(path.read_bytes(), framing) for path in cells])

    with tempfile.TemporaryDirectory() as folder:
        bmp = [Path(folder) / f"{i:05d}_{path.stem}.bmp" for i, path in enumerate(cells)]
        for file, path in zip(bmp, cells, strict=True):
            file.write_bytes(benchmarks.as_bmp(path))

        def ours(files):
            refused = [r.file for r in score_files(open_paths(files), engine) if r.p_all is None]
            if refused:  # they would have been cheaper than the others
                raise SystemExit(f"error: {len(refused)} cells were refused, such as {refused[0]}; the rows would not compare.")

        def predict_one_by_one():
            for file in bmp:
                image = Image.open(io.BytesIO(file.read_bytes())).convert("RGB").resize((framing.size, framing.size))
                model.predict(np.asarray(image, "float32")[None], verbose=0)

        def graph_in_batches():
            for i in range(0, len(bmp), BATCH):
                batch = np.stack([frame(file.read_bytes(), framing) for file in bmp[i : i + BATCH]])
                graph(tf.constant(batch, tf.float32)).numpy()

        def forward(size):
            for i in range(0, len(framed), size):
                session.run(["logit"], {"cells": framed[i : i + size]})

        app, peers = "this app, BMP files", "Pillow resize, Keras model.predict one by one"
        forwards = {"forward pass only, Engine.predict": lambda: engine.predict(framed)} | {
            f"forward pass only, onnxruntime in batches of {size}": lambda size=size: forward(size) for size in FORWARD_BATCHES
        }
        benchmarks.print_machine("onnxruntime", "tensorflow", "keras", "pillow")
        seconds = benchmarks.in_turns(
            {
                app: lambda: ours(bmp),
                "this app, lossless WebP files as stored": lambda: ours(cells),
                peers: predict_one_by_one,
                f"our framing, Keras graph in batches of {BATCH}": graph_in_batches,
            }
            | forwards,
            options.rounds,
        )
    n = len(cells)
    print(f"{checkpoint.card.title} ({checkpoint.name}), {framing.size} px, {n} real cells, median of {options.rounds}\n")
    benchmarks.print_table(
        ["from file bytes to P(ALL)", "ms/cell", "cells/s", "time / ours"],
        [[name, f"{s / n * 1e3:.1f}", f"{n / s:.1f}", f"{s / seconds[app]:.2f}"] for name, s in seconds.items()],
    )
    best = min(forwards, key=seconds.get)
    print(
        f"This app is {seconds[peers] / seconds[app]:.1f} times as fast as model.predict one by one (goal: 6 or more) "
        f"and takes {seconds[app] / seconds[best]:.2f} times the best forward, {best.partition(', ')[2]} (goal: 2 or less)."
    )


def frame(data: bytes, framing) -> np.ndarray:
    return frame_cell(decode_image(data, name="cell")[0], framing)


if __name__ == "__main__":
    main()
