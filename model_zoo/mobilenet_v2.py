"""MobileNetV2, the fast reference (not from the papers)."""

import keras
from keras import layers

from model_zoo._architecture import Architecture, copy_backbone_weights


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = layers.Rescaling(1 / 127.5, offset=-1, name="rescale")(cell)
    backbone = keras.applications.MobileNetV2(include_top=False, weights=None, input_tensor=x)
    for layer in backbone.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.9  # Keras' .999 leaves the moving averages far behind a short fine-tuning
    x = layers.GlobalAveragePooling2D(name="global_average_pooling2d")(backbone.output)
    embedding = layers.Dropout(0.2, name="embedding")(x)
    logit = layers.Dense(1, name="logit")(embedding)
    model = keras.Model(cell, layers.Activation("sigmoid", name="p_all", dtype="float32")(logit), name="mobilenet_v2")
    if weights:
        bare = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(224, 224, 3))
        copy_backbone_weights(model, bare, weights)
    return model


ARCHITECTURE = Architecture(
    name="mobilenet_v2",
    title="MobileNetV2",
    build=build,
    input_size=224,
    cam_layers=("out_relu",),
    source="Ours, the fast reference. Backbone: Sandler et al. 2018, arXiv:1801.04381; one logit on average-pooled features.",
)
