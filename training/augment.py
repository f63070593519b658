"""Augmentation that runs in the network's backend, on whole batches. Black stays black in all of it."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers, ops

from training.devices import draw_uniform
from training.recipe import Recipe


def _compiled(function):
    """On TensorFlow, compile a pure function with XLA: one pass over the pixels instead of one for each operation.

    There the surrounding step is not compiled on a processor, whose convolutions are quicker without XLA. JAX compiles
    the whole step anyway.
    """
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


def _take(x, indices):
    """x[indices] along the first axis, from 0: TensorFlow's `ops.take` looks for negative indices first, pixel by pixel."""
    if keras.backend.backend() != "tensorflow":
        return ops.take(x, indices, axis=0)
    import tensorflow as tf

    return tf.gather(x, indices)


class Placement(layers.Layer):
    """Mirror, turn and shift each cell by its own draw, in one bilinear resampling; what comes in is black.

    uint8 in and out: a quarter of the bytes to move. Alone, mirroring and quarter turns change no pixel.

    Args:
        flip: axes mirrored with probability 1/2 each: "", "horizontal" (left to right), or "both".
        rotate: largest angle in degrees, either way; 180 is any.
        quarter_turns: add 0, 90, 180 or 270 degrees.
        shift: largest translation along each axis, as a share of the frame.
        seed: of the draws.
    """

    def __init__(self, *, flip: str = "", rotate: float = 0.0, quarter_turns: bool = False, shift: float = 0.0, seed: int = 0):
        super().__init__(dtype="float32")  # whatever the network's precision
        self.flip, self.rotate, self.quarter_turns, self.shift = flip, rotate, quarter_turns, shift
        self.random = keras.random.SeedGenerator(seed)

    def call(self, cells, training=False):
        cells = ops.cast(cells, "uint8")
        if not training:
            return cells
        draw = ops.transpose(draw_uniform(ops.shape(cells)[0], (6,), seed=self.random))
        mirror_x = ops.where(draw[0] < (0.5 if self.flip else 0), -1.0, 1.0)
        mirror_y = ops.where(draw[1] < (0.5 if self.flip == "both" else 0), -1.0, 1.0)
        angle = (2 * draw[2] - 1) * self.rotate * np.pi / 180
        cos, sin = ops.cos(angle), ops.sin(angle)
        if self.quarter_turns:  # by exact numbers, for exact pixels
            turn = ops.cast(draw[3] * 4, "int32")
            turn_cos, turn_sin = ops.take(ops.array([1.0, 0, -1, 0]), turn), ops.take(ops.array([0, 1.0, 0, -1]), turn)
            cos, sin = cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin
        matrix = ops.stack([mirror_x * cos, -mirror_x * sin, mirror_y * sin, mirror_y * cos])
        return _resample(cells, matrix, (2 * draw[4:] - 1) * self.shift * cells.shape[1])


@_compiled
def _resample(cells, matrix, shift):
    """Bilinear samples where each pixel comes from.

    Args:
        cells: uint8 (n, S, S, 3).
        matrix: (4, n), rows of the 2x2 matrices that take a pixel (x, y), seen from the centre, to its source.
        shift: (2, n), x and y in pixels, of what is seen.
    Returns:
        uint8 (n, S, S, 3).
    """
    n, size = ops.shape(cells)[0], cells.shape[1]
    centre, side = (size - 1) / 2, size + 3
    matrix, shift = matrix[:, :, None, None], shift[:, :, None, None]
    x = ops.reshape(ops.arange(size, dtype="float32") - centre, (1, 1, size)) - shift[0]
    y = ops.reshape(ops.arange(size, dtype="float32") - centre, (1, size, 1)) - shift[1]
    source_x = ops.clip(matrix[0] * x + matrix[1] * y + centre, -1, size)
    source_y = ops.clip(matrix[2] * x + matrix[3] * y + centre, -1, size)
    left, top = ops.floor(source_x), ops.floor(source_y)
    right, low = source_x - left, source_y - top  # weights of the neighbours
    framed = ops.reshape(ops.pad(cells, ((0, 0), (1, 2), (1, 2), (0, 0))), (-1, 3))  # black: every neighbour exists
    first = ops.reshape(ops.arange(n, dtype="int32") * side**2, (-1, 1, 1))
    first = first + (ops.cast(top, "int32") + 1) * side + ops.cast(left, "int32") + 1
    taps = ((0, (1 - low) * (1 - right)), (1, (1 - low) * right), (side, low * (1 - right)), (side + 1, low * right))
    sampled = sum(ops.cast(_take(framed, first + step), "float32") * share[..., None] for step, share in taps)
    return ops.cast(sampled + 0.5, "uint8")


