"""The authors' own network of paper 001: 7,535,040 parameters in its six blocks, 64,066,938 at 300 px."""

import keras
from keras import layers

from model_zoo._architecture import MOMENTUM, Architecture, start, two_way

# (filters, convolutions) of each block. The text counts 14 convolutions; the printed totals hold for these 13.
_BLOCKS = ((32, 3), (64, 2), (128, 2), (256, 2), (384, 2), (512, 2))


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = layers.Flatten(name="flatten")(_features(cell))
    x = layers.Dense(4096, activation="relu", name="dense1")(x)
    x = layers.Dropout(0.5, name="dropout1")(x)
    x = layers.Dense(1000, activation="relu", name="embedding")(x)
    x = layers.Dropout(0.5, name="dropout2")(x)
    model = keras.Model(cell, two_way(x), name="six_block_cnn")
    start(model, weights, bare=lambda: keras.Model(cell, _features(cell)))
    return model


def _features(cell):
    x = layers.Rescaling(1 / 255, name="rescale")(cell)
    for block, (filters, convolutions) in enumerate(_BLOCKS, 1):
        for i in range(1, convolutions + 1):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"block{block}_conv{i}")(x)
            x = layers.BatchNormalization(momentum=MOMENTUM, name=f"block{block}_bn{i}")(x)
        x = layers.MaxPooling2D(2, padding="same", name=f"block{block}_pool")(x)
    return x


ARCHITECTURE = Architecture(
    name="six_block_cnn",
    title="Six-block CNN",
    build=build,
    input_size=300,
    cam_layers=("block6_conv2",),
    source="Paper 001, the authors' own network (Figs. 17-19). The dropout rates (.5) and the scaling to 0..1 are ours.",
)
