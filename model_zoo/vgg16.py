"""VGG16: as paper 001 trained it, and as paper 003 compared ALLNet with it."""

import keras
from keras import layers

from model_zoo._architecture import Architecture, one_logit, two_way
from model_zoo._backbones import VGG16


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = VGG16.on(VGG16.rescale(cell)).output
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(4096, activation="relu", name="fc1")(x)
    x = layers.Dense(4096, activation="relu", name="embedding")(x)
    model = keras.Model(cell, two_way(x), name="vgg16")
    VGG16.start(model, weights)
    return model


def build_allnet_baseline(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = layers.Normalization(name="standardise")(cell)
    x = VGG16.on(VGG16.rescale_standardised(x, "rescale")).output
    x = layers.Conv2D(512, 1, activation="relu", name="head_conv1")(x)
    x = layers.Conv2D(512, 1, activation="relu", name="head_conv2")(x)
    x = layers.MaxPooling2D(2, name="head_pool")(x)
    x = layers.Flatten(name="head_flatten")(x)
    for i, units in enumerate((512, 256, 128), 1):
        x = layers.Dense(units, activation="relu", name=f"head_dense{i}")(x)
    x = layers.Dense(64, activation="relu", name="embedding")(x)
    model = keras.Model(cell, one_logit(x), name="vgg16.allnet_baseline")
    VGG16.start(model, weights)
    return model


ARCHITECTURE = Architecture(
    name="vgg16",
    title="VGG16",
    build=build,
    input_size=224,
    cam_layers=("block5_conv3",),
    source="Paper 001 with a two-way softmax: Simonyan & Zisserman 2015, arXiv:1409.1556, 'configuration D', "
    "two layers of 4096. Input size ours.",
)
VARIANTS = {
    "allnet_baseline": Architecture(
        name="vgg16.allnet_baseline",
        title="VGG16, ALLNet's baseline",
        build=build_allnet_baseline,
        input_size=250,
        cam_layers=("head_conv2", "block5_conv3"),
        source="Paper 003, the baseline of ALLNet: two convolutions of 512 1x1 kernels, 2x2 max-pooling, five dense layers, "
        "the last one sigmoid unit; in-graph standardisation. The widths 512, 256, 128, 64 are ours.",
    )
}
