"""Which runtime, how many threads, which batch: the forward pass alone, over framed real cells.

    BLASTOSCOPE_DATA=... python -m benchmarks.runtimes

Every runtime but Keras reads the checkpoint's own model.onnx. What was chosen and why: docs/decisions/0002.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import onnxruntime
import openvino

import benchmarks
import model_zoo
from benchmarks import BATCH
from inference.engine import Engine
from inference.images import decode_image, frame_cell

N = os.cpu_count()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=4, help=f"of {BATCH} cells (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are of this many (default 5)")
    parser.add_argument("--checkpoint", nargs="*", help="names or folders; default: every bundled network")
    options = parser.parse_args(arguments)
    names = options.checkpoint or [card.name for card in model_zoo.list_checkpoints() if not card.members]
    images = [decode_image(path.read_bytes(), name=path.name)[0] for path in benchmarks.real_cells(BATCH * options.batches)]
    benchmarks.print_machine("onnxruntime", "openvino", "tensorflow", "keras")
    for checkpoint in map(benchmarks.network, names):
        framing = checkpoint.card.framing
        cells = np.stack([frame_cell(image, framing) for image in images])
        engine, reference = Engine(checkpoint), keras_graph(checkpoint, cells)
        variants = {
            f"Keras graph, batch {BATCH}": reference,
            "onnxruntime, one by one, 1 thread": run_onnx(checkpoint, cells, batch=1, threads=1),
            f"onnxruntime, one by one, {N} threads": run_onnx(checkpoint, cells, batch=1, threads=N),
            f"onnxruntime, batch {BATCH}, {N} threads": run_onnx(checkpoint, cells, batch=BATCH, threads=N),
            f"onnxruntime, {N} workers of 1 thread (Engine)": lambda engine=engine, cells=cells: engine.predict(cells)[0],
        }
        for precision in ("f32", "bf16"):
            variants |= openvino_variants(checkpoint, cells, precision)
        seconds = benchmarks.in_turns(variants, options.rounds)
        n, expected = len(cells), calibrated(engine, reference())
        print(f"{checkpoint.card.title} ({checkpoint.name}), {framing.size} px, {n} real cells, median of {options.rounds}\n")
        benchmarks.print_table(
            ["forward pass", "ms/cell", "cells/s", "max \\|Δ P(ALL)\\| to Keras"],
            [
                [name, f"{s / n * 1e3:.1f}", f"{n / s:.1f}", f"{difference(engine, variants[name], expected):.1e}"]
                for name, s in seconds.items()
            ],
        )


def keras_graph(checkpoint, cells):
    """() -> logit (N, 1)."""
    import keras
    import tensorflow as tf

    model = checkpoint.keras_model()
    logit = keras.Model(model.inputs, model.get_layer("logit").output)
    graph = tf.function(lambda batch: logit(batch, training=False), reduce_retracing=True)
    batches = [cells[i : i + BATCH] for i in range(0, len(cells), BATCH)]
    return lambda: np.concatenate([graph(tf.constant(batch, tf.float32)).numpy() for batch in batches])


def run_onnx(checkpoint, cells, *, batch, threads):
    """() -> logit (N, 1)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(checkpoint.weights), options, providers=["CPUExecutionProvider"])
    batches = [cells[i : i + batch] for i in range(0, len(cells), batch)]
    return lambda: np.concatenate([session.run(["logit"], {"cells": part})[0] for part in batches])


def openvino_variants(checkpoint, cells, precision):
    """Name -> (() -> logit (N, 1)), each compiled for its fixed batch; none, and a line instead, where it cannot."""

    def compile_for(batch, hint):
        model = openvino.Core().read_model(str(checkpoint.weights))
        model.reshape([batch, *cells.shape[1:]])
        return openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": precision})

    try:
        single, batched, stream = compile_for(1, "LATENCY"), compile_for(BATCH, "LATENCY"), compile_for(1, "THROUGHPUT")
    except RuntimeError as error:  # its shape inference stumbles over EfficientNetB3's pooled form, one by one alone
        print(f"OpenVINO {precision} does not take {checkpoint.card.title}: {str(error).strip().splitlines()[-1]}\n")
        return {}

    def run(compiled, batch):
        return np.concatenate([compiled([cells[i : i + batch]])["logit"].copy() for i in range(0, len(cells), batch)])

    def run_stream():
        logit = np.empty((len(cells), 1), "float32")
        queue = openvino.AsyncInferQueue(stream)
        queue.set_callback(lambda request, i: np.copyto(logit[i], request.get_tensor("logit").data[0]))
        for i in range(len(cells)):
            queue.start_async([cells[i : i + 1]], i)
        queue.wait_all()
        return logit

    used = single.get_property("INFERENCE_PRECISION_HINT").to_string()
    label = f"OpenVINO {precision}" if used in precision else f"OpenVINO {precision} (not available here, ran {used})"
    return {
        f"{label}, one by one": lambda: run(single, 1),
        f"{label}, batch {BATCH}": lambda: run(batched, BATCH),
        f"{label}, asynchronous, one cell a request": run_stream,
    }


def calibrated(engine, scores):
    """P(ALL) (N,) of logits (N, 1); what Engine returns is calibrated already."""
    return scores if scores.ndim == 1 else engine.calibrate(scores[:, 0])


def difference(engine, variant, expected):
    return np.abs(calibrated(engine, variant()) - expected).max()


if __name__ == "__main__":
    main()
