"""ResNet50: as paper 001 trained it, and as paper 003 compared ALLNet with it."""

import keras
from keras import layers

from model_zoo._architecture import Architecture, one_logit, two_way
from model_zoo._backbones import RESNET50


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = RESNET50.on(RESNET50.rescale(cell)).output
    x = layers.GlobalAveragePooling2D(name="embedding")(x)
    model = keras.Model(cell, two_way(x), name="resnet50")
    RESNET50.start(model, weights)
    return model


def build_allnet_baseline(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = layers.Normalization(name="standardise")(cell)
    x = RESNET50.on(RESNET50.rescale_standardised(x, "rescale")).output
    x = layers.GlobalAveragePooling2D(name="embedding")(x)
    model = keras.Model(cell, one_logit(x), name="resnet50.allnet_baseline")
    RESNET50.start(model, weights)
    return model


ARCHITECTURE = Architecture(
    name="resnet50",
    title="ResNet50",
    build=build,
    input_size=224,
    cam_layers=("conv5_block3_out",),
    source="Paper 001 with a two-way softmax on average-pooled features: He et al. 2016, arXiv:1512.03385. Input size ours.",
)
VARIANTS = {
    "allnet_baseline": Architecture(
        name="resnet50.allnet_baseline",
        title="ResNet50, ALLNet's baseline",
        build=build_allnet_baseline,
        input_size=250,
        cam_layers=("conv5_block3_out",),
        source="Paper 003, a baseline of ALLNet, with in-graph standardisation. The paper does not describe its head; "
        "one sigmoid unit on average-pooled features is ours.",
    )
}
