"""EfficientNetB3 transfer model of the Damascus group (2023); 11,183,665 parameters."""

import keras
from keras import layers

from model_zoo._architecture import Architecture, LogitDifference, copy_backbone_weights, name_by_position


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    backbone = keras.applications.EfficientNetB3(
        include_top=False, weights=None, input_tensor=cell, pooling="max", name="efficientnet_b3"
    )
    name_by_position(backbone.layers, "efficientnet")
    for layer in backbone.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.95  # Keras' .99 lags an epoch behind when an epoch is a hundred steps
    x = layers.BatchNormalization(name="head_bn")(backbone.output)
    x = layers.Dense(256, activation="relu", name="embedding")(x)
    x = layers.Dropout(0.45, name="head_dropout")(x)
    class_logits = layers.Dense(2, name="class_logits")(x)
    logit = LogitDifference(name="logit")(class_logits)
    # softmax([a, b])[1] == sigmoid(b - a)
    model = keras.Model(cell, layers.Activation("sigmoid", name="p_all", dtype="float32")(logit), name="efficientnet_b3")
    if weights:
        bare = keras.applications.EfficientNetB3(include_top=False, weights=None, input_shape=(input_size, input_size, 3))
        name_by_position(bare.layers, "efficientnet")
        copy_backbone_weights(model, bare, weights)
    return model


ARCHITECTURE = Architecture(
    name="efficientnet_b3",
    title="EfficientNetB3",
    build=build,
    input_size=300,
    cam_layers=("top_activation",),
    source="Transfer model of paper 004 (Damascus University, 2023): max-pooled EfficientNetB3, BatchNorm, Dense 256, "
    "Dropout .45, two-way softmax. Backbone: Tan & Le 2019, arXiv:1905.11946.",
)