class Defocus(layers.Layer):
    """Blur each cell by its own draw, inside itself: another focus. uint8 in and out; the segmented outline stays where it is.

    Args:
        blur: largest standard deviation of the Gaussian, in pixels; drawn from U(0, blur).
        seed: of the draws.
    """

    def __init__(self, blur: float, seed: int):
        super().__init__(dtype="float32")
        reach = int(np.ceil(3 * blur))
        self.steps = np.arange(-reach, reach + 1, dtype="float32")
        self.blur, self.random = blur, keras.random.SeedGenerator(seed)

    def call(self, cells, training=False):
        cells = ops.cast(cells, "uint8")
        if not training:
            return cells
        deviation = draw_uniform(ops.shape(cells)[0], (1,), 0.0, self.blur, seed=self.random) + 1e-3
        return _blur(cells, ops.exp(-0.5 * (self.steps / deviation) ** 2))


@_compiled
def _blur(cells, taps):
    """uint8 (n, S, S, 3), each blurred along both axes by its own row of taps (n, K), over the pixels of its cell alone."""
    inside = ops.cast(ops.max(cells, axis=-1, keepdims=True) >= 1, "float32")
    sums = ops.concatenate([ops.cast(cells, "float32") * inside, inside], axis=-1)
    size, width = cells.shape[1], taps.shape[1]
    for axis in (1, 2):
        padded = ops.pad(sums, [(0, 0), *((width // 2,) * 2 if a == axis else (0, 0) for a in (1, 2)), (0, 0)])
        moved = (padded[:, k : k + size] if axis == 1 else padded[:, :, k : k + size] for k in range(width))
        sums = sum(x * taps[:, None, None, k, None] for k, x in enumerate(moved))
    blurred = ops.maximum(sums[..., :3] / (sums[..., 3:] + 1e-6), 1)  # not black, or a dark place would leave the cell
    return ops.cast(blurred * inside + 0.5, "uint8")


class StainJitter(layers.Layer):
    """Random gamma and colour matrix for each cell: another microscope, another stain. uint8 in, float32 of 0..255 out.

    Both map 0 to 0, so the segmented background stays exact black.

    Args:
        stain: each entry of the 3x3 colour matrix is the identity's plus U(-stain, stain); the off-diagonal ones a third.
        gamma: exponent U(1 - gamma, 1 + gamma).
        seed: of the draws.
    """

    def __init__(self, stain: float, gamma: float, seed: int):
        super().__init__(dtype="float32")
        self.stain, self.gamma = stain, gamma
        self.random = keras.random.SeedGenerator(seed)

    def call(self, cells, training=False):
        if not training:
            return ops.cast(cells, "float32")
        n = ops.shape(cells)[0]
        exponent = draw_uniform(n, (1,), 1 - self.gamma, 1 + self.gamma, seed=self.random)
        noise = draw_uniform(n, (3, 3), -self.stain, self.stain, seed=self.random)
        matrix = ops.eye(3) + noise * (ops.eye(3) * 2 / 3 + 1 / 3)
        return _mix(_look_up(ops.cast(cells, "uint8"), _powers(exponent)), matrix)


def _powers(exponent):
    """What each of the values 0..255 becomes: float32 exponents (n, 1) -> uint8 (n, 256), black from black alone."""
    value = ops.arange(256, dtype="float32")
    return ops.cast(ops.maximum(255 * ops.power(value / 255, exponent) + 0.5, ops.minimum(value, 1)), "uint8")


# Two kernels, a ready table and bytes between them: in one piece XLA computes every power and looks up every value several
# times, and floats are four times as much to write and to read.
@_compiled
def _look_up(cells, table):
    """table[i, cells[i]]: uint8 (n, S, S, 3) and (n, 256) -> uint8 (n, S, S, 3)."""
    first = ops.reshape(ops.arange(ops.shape(cells)[0], dtype="int32") * 256, (-1, 1, 1, 1))
    return _take(ops.reshape(table, (-1,)), first + ops.cast(cells, "int32"))


@_compiled
def _mix(cells, matrix):
    """cells @ matrix, uint8 (n, S, S, 3) and float32 (n, 3, 3) -> float32 of 0..255."""
    cells = ops.cast(cells, "float32")
    return ops.clip(sum(cells[..., k : k + 1] * matrix[:, None, None, k] for k in range(3)), 0, 255)


def augmentation(recipe: Recipe) -> list[layers.Layer]:
    """The layers that a recipe asks for: uint8 (n, S, S, 3) in, uint8 or float32 of 0..255 out; no change outside training."""
    chosen = []
    if recipe.flip or recipe.rotate or recipe.quarter_turns or recipe.shift:
        placed = {name: getattr(recipe, name) for name in ("flip", "rotate", "quarter_turns", "shift")}
        chosen.append(Placement(**placed, seed=recipe.seed))
    if recipe.blur:
        chosen.append(Defocus(recipe.blur, recipe.seed + 2))
    if recipe.stain or recipe.gamma:
        chosen.append(StainJitter(recipe.stain, recipe.gamma, recipe.seed + 1))
    return chosen
