"""What a recipe will be like: cells as its augmentation makes them, and the time of a training step, measured.

python -m training.estimate FOLDER --data DATA: reads FOLDER/recipe.toml; writes cells.png and told.json there.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from PIL import Image

from inference.errors import InputError
from inference.images import decode_image, frame_cell
from model_zoo import BlastoscopeError, FrameSpec
from model_zoo._files import write_json
from training.data import Cells, cell_label, index_cells
from training.jobs import free_device
from training.recipe import Recipe, find_starts, read_recipe
from training.results import in_words
from training.splits import Part, all_rows, divide, thinned

SHOWN, VERSIONS, TILE, GAP = 4, 5, 96, 4  # cells in the picture, augmented versions of each; pixels
STEPS = 3  # measured, after as many that also compile


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.estimate", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    try:
        recipe = read_recipe(options.folder / "recipe.toml")
        recipe = recipe.tiny() if options.tiny else recipe
        with free_device(recipe.devices) as device:
            if device is None:
                os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a run fills the GPU: the picture is made without it
            told = _look(recipe, options.data, options.folder / "cells.png", tiny=options.tiny, measure=device is not None)
        write_json(options.folder / "told.json", told)
    except BlastoscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _look(recipe: Recipe, data: Path, picture: Path, *, tiny: bool, measure: bool) -> dict:
    recipe, cells = find_starts(recipe, data), index_cells(data)
    cells = thinned(cells) if tiny else cells
    parts = divide(cells, replace(recipe, folds_by="cells"))  # as much work; darkness is not known before cells are verified
    rows = parts[0].training
    rows = np.concatenate([of[np.linspace(0, len(of) - 1, min(16, len(of))).astype(int)] for of in _by_class(cells, rows)])
    few = cells.choose(rows)
    framed = np.stack([_framed(file, recipe.framing) for file in few.files])
    _draw(recipe, framed[np.linspace(0, len(framed) - 1, SHOWN).astype(int)], picture)
    if not measure:
        return {"seconds": None, "sentence": "Not measured: a run holds the device."}
    step, forward, device = _time(recipe, framed, few)
    seconds = _seconds(recipe, cells, parts, step, forward)
    networks = len(parts) + recipe.refit
    work = f"{recipe.epochs} epochs each, {1000 * step / recipe.batch_size:.0f} ms a cell"
    if not recipe.epochs:
        work = f"a regression on what an untouched network sees, {1000 * forward:.0f} ms a cell"
        if recipe.teach_epochs:
            lessons = f"{recipe.teach_epochs} epochs of lessons, {1000 * step / recipe.batch_size:.0f} ms a cell"
            work = f"{lessons}, then regressions, {1000 * forward:.0f} ms a cell"
        if recipe.grow_from:
            work = f"{work}; growing them first is not counted"
    sentence = f"About {in_words(seconds)} on {device}: {networks} network{'s' if networks > 1 else ''}, {work}."
    return {"seconds": seconds, "sentence": sentence + (" Early stopping may end it sooner." if recipe.patience else "")}


def _by_class(cells, rows) -> list[np.ndarray]:
    return [rows[cells.y_true[rows] == value] for value in (1, 0)]


def _draw(recipe: Recipe, framed: np.ndarray, picture: Path) -> None:
    """A row a cell: as it is, then as augmentation draws it."""
    import keras

    from training.augment import augmentation

    shown = np.repeat(framed, VERSIONS, axis=0)
    for layer in augmentation(recipe):
        shown = layer(shown, training=True)
    shown = np.clip(keras.ops.convert_to_numpy(shown), 0, 255).astype("uint8").reshape(len(framed), VERSIONS, *framed.shape[1:])
    _sheet(np.concatenate([framed[:, None], shown], axis=1), apart=10).save(picture)


def _sheet(tiles: np.ndarray, apart: int = 0) -> Image.Image:
    """uint8 (rows, columns, S, S, 3) as one picture; the first column stands `apart` by so many pixels."""
    rows, columns = tiles.shape[:2]
    step = TILE + GAP
    sheet = Image.new("RGB", (columns * step - GAP + apart, rows * step - GAP), "#050507")
    for row in range(rows):
        for column in range(columns):
            small = Image.fromarray(tiles[row, column]).resize((TILE, TILE), Image.Resampling.BILINEAR)
            sheet.paste(small, (column * step + apart * (column > 0), row * step))
    return sheet


def draw_samples(cells: Cells, framing: FrameSpec, *, columns: int = 6) -> tuple[bytes, list[str]]:
    """Cells as a network would be fed them, without augmentation: a row of ALL, a row of HEM, of as many subjects as go.

    Returns:
        PNG, and the names of the cells shown; one that cannot be read is black.
    """
    rows = [of[np.linspace(0, len(of) - 1, columns).astype(int)] for of in _by_class(cells, np.arange(len(cells)))]
    names = [cell_label(cells.files[row]) for row in np.concatenate(rows)]
    tiles = np.stack([np.stack([_framed(cells.files[row], framing) for row in of]) for of in rows])
    buffer = io.BytesIO()
    _sheet(tiles).save(buffer, "PNG")
    return buffer.getvalue(), names


def _framed(file: Path, framing: FrameSpec) -> np.ndarray:
    try:
        return frame_cell(decode_image(file.read_bytes(), name=cell_label(file))[0], framing)
    except (InputError, OSError):
        return np.zeros((framing.size, framing.size, 3), "uint8")


def _time(recipe: Recipe, framed: np.ndarray, few: Cells) -> tuple[float, float, str]:
    """Seconds of a training step as the run takes it (0 without epochs), of a cell's forward pass, and the device."""
    import keras

    from training.devices import list_devices, precise, spread
    from training.fit import build_network, time_step
    from training.run import precision_of

    with precise(precision_of(recipe.precision)):
        with spread(recipe.devices):
            network = build_network(recipe)
        logit_of = keras.Model(network.inputs, network.get_layer("logit").output)
        logit_of.predict_on_batch(framed.astype("float32"))  # compiles
        began = time.perf_counter()
        logit_of.predict_on_batch(framed.astype("float32"))
        forward = (time.perf_counter() - began) / len(framed)
        trains = recipe.epochs + recipe.head_epochs + recipe.teach_epochs
        step = time_step(network, recipe, framed, few, STEPS) if trains else 0.0
    return step, forward, list_devices()[0].split(":")[0].upper()


def _seconds(recipe: Recipe, cells: Cells, parts, step: float, forward: float) -> float:
    """Of a run: the steps of its fits, and forward passes over what is only looked at."""
    from training.probe import CHANGED

    none = np.zeros(0, int)
    fits = [*parts, *[Part(name="all", training=all_rows(parts), validation=none, test=none)] * recipe.refit]
    steps, looked = recipe.teach_epochs * _batches(recipe, cells, parts[0]), 0
    if recipe.probe:  # features are of all cells, and of each fit's own network where that is grown or its head trained
        looked = len(cells) * (len(fits) if recipe.grow_from or recipe.head_epochs else 1)
    for part in fits:
        steps += (recipe.epochs + recipe.head_epochs) * _batches(recipe, cells, part)
        looked += max(1, recipe.epochs) * len(part.validation) + recipe.rotations * (len(part.validation) + len(part.test))
        looked += min(CHANGED, len(part.training)) if recipe.probe_imaging else 0
    return step * steps + forward * looked


def _batches(recipe: Recipe, cells: Cells, part) -> int:
    from training.draws import Draws

    return len(Draws(recipe, np.zeros(0), cells, part.training))


if __name__ == "__main__":
    sys.exit(main())
