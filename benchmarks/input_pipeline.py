"""From disk to augmented batches, without a network: this project's training input, and what is usually done.

    BLASTOSCOPE_DATA=... python -m benchmarks.input_pipeline

Both give random batches of cells, mirrored along both axes, turned by any angle, shifted, with another stain and gamma
for each. This project's way is the one of `python -m training`: a memory-mapped array of framed cells, batches of uint8,
augmentation in the backend. The usual one is Keras' ImageDataGenerator.flow_from_dataframe over the BMP files that
C-NMC is distributed as: decode, resize, scipy and NumPy for one image at a time, here with the same stain and gamma.

Expected on two cores: at least 20 times the usual way.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import benchmarks
from model_zoo import FrameSpec
from training.devices import keep_memory

BATCH = 32
CROP = 300
SETTINGS = {"flip": "both", "rotate": 180.0, "shift": 0.05, "stain": 0.2, "gamma": 0.3}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=256, help="in one round (default 256)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are of this many (default 3)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 128], help="pixels a side (default 300 128)")
    options = parser.parse_args(arguments)
    sources = benchmarks.real_cells(options.cells)
    keep_memory()
    benchmarks.print_machine("tensorflow", "keras", "numpy", "scipy", "pillow")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i:05d}.bmp" for i in range(len(sources))]
        for file, source in zip(files, sources, strict=True):
            file.write_bytes(benchmarks.as_bmp(source))
        for size in options.sizes:
            measure(files, size, options.rounds, Path(folder) / "cache")


def measure(files: list[Path], size: int, rounds: int, cache: Path) -> None:
    from training.data import Cells, pack_cells

    y_true, one = np.zeros(len(files), int), np.array(["1"] * len(files))
    cells = Cells(files=files, y_true=y_true, subjects=one, groups=one)
    started = time.perf_counter()
    packed = pack_cells(cells, FrameSpec(crop=CROP, size=size), cache=cache)
    packing = time.perf_counter() - started

    n, augment, usual = len(files), augmenting(size), flow_from_dataframe(files, size)
    batches = -(-n // BATCH)
    rng = np.random.default_rng(0)

    def fetch():
        return packed[np.sort(rng.choice(n, BATCH))]

    def ours():
        with ThreadPoolExecutor(1) as loader:  # as Keras' `fit` reads ahead
            ahead = loader.submit(fetch)
            for _ in range(batches):
                batch, ahead = ahead.result(), loader.submit(fetch)
                augment(batch)

    def usual_in_threads():
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(usual.__getitem__, range(batches)))

    def usual_in_turn():
        for i in range(batches):
            usual[i]

    drawn = fetch()
    seconds = benchmarks.in_turns(
        {
            "this project": ours,
            "of it, reading batches": lambda: [fetch() for _ in range(batches)],
            "of it, augmentation": lambda: [augment(drawn) for _ in range(batches)],
            "flow_from_dataframe": usual_in_turn,
            "flow_from_dataframe, two threads": usual_in_threads,
        },
        rounds,
    )
    # Our batches are all full, of the usual ones the last is not.
    drawn_cells = {name: n if "flow" in name else batches * BATCH for name in seconds}
    rate = {name: drawn_cells[name] / s for name, s in seconds.items()}
    print(f"{size} px, {n} real cells, batches of {BATCH}, median of {rounds}; packed once in {packing:.1f} s\n")
    benchmarks.print_table(
        ["from disk to augmented batches", "ms/image", "images/s", "speed / usual"],
        [[name, f"{1e3 / r:.2f}", f"{r:.0f}", f"{r / rate['flow_from_dataframe']:.1f}"] for name, r in rate.items()],
    )
    print(
        f"{size} px: {rate['this project'] / rate['flow_from_dataframe']:.1f} times flow_from_dataframe (goal: 20 or more), "
        f"{rate['this project'] / rate['flow_from_dataframe, two threads']:.1f} times the same in two threads.\n"
    )


def augmenting(size: int):
    """The layers of a recipe, as one function of the backend: uint8 (n, S, S, 3) -> float32."""
    import keras
    import tensorflow as tf

    from training.augment import augmentation
    from training.recipe import Recipe

    keras.utils.set_random_seed(0)
    fixed = {"architecture": "mobilenet_v2", "title": "", "summary": "", "epochs": 1, "learning_rate": 1e-3}
    layers = augmentation(Recipe(**fixed, crop=CROP, input_size=size, batch_size=BATCH, **SETTINGS))

    @tf.function
    def augment(batch):
        for layer in layers:
            batch = layer(batch, training=True)
        return batch

    return augment


def flow_from_dataframe(files: list[Path], size: int):
    """The usual loader; its item i is a batch."""
    import pandas as pd
    import tensorflow as tf

    rng, stain, gamma = np.random.default_rng(0), SETTINGS["stain"], SETTINGS["gamma"]

    def restain(image):
        """The formula of `training.augment.StainJitter`, in NumPy."""
        brightened = (image / 255) ** np.float32(rng.uniform(1 - gamma, 1 + gamma))
        noise = rng.uniform(-stain, stain, (3, 3)) * (np.eye(3) * 2 / 3 + 1 / 3)
        return np.clip(brightened @ (np.eye(3) + noise).astype("float32"), 0, 1) * 255

    generator = tf.keras.preprocessing.image.ImageDataGenerator(
        horizontal_flip=True,
        vertical_flip=True,
        rotation_range=SETTINGS["rotate"],
        width_shift_range=SETTINGS["shift"],
        height_shift_range=SETTINGS["shift"],
        fill_mode="constant",
        cval=0.0,
        preprocessing_function=restain,
    )
    table = pd.DataFrame({"file": [str(file) for file in files], "y_true": np.zeros(len(files))})
    with contextlib.redirect_stdout(io.StringIO()):  # "Found 256 validated image filenames."
        return generator.flow_from_dataframe(
            table,
            x_col="file",
            y_col="y_true",
            class_mode="raw",
            target_size=(size, size),
            batch_size=BATCH,
            interpolation="bilinear",
            seed=0,
        )


if __name__ == "__main__":
    main()
