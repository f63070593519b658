"""Teaching a network what an ImageNet network sees, place by place, without labels: what a random start lacks.

Romero et al. 2015 (FitNets), arXiv:1412.6550. An architecture's `lessons` say which layer is to give which maps of
mobilenet_v2_pyramid. Why maps and not what is pooled from them: docs/decisions/0011.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

import model_zoo
from training.devices import precise
from training.errors import RecipeError
from training.recipe import Recipe

_SAMPLE = 256  # cells from which the teacher's maps are standardised


def lesson_gap(network, recipe: Recipe, cells, packed: np.ndarray, rows: np.ndarray):
    """How far `network` is from its teacher, (N, 1): mean square over the cell's places, channels and lessons.

    The teacher's maps have mean 0 and a deviation near 1 over the cells' places (channels that are nearly always silent a
    smaller one), so a network that knows nothing is a little less than 1 away.

    Args:
        cells: symbolic (N, S, S, 3), raw 0..255.
        packed, rows: uint8 (n, S, S, 3) and positions in it: what the maps are standardised with.
    Raises:
        RecipeError: the architecture has no lessons.
    """
    lessons = model_zoo.find_architecture(recipe.architecture).lessons
    if not lessons:
        raise RecipeError(f"{recipe.architecture} has no lessons: leave teach_epochs out. Received: {recipe.teach_epochs}")
    names = sorted({name for _, maps in lessons.values() for name in maps})
    teacher = _teacher(recipe, names)
    statistics = _statistics(teacher, packed, rows, names)
    *seen, inside = teacher(cells)
    seen = dict(zip(names, seen, strict=True))
    learnt = keras.Model(network.inputs[0], [network.get_layer(layer).output for layer in lessons])(cells)
    gaps = []
    for found, (stride, maps) in zip(learnt, lessons.values(), strict=True):
        wanted = ops.concatenate([(seen[name] - statistics[name][0]) / statistics[name][1] for name in maps], axis=-1)
        found = ops.cast(found, "float32")
        wanted, shares = (_fitted(x, recipe.input_size, stride, found.shape[1]) for x in (wanted, inside))
        squares = ops.mean(ops.square(found - wanted), axis=-1, keepdims=True)
        gaps.append(ops.sum(squares * shares, axis=(1, 2)) / (ops.sum(shares, axis=(1, 2)) + 1e-3))
    return sum(gaps) / len(gaps)


def _teacher(recipe: Recipe, names: list[str]):
    """Cells -> the named maps and the cells' mask; frozen, in float32 whatever the network's precision."""
    with precise("float32"):
        pyramid = model_zoo.find_architecture("mobilenet_v2_pyramid").build(
            input_size=recipe.input_size, weights=recipe.teacher
        )
    teacher = keras.Model(pyramid.inputs[0], [pyramid.get_layer(name).output for name in (*names, "inside")])
    teacher.trainable = False
    return teacher


def _statistics(teacher, packed, rows, names) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and deviation of each channel over the places that are cell."""
    chosen = np.sort(np.random.default_rng(0).choice(rows, min(_SAMPLE, len(rows)), replace=False))
    totals = {name: [0.0, 0.0, 0.0] for name in names}
    for start in range(0, len(chosen), 32):
        *seen, inside = teacher(packed[chosen[start : start + 32]].astype("float32"))
        for name, maps in zip(names, seen, strict=True):
            size = maps.shape[1]
            shares = ops.convert_to_numpy(_fitted(inside, inside.shape[1], -(-inside.shape[1] // size), size))
            maps = ops.convert_to_numpy(maps).astype("float64")
            for i, term in enumerate((shares, maps * shares, maps * maps * shares)):
                totals[name][i] = totals[name][i] + term.sum((0, 1, 2))
    found = {}
    for name, (count, total, squares) in totals.items():
        mean = total / count
        variance = np.maximum(squares / count - mean * mean, 0)
        # a channel that is nearly always silent would count as much as one that tells cells apart
        found[name] = mean.astype("float32"), np.sqrt(variance + 0.05 * variance.mean()).astype("float32")
    return found


def _fitted(maps, pixels: int, stride: int, size: int):
    """(N, h, w, C) of pictures of `pixels` -> (N, size, size, C), places `stride` pixels apart: means, then the rim cut off.

    The rim is what unpadded convolutions lose: the places that are left lie where they lay.
    """
    joined = stride * maps.shape[1] // pixels
    if joined > 1:
        maps = ops.average_pool(maps, joined, strides=joined, padding="same")
    lost = maps.shape[1] - size
    return maps[:, lost // 2 : lost // 2 + size, lost // 2 : lost // 2 + size]
