"""InceptionV3: as paper 001 trained it, and as paper 003 compared ALLNet with it."""

import keras
from keras import layers

from model_zoo._architecture import Architecture, one_logit, two_way
from model_zoo._backbones import INCEPTION_V3


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = INCEPTION_V3.on(INCEPTION_V3.rescale(cell)).output
    x = layers.GlobalAveragePooling2D(name="embedding")(x)
    model = keras.Model(cell, two_way(x), name="inception_v3")
    INCEPTION_V3.start(model, weights)
    return model


def build_allnet_baseline(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = layers.Normalization(name="standardise")(cell)
    x = INCEPTION_V3.on(INCEPTION_V3.rescale_standardised(x, "rescale")).output
    x = layers.GlobalAveragePooling2D(name="embedding")(x)
    model = keras.Model(cell, one_logit(x), name="inception_v3.allnet_baseline")
    INCEPTION_V3.start(model, weights)
    return model


ARCHITECTURE = Architecture(
    name="inception_v3",
    title="InceptionV3",
    build=build,
    input_size=299,
    cam_layers=("mixed10",),
    source="Paper 001 with a two-way softmax on average-pooled features: Szegedy et al. 2016, arXiv:1512.00567, "
    "without the auxiliary classifier. Input size ours.",
)
VARIANTS = {
    "allnet_baseline": Architecture(
        name="inception_v3.allnet_baseline",
        title="InceptionV3, ALLNet's baseline",
        build=build_allnet_baseline,
        input_size=250,
        cam_layers=("mixed10",),
        source="Paper 003, a baseline of ALLNet, with in-graph standardisation. The paper does not describe its head; "
        "one sigmoid unit on average-pooled features is ours.",
    )
}
