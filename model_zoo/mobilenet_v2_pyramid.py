"""MobileNetV2 at three scales and three stainings, middle layers pooled over the cell (ours: docs/decisions/0007, 0014)."""

import keras
from keras import layers

from model_zoo._architecture import Architecture
from model_zoo._backbones import MOBILENET_V2
from model_zoo._pooling import (
    CellMask,
    CellSize,
    CellStandardise,
    CellWhiten,
    DarknessBands,
    MaskedCovariance,
    MaskedMoments,
    QuarterTurns,
    TurnsMean,
    mix_maps,
    read_pooled,
)

_SCALES = {"fine": 1, "middle": 2, "coarse": 3}
# Small pictures are cheap, so they are seen more ways, and, where sampling falls by chance, turned by quarters as well.
_STAININGS = {"fine": ("raw", "standard"), "middle": ("raw", "standard"), "coarse": ("raw", "standard", "white")}
_TURNED = {"middle", "coarse"}
# Where the backbone has seen texture but not yet objects: ImageNet's last layers say less about chromatin.
_HALVED = {"block_3_expand_relu": 2, "block_6_expand_relu": 3, "block_10_expand_relu": 4, "block_13_expand_relu": 4}
_MIXED = {"block_6_expand_relu", "block_13_expand_relu"}  # whose covariance is taken


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    places = {"inside": CellMask(name="inside")(cell), "bands": DarknessBands(name="bands")(cell)}
    moments, covariances, branches = [], [], {}
    for scale, shrink in _SCALES.items():
        turned = scale in _TURNED
        picture = layers.AveragePooling2D(shrink, name=f"shrink{shrink}")(cell) if shrink > 1 else cell
        shares, bands = (_halvings(x, shrink, turned, f"{scale}_{name}") for name, x in places.items())
        for staining in _STAININGS[scale]:
            name = f"{scale}_{staining}"
            seen = _stain(picture, staining, f"{name}_stain")
            seen = QuarterTurns(name=f"{name}_turns")(seen) if turned else seen
            branches[name] = MOBILENET_V2.on(MOBILENET_V2.rescale(seen, name=f"{name}_rescale"))
            for tap, halved in _HALVED.items():
                at, maps = f"{name}_{tap}", branches[name].get_layer(tap).output
                # A layer of its own, so that Grad-CAM, which weighs whole maps, sees what is used of them.
                on_cell = layers.Multiply(name=f"{at}_on_cell")([maps, shares[halved]])
                moments.append(_pooled(MaskedMoments, [on_cell, shares[halved], bands[halved]], turned, f"{at}_moments"))
                if tap in _MIXED:
                    mixed = mix_maps(on_cell, name=f"{at}_mix")
                    covariances.append(_pooled(MaskedCovariance, [mixed, shares[halved]], turned, f"{at}_covariance"))
            for layer in branches[name].layers:
                if not layer.name.startswith(("cell", "shrink", f"{name}_")):
                    layer.name = f"{name}_{layer.name}"
    kinds = ("moments", moments), ("covariances", covariances), ("size", [CellSize(name="log_size")(places["inside"])])
    model = read_pooled(cell, *kinds, name="mobilenet_v2_pyramid")
    if weights:
        for name in branches:
            MOBILENET_V2.start(model, weights, prefix=f"{name}_")
    return model


def _stain(picture, staining: str, name: str):
    return picture if staining == "raw" else {"standard": CellStandardise, "white": CellWhiten}[staining](name=name)(picture)


def _pooled(pooling, inputs: list, turned: bool, name: str):
    """(N, D), the mean over the turns where there are any."""
    return TurnsMean(name=name)(pooling(name=f"{name}_turned")(inputs)) if turned else pooling(name=name)(inputs)


def _halvings(x, shrink: int, turned: bool, name: str) -> list:
    """`x`, shrunk and turned as the picture is, then halved once more for each stride of the backbone."""
    x = layers.AveragePooling2D(shrink, name=name)(x) if shrink > 1 else x
    found = [QuarterTurns(name=f"{name}_turns")(x) if turned else x]
    for halved in range(1, 5):
        found.append(layers.AveragePooling2D(2, padding="same", name=f"{name}{2**halved}")(found[-1]))
    return found


ARCHITECTURE = Architecture(
    name="mobilenet_v2_pyramid",
    title="MobileNetV2 pyramid",
    build=build,
    input_size=192,
    # the turned branches' maps are of four turns each, no picture of the cell
    cam_layers=tuple(f"fine_{staining}_block_13_expand_relu_on_cell" for staining in _STAININGS["fine"]),
    source="Ours. Seven MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) up to block 13: the cell, its half and third, each"
    " as stained and with its channels standardised within the cell, the third whitened as well; half and third turned by"
    " quarters and averaged; of middle layers, moments over the dark, the middling and the light part of the cell, and"
    " covariances over the cell; the cell's size beside them.",
)
