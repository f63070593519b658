"""AlexNet, as paper 001 trained it; 62,378,344 parameters with 1000 classes at 227 px."""

import keras
from keras import layers

from model_zoo._architecture import Architecture, start, two_way


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = layers.Flatten(name="flatten")(_features(cell))
    x = layers.Dense(4096, activation="relu", name="fc1")(x)
    x = layers.Dropout(0.5, name="dropout1")(x)
    x = layers.Dense(4096, activation="relu", name="embedding")(x)
    x = layers.Dropout(0.5, name="dropout2")(x)
    model = keras.Model(cell, two_way(x), name="alexnet")
    start(model, weights, bare=lambda: keras.Model(cell, _features(cell)))
    return model


def _features(cell):
    x = layers.Rescaling(1 / 255, name="rescale")(cell)
    x = layers.Conv2D(96, 11, strides=4, activation="relu", name="conv1")(x)
    x = layers.MaxPooling2D(3, 2, name="pool1")(x)
    x = layers.Conv2D(256, 5, padding="same", activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D(3, 2, name="pool2")(x)
    x = layers.Conv2D(384, 3, padding="same", activation="relu", name="conv3")(x)
    x = layers.Conv2D(384, 3, padding="same", activation="relu", name="conv4")(x)
    x = layers.Conv2D(256, 3, padding="same", activation="relu", name="conv5")(x)
    return layers.MaxPooling2D(3, 2, name="pool5")(x)


ARCHITECTURE = Architecture(
    name="alexnet",
    title="AlexNet",
    build=build,
    input_size=227,
    cam_layers=("conv5",),
    source="Paper 001 with a two-way softmax: Krizhevsky et al. 2012 on one device (ungrouped), without local response "
    "normalisation, which VGG's authors found useless. Input size and scaling ours.",
)
