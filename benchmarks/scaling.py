"""What each recipe costs: operations of its network, cells drawn, and hours on this processor, one GPU and eight.

    BLASTOSCOPE_DATA=... python -m benchmarks.scaling

Operations are those of convolutions and dense layers, two for each multiply-add; a training step takes three times a forward
pass, a frozen layer counted like any other. Cells are those of C-NMC 2019: 10,661 of the training folds, 1,867 of the
preliminary test set; every epoch is counted, also where a recipe may stop early.

The processor's speed is measured here and now, in training steps on real cells of ResNet50, which stands for networks of
ordinary convolutions, and of MobileNetV2, for those with depthwise or grouped ones. GPU hours are computed: the published peak
of an NVIDIA H100 or H200 (989 TFLOP/s, dense bfloat16) times a share of it, measured once for depthwise convolutions, assumed
for ordinary ones; eight GPUs divide the batches of one run (`devices = 8`) at an assumed efficiency. Starting, compiling and
writing, some minutes a run, come on top.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import benchmarks
import model_zoo
from inference.images import decode_image, frame_cell
from model_zoo import FrameSpec
from training.jobs import shipped_recipes
from training.recipe import Recipe

TRAINING, TEST, FEWER = 10_661, 1_867, 3_389  # cells of C-NMC 2019; HEM cells among the training folds
TEACHER = "mobilenet_v2_pyramid"
MEASURED = {"ordinary": "resnet50", "depthwise": "mobilenet_v2"}
SIZE = 128
PEAK = 989e12  # NVIDIA H100 and H200 data sheets: bfloat16 tensor cores without sparsity, FLOP/s
# Of the peak, in training. Depthwise: 944 cells a second of EfficientNetB3, 300 px, batches of 32, on one H100 on 2026-11-26
# (benchmarks.training_speed). Ordinary: assumed.
SHARE = {"ordinary": 0.04, "depthwise": 0.0105}
EFFICIENCY = 0.5  # assumed: of eight GPUs, which hold 2 to 4 cells of a batch each


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=16, help="in a measured step (default 16)")
    parser.add_argument("--steps", type=int, default=3, help="measured, after a first one that compiles (default 3)")
    parser.add_argument("--recipes", nargs="+", help="names of training/recipes/; default: all")
    options = parser.parse_args(arguments)
    cells = benchmarks.real_cells(options.cells)
    benchmarks.print_machine("tensorflow", "keras")
    framed = np.stack([_frame(cell) for cell in cells])
    speed = {kind: measure(name, framed, options.steps) for kind, name in MEASURED.items()}
    rows, networks = [], {}
    for name, recipe in shipped_recipes().items():
        if options.recipes and name not in options.recipes:
            continue
        place = recipe.architecture, recipe.input_size
        networks[place] = networks.get(place) or look_at(*place)
        work, network = work_of(recipe), networks[place]
        operations = 2 * network.multiply_adds * (3 * work.drawn + work.looked_at)
        if recipe.teacher:
            operations += 2 * look_at(TEACHER, recipe.input_size).multiply_adds * work.drawn
        cpu = operations / speed[network.kind] / 3600
        gpu = operations / (PEAK * SHARE[network.kind]) / 3600
        counts = [f"{recipe.input_size}", f"{2e-9 * network.multiply_adds:.2f}", f"{work.networks}", f"{work.drawn:,.0f}"]
        rows.append([name, *counts, f"{operations / 1e15:.2f}", *map(in_hours, (cpu, gpu, gpu / 8 / EFFICIENCY))])
    header = ["recipe", "pixels", "GFLOP a forward pass", "networks", "cells drawn", "PFLOP", "hours, this processor"]
    benchmarks.print_table([*header, "hours, one H100 (computed)", "hours, eight (computed)"], rows)
    for kind, name in MEASURED.items():
        print(f"Measured: {speed[kind] / 1e9:.1f} GFLOP/s in training steps of {name}, {SIZE} px, {len(framed)} cells each.")
    print(
        f"Computed: {PEAK / 1e12:.0f} TFLOP/s peak, of which {SHARE['ordinary']:.1%} are assumed for ordinary convolutions, "
        f"and {SHARE['depthwise']:.2%}, as measured, taken for depthwise and grouped ones; eight GPUs at {EFFICIENCY:.0%} of "
        "eight times one."
    )


def _frame(cell: Path) -> np.ndarray:
    return frame_cell(decode_image(cell.read_bytes(), name=cell.name)[0], FrameSpec(crop=300, size=SIZE))


def measure(architecture: str, framed: np.ndarray, steps: int) -> float:
    """Operations a second in training steps: uint8 (n, S, S, 3) are a batch."""
    import keras

    keras.utils.set_random_seed(0)
    network = model_zoo.find_architecture(architecture).build(input_size=framed.shape[1])
    network.compile("adam", "binary_crossentropy", jit_compile=False)
    batch, y_true, seconds = framed.astype("float32"), np.arange(len(framed), dtype="float32")[:, None] % 2, []
    for _ in range(steps + 1):
        start = time.perf_counter()
        network.train_on_batch(batch, y_true)
        seconds.append(time.perf_counter() - start)
    return 6 * multiply_adds(network) * len(framed) / statistics.median(seconds[1:])


@dataclass(frozen=True, kw_only=True)
class Network:
    """`multiply_adds` of a forward pass over one cell; `kind`: "ordinary", or "depthwise" where channels are in groups."""

    multiply_adds: int
    kind: str


def look_at(architecture: str, input_size: int) -> Network:
    """An architecture's graph, without memory for its weights."""
    import keras

    with keras.StatelessScope(initialize_variables=False):
        network = model_zoo.find_architecture(architecture).build(input_size=input_size)
    apart = any(isinstance(layer, keras.layers.DepthwiseConv2D) or getattr(layer, "groups", 1) > 1 for layer in network.layers)
    return Network(multiply_adds=multiply_adds(network), kind="depthwise" if apart else "ordinary")


