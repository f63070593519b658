"""EfficientNetB3 transfer model of the Damascus group (2023); 11,183,665 parameters."""

import keras
import numpy as np
from keras import layers

from model_zoo._architecture import Architecture, two_way
from model_zoo._backbones import EFFICIENTNET_B3

_IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], "float32")


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    backbone = EFFICIENTNET_B3.on(cell, pooling="max")
    x = layers.BatchNormalization(name="head_bn")(backbone.output)
    x = layers.Dense(256, activation="relu", name="embedding")(x)
    x = layers.Dropout(0.45, name="head_dropout")(x)
    model = keras.Model(cell, two_way(x), name="efficientnet_b3")
    EFFICIENTNET_B3.start(model, weights)
    # Keras' ImageNet file holds deviations where the layer expects variances, and Keras' own ImageNet form makes up for
    # that with one more layer. Our graph is the same from every start.
    normalization = model.get_layer("efficientnet_normalization_1")
    if np.allclose(keras.ops.convert_to_numpy(normalization.adapt_variance), _IMAGENET_DEVIATION, atol=1e-3):
        normalization.adapt_variance.assign(_IMAGENET_DEVIATION**2)
        normalization.finalize_state()
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
