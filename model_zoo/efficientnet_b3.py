"""EfficientNetB3 transfer model of Mouhssiena et al. (2023); 11,183,665 parameters."""

import keras
import numpy as np
from keras import layers

from model_zoo._architecture import Architecture, two_way
from model_zoo._backbones import EFFICIENTNET_B3
from model_zoo._pooling import (
    CellMask,
    CellSize,
    CellWhiten,
    DarknessBands,
    MaskedCovariance,
    MaskedMoments,
    QuarterTurns,
    TurnsMean,
    cell_shares,
    mix_maps,
    read_pooled,
)

_IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], "float32")
# What the pooled forms read, with their strides: the expansions at the head of stages 3 to 6, wide and still texture.
_TAPS = {
    "block3a_expand_activation": 4,
    "block4a_expand_activation": 8,
    "block5a_expand_activation": 16,
    "block6a_expand_activation": 16,
}
_MIXED = {"block4a_expand_activation", "block6a_expand_activation"}  # whose covariance is taken
_CAM_LAYERS = ("block4a_expand_activation_on_cell", "block6a_expand_activation_on_cell")


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    backbone = EFFICIENTNET_B3.on(cell, pooling="max")
    x = layers.BatchNormalization(name="head_bn")(backbone.output)
    x = layers.Dense(256, activation="relu", name="embedding")(x)
    x = layers.Dropout(0.45, name="head_dropout")(x)
    model = keras.Model(cell, two_way(x), name="efficientnet_b3")
    _start(model, weights)
    return model


def build_pooled(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    backbone = EFFICIENTNET_B3.on(cell)
    taps = _on_cell(backbone, CellMask(name="inside")(cell))
    moments = [MaskedMoments(name=f"{tap}_moments")([on_cell, shares]) for tap, on_cell, shares in taps]
    model = read_pooled(cell, ("moments", moments), name="efficientnet_b3.pooled")
    _start(model, weights)
    return model


def build_turned(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    views = [cell, CellWhiten(name="white")(cell)]
    backbone = EFFICIENTNET_B3.on(QuarterTurns(name="turns")(views))
    inside, bands = CellMask(name="inside")(cell), DarknessBands(name="bands")(cell)
    size = CellSize(name="log_size")(inside)
    inside = QuarterTurns(name="inside_turns")([inside] * len(views))
    bands = QuarterTurns(name="bands_turns")([bands] * len(views))
    moments, covariances = [], []
    for tap, on_cell, shares in _on_cell(backbone, inside):
        parts = cell_shares(bands, on_cell, _TAPS[tap], f"{tap}_bands")
        pooled = MaskedMoments(name=f"{tap}_moments_turned")([on_cell, shares, parts])
        moments.append(TurnsMean(len(views), name=f"{tap}_moments")(pooled))
        if tap in _MIXED:
            mixed = mix_maps(on_cell, name=f"{tap}_mix")
            pooled = MaskedCovariance(name=f"{tap}_covariance_turned")([mixed, shares])
            covariances.append(TurnsMean(len(views), name=f"{tap}_covariance")(pooled))
    kinds = ("moments", moments), ("covariances", covariances), ("size", [size])
    model = read_pooled(cell, *kinds, name="efficientnet_b3.turned")
    _start(model, weights)
    return model


def _on_cell(backbone, inside):
    """Of each layer in `_TAPS`: its name, its maps times how much of each place is cell, and those shares."""
    for tap, stride in _TAPS.items():
        maps = backbone.get_layer(tap).output
        shares = cell_shares(inside, maps, stride, tap)
        # A layer of its own, so that Grad-CAM, which weighs whole maps, sees what is used of them.
        yield tap, layers.Multiply(name=f"{tap}_on_cell")([maps, shares]), shares


def _start(model: keras.Model, weights: str | None) -> None:
    EFFICIENTNET_B3.start(model, weights)
    # Keras' ImageNet file holds deviations where the layer expects variances, and Keras' own ImageNet form makes up for
    # that with one more layer. Our graph is the same from every start.
    normalization = model.get_layer("efficientnet_normalization_1")
    if np.allclose(keras.ops.convert_to_numpy(normalization.adapt_variance), _IMAGENET_DEVIATION, atol=1e-3):
        normalization.adapt_variance.assign(_IMAGENET_DEVIATION**2)
        normalization.finalize_state()


ARCHITECTURE = Architecture(
    name="efficientnet_b3",
    title="EfficientNetB3",
    build=build,
    input_size=300,
    cam_layers=("top_activation",),
    source="Transfer model of paper 004 (Mouhssiena et al. 2023): max-pooled EfficientNetB3, BatchNorm, Dense 256, "
    "Dropout .45, two-way softmax. Backbone: Tan & Le 2019, arXiv:1905.11946.",
)
VARIANTS = {
    "pooled": Architecture(
        name="efficientnet_b3.pooled",
        title="EfficientNetB3, pooled",
        build=build_pooled,
        input_size=96,
        cam_layers=_CAM_LAYERS,
        source="Backbone of paper 004, EfficientNetB3 (Tan & Le 2019, arXiv:1905.11946), up to the head of its sixth stage of"
        " seven. Ours: moments of four middle layers over the cell, and one logit on them.",
    ),
    "turned": Architecture(
        name="efficientnet_b3.turned",
        title="EfficientNetB3, turned",
        build=build_turned,
        input_size=96,
        cam_layers=_CAM_LAYERS,
        source="As EfficientNetB3, pooled. Ours as well: it sees the cell as stained and whitened within it, each"
        " turned by quarters and averaged; moments over the dark, the middling and the light part of the cell, and covariances"
        " over the cell; the cell's size beside them.",
    ),
}
