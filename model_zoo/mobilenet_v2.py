"""MobileNetV2, the fast reference (not from the papers)."""

import keras
from keras import layers

from model_zoo._architecture import Architecture, one_logit
from model_zoo._backbones import MOBILENET_V2


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    backbone = MOBILENET_V2.on(MOBILENET_V2.rescale(cell))
    x = layers.GlobalAveragePooling2D(name="global_average_pooling2d")(backbone.output)
    x = layers.Dropout(0.2, name="embedding")(x)
    model = keras.Model(cell, one_logit(x), name="mobilenet_v2")
    MOBILENET_V2.start(model, weights)
    return model


ARCHITECTURE = Architecture(
    name="mobilenet_v2",
    title="MobileNetV2",
    build=build,
    input_size=224,
    cam_layers=("out_relu",),
    source="Ours, the fast reference. Backbone: Sandler et al. 2018, arXiv:1801.04381; one logit on average-pooled features.",
)
