"""How fast a recipe trains on this machine's device, and how long that waits for cells.

    BLASTOSCOPE_DATA=... KERAS_BACKEND=jax python -m benchmarks.training_speed [RECIPE]

Training steps as `python -m training` takes them: the recipe's network, augmentation, precision and optimizer, in Keras' `fit`.
First on cells drawn as in training, from the memory-mapped cache or, on JAX, from the GPU's memory; then on one batch that lies
on the device already. What the first takes longer is the waiting for data. In turns, in one run; a first round, which compiles,
does not count.

Expected on one GPU, EfficientNetB3 at 300 px in mixed precision: at most 5% of the time is spent waiting. On an H100 with JAX
it was 2.6% (docs/scaling.md).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import benchmarks
from training.devices import keep_memory
from training.jobs import shipped_recipes

if benchmarks.GPUS is None:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = benchmarks.GPUS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = shipped_recipes()
    parser.add_argument(
        "recipe",
        nargs="?",
        default="efficientnet_b3_as_published",
        choices=recipes,
        metavar="RECIPE",
        help="of training/recipes/ (default %(default)s)",
    )
    parser.add_argument("--cells", type=int, default=512, help="to draw from (default %(default)s)")
    parser.add_argument("--steps", type=int, help="in one round (default 60 on a GPU, 2 without: minutes on two cores)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are of this many (default %(default)s)")
    parser.add_argument("--input-size", type=int, help="pixels a side; default the recipe's")
    options = parser.parse_args(arguments)
    recipe = recipes[options.recipe]
    recipe = replace(
        recipe, weights="", teacher="", teach_epochs=0, teach_without=[], input_size=options.input_size or recipe.input_size
    )
    files = benchmarks.real_cells(options.cells)

    keep_memory()
    import keras

    from training.devices import find_devices
    from training.run import precision_of

    backend = keras.backend.backend()
    benchmarks.print_machine("keras", backend)
    precision = precision_of(recipe.precision)
    gpu = _device_name(backend)
    device = gpu or ", ".join(find_devices(1))
    print(f"{device}; {options.recipe}: {recipe.input_size} px, batches of {recipe.batch_size}, {precision}\n")
    with tempfile.TemporaryDirectory() as folder:
        steps = options.steps or (60 if gpu else 2)
        drawn, resident = measure(recipe, precision, files, steps, options.rounds, Path(folder))
    rows = [
        [name, f"{1e3 * seconds:.1f}", f"{recipe.batch_size / seconds:,.0f}"]
        for name, seconds in (("cells drawn, as in training", drawn), ("one batch, on the device", resident))
    ]
    benchmarks.print_table(["training steps", "ms a step", "cells a second"], rows)
    print(f"Waiting for data: {max(0.0, 1 - resident / drawn):.1%} of the time.")


def measure(recipe, precision: str, files: list[Path], steps: int, rounds: int, cache: Path) -> tuple[float, float]:
    """Seconds of a training step: on cells drawn as in training, and on one batch that lies on the device."""
    import keras

    from training.data import Cells, pack_cells
    from training.devices import held, precise, spread
    from training.draws import Draws
    from training.fit import Clock, _compile, _trainer, build_network

    rows = np.arange(len(files))
    subjects = np.array([file.stem.split("_")[1] for file in files])
    y_true = np.array([file.stem.endswith("all") for file in files], int)
    cells = Cells(files=files, y_true=y_true, subjects=subjects, groups=subjects)
    packed = pack_cells(cells, recipe.framing, cache=cache)
    recipe = replace(recipe, sampling="cells", draws_per_epoch=steps * recipe.batch_size)
    with precise(precision), spread(1):
        network = build_network(recipe)
        logit_of = keras.Model(network.inputs, network.get_layer("logit").output)
        trainer, loss = _trainer(network, logit_of, recipe, packed, rows)
        _compile(trainer, loss, network, recipe, steps)
    draws = Draws(recipe, held(packed), cells, rows)
    first = keras.tree.map_structure(keras.ops.convert_to_tensor, draws[0])

    class Resident(keras.utils.PyDataset):
        def __len__(self):
            return steps

        def __getitem__(self, index):
            return first

    def one_round(batches) -> float:
        clock = Clock()
        trainer.fit(batches, verbose=0, shuffle=False, callbacks=[clock])
        trainer.set_weights([w.copy() for w in trainer.get_weights()])  # on JAX they share arrays with their averages
        return clock.seconds / steps

    taken = [(one_round(draws), one_round(Resident(workers=1, max_queue_size=8))) for _ in range(rounds + 1)][1:]
    return tuple(statistics.median(column) for column in zip(*taken, strict=True))


def _device_name(backend: str) -> str:
    """The GPU's name, "" without one."""
    if backend == "jax":
        import jax

        return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""
    if backend == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(found[0])["device_name"] if found else ""


if __name__ == "__main__":
    main()
