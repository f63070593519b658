"""MobileNetV2 at three scales and two stainings, middle layers pooled over the cell (ours: docs/decisions/0007)."""

import keras
from keras import layers

from model_zoo._architecture import Architecture
from model_zoo._backbones import MOBILENET_V2
from model_zoo._pooling import CellMask, CellStandardise, DarknessBands, MaskedCovariance, MaskedMoments, mix_maps, read_pooled

# Where the backbone has seen texture but not yet objects: ImageNet's last layers say less about chromatin.
_SCALES = {"fine": 1, "middle": 2, "coarse": 3}
_STAININGS = ("raw", "standard")
_HALVED = {"block_3_expand_relu": 2, "block_6_expand_relu": 3, "block_10_expand_relu": 4, "block_13_expand_relu": 4}
_MIXED = {"block_6_expand_relu", "block_13_expand_relu"}  # whose covariance is taken


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    places = {"inside": CellMask(name="inside")(cell), "bands": DarknessBands(name="bands")(cell)}
    moments, covariances, branches = [], [], {}
    for scale, shrink in _SCALES.items():
        picture = layers.AveragePooling2D(shrink, name=f"shrink{shrink}")(cell) if shrink > 1 else cell
        shares, bands = (_halvings(x, shrink, f"{scale}_{name}") for name, x in places.items())
        for staining in _STAININGS:
            name = f"{scale}_{staining}"
            seen = picture if staining == "raw" else CellStandardise(name=f"{name}_stain")(picture)
            branches[name] = MOBILENET_V2.on(MOBILENET_V2.rescale(seen, name=f"{name}_rescale"))
            for tap, halved in _HALVED.items():
                # A layer of its own, so that Grad-CAM, which weighs whole maps, sees what is used of them.
                on_cell = layers.Multiply(name=f"{name}_{tap}_on_cell")([branches[name].get_layer(tap).output, shares[halved]])
                moments.append(MaskedMoments(name=f"{name}_{tap}_moments")([on_cell, shares[halved], bands[halved]]))
                if tap in _MIXED:
                    mixed = mix_maps(on_cell, name=f"{name}_{tap}_mix")
                    covariances.append(MaskedCovariance(name=f"{name}_{tap}_covariance")([mixed, shares[halved]]))
            for layer in branches[name].layers:
                if not layer.name.startswith(("cell", "shrink", f"{name}_")):
                    layer.name = f"{name}_{layer.name}"
    model = read_pooled(cell, ("moments", moments), ("covariances", covariances), name="mobilenet_v2_pyramid")
    if weights:
        for name in branches:
            MOBILENET_V2.start(model, weights, prefix=f"{name}_")
    return model


def _halvings(x, shrink: int, name: str) -> list:
    """`x`, shrunk, then halved once more for each stride of the backbone."""
    found = [layers.AveragePooling2D(shrink, name=name)(x) if shrink > 1 else x]
    for halved in range(1, 5):
        found.append(layers.AveragePooling2D(2, padding="same", name=f"{name}{2**halved}")(found[-1]))
    return found


ARCHITECTURE = Architecture(
    name="mobilenet_v2_pyramid",
    title="MobileNetV2 pyramid",
    build=build,
    input_size=192,
    cam_layers=tuple(f"{scale}_{staining}_block_13_expand_relu_on_cell" for scale in _SCALES for staining in _STAININGS),
    source="Ours. Six MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) up to block 13: the cell, its half and third, each"
    " as stained and with its channels standardised within the cell; of middle layers, moments over the dark, the middling and"
    " the light part of the cell, and covariances over the cell.",
)
