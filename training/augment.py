"""Augmentation that runs in the network's backend, on whole batches. Black stays black in all of it."""

import keras
from keras import layers, ops

from training.recipe import Recipe


class StainJitter(layers.Layer):
    """Random colour matrix and gamma for each cell: another microscope, another stain.

    Both map 0 to 0, so the segmented background stays exact black.

    Args:
        stain: each entry of the 3x3 colour matrix is the identity's plus U(-stain, stain); the off-diagonal ones a third.
        gamma: exponent U(1 - gamma, 1 + gamma).
    """

    def __init__(self, stain: float, gamma: float, seed: int):
        super().__init__()
        self.stain, self.gamma = stain, gamma
        self.random = keras.random.SeedGenerator(seed)

    def call(self, cells, training=False):
        if not training:
            return cells
        n = ops.shape(cells)[0]
        noise = keras.random.uniform((n, 3, 3), -self.stain, self.stain, seed=self.random)
        matrix = ops.eye(3) + noise * (ops.eye(3) * 2 / 3 + 1 / 3)
        exponent = keras.random.uniform((n, 1, 1), 1 - self.gamma, 1 + self.gamma, seed=self.random)
        size = cells.shape[1]
        pixels = ops.reshape(cells, (-1, size * size, 3)) / 255
        pixels = ops.power(ops.clip(ops.matmul(pixels, matrix), 1e-6, 1), exponent)
        background = ops.reshape(ops.max(cells, axis=-1, keepdims=True), (-1, size * size, 1)) < 1
        return ops.reshape(ops.where(background, 0.0, pixels * 255), (-1, size, size, 3))


def augmentation(recipe: Recipe) -> list[layers.Layer]:
    """The layers that a recipe asks for; identity outside training."""
    chosen = []
    if recipe.flip:
        chosen.append(layers.RandomFlip("horizontal_and_vertical", seed=recipe.seed))
    if recipe.rotate:
        chosen.append(layers.RandomRotation(0.5, fill_mode="constant", fill_value=0.0, seed=recipe.seed + 1))
    if recipe.shift:
        spread = (-recipe.shift, recipe.shift)
        chosen.append(layers.RandomTranslation(spread, spread, fill_mode="constant", fill_value=0.0, seed=recipe.seed + 2))
    if recipe.stain or recipe.gamma:
        chosen.append(StainJitter(recipe.stain, recipe.gamma, recipe.seed + 3))
    return chosen