def multiply_adds(network) -> int:
    """Of one forward pass over one cell: each entry of a kernel once for every place of its layer's output, in each turn."""
    import keras

    from model_zoo._pooling import QuarterTurns, TurnsMean

    copies, total = {}, 0
    for layer in network.layers:
        sources = keras.tree.flatten(layer.input)
        here = max((copies[id(source)] for source in sources if id(source) in copies), default=1)
        if isinstance(layer, QuarterTurns):
            here *= 4 * len(sources)
        elif isinstance(layer, TurnsMean):
            here = 1
        copies[id(layer.output)] = here
        if hasattr(layer, "kernel"):
            total += here * math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])
    return total


@dataclass(frozen=True, kw_only=True)
class Work:
    """Over all networks that a recipe trains: cells `drawn` for training, and `looked_at` in forward passes besides."""

    networks: int
    drawn: float
    looked_at: float


def work_of(recipe: Recipe) -> Work:
    """What a recipe draws and looks at on C-NMC 2019, its folds taken as equally large."""
    fold = TRAINING / recipe.folds
    fits = 1
    if recipe.protocol == "by_subject":
        validation, test, fits = fold * recipe.validation, fold, len(recipe.test_folds) or recipe.folds
        training = TRAINING - test - validation
    elif recipe.protocol == "official":
        validation, test = fold * recipe.validation, TEST
        training = TRAINING - validation
    else:
        training, validation, test = (share * TRAINING for share in recipe.shares)

    def draws(cells: float) -> float:
        cells *= 2 * FEWER / TRAINING if recipe.sampling == "undersampled" else 1
        return (recipe.epochs + recipe.head_epochs) * (recipe.draws_per_epoch or cells)

    looked_at = fits * (recipe.epochs * validation + recipe.rotations * (validation + test))
    if recipe.probe:  # features are of all cells, and of each fold's own network where that is grown
        looked_at += TRAINING * (fits + recipe.refit if recipe.grow_from else 1)
    lessons = recipe.teach_epochs * (recipe.draws_per_epoch or TRAINING)
    drawn = fits * draws(training) + recipe.refit * draws(TRAINING) + lessons
    return Work(networks=fits + recipe.refit, drawn=drawn, looked_at=looked_at)


def in_hours(hours: float) -> str:
    return "< 0.01" if hours < 0.005 else f"{hours:.{0 if hours >= 10 else 1 if hours >= 1 else 2}f}"


if __name__ == "__main__":
    main()
