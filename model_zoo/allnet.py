"""ALLNet (paper 003): VGG16 + ResNet50 + InceptionV3 hybrid. How the maps are aligned: docs/decisions/0004."""

import keras
from keras import layers

from model_zoo._architecture import Architecture, one_logit
from model_zoo._backbones import INCEPTION_V3, RESNET50, VGG16
from model_zoo._errors import WeightsError
from model_zoo._pooling import (
    CellMask,
    CellSize,
    CellStandardise,
    DarknessBands,
    MaskedCovariance,
    MaskedMoments,
    cell_shares,
    mix_maps,
    read_pooled,
)

_BACKBONES = {"vgg16": VGG16, "resnet50": RESNET50, "inception_v3": INCEPTION_V3}

# Two mid-depth activations of each backbone, near strides 8 and 16.
_MID_LAYERS = {
    "vgg16": ("block3_conv3", "block4_conv3"),
    "resnet50": ("conv3_block4_out", "conv4_block6_out"),
    "inception_v3": ("mixed2", "mixed7"),
}

# For the pooled form, of each backbone: which staining it sees, and, for two mid-depth activations, their stride and the maps
# of mobilenet_v2_pyramid that the convolution on them can be taught to give.
_STRIDE_16 = ("block_10_expand_relu", "block_13_expand_relu")
_TAPS = {
    "vgg16": ("raw", {"block3_conv3": (4, ("block_3_expand_relu",)), "block4_conv3": (8, ("block_6_expand_relu",))}),
    "resnet50": ("standard", {"conv3_block4_out": (8, ("block_6_expand_relu",)), "conv4_block6_out": (16, _STRIDE_16)}),
    "inception_v3": ("raw", {"mixed2": (8, ("block_6_expand_relu",)), "mixed7": (16, _STRIDE_16)}),
}
_CHANNELS = {"block_3_expand_relu": 144, "block_6_expand_relu": 192, "block_10_expand_relu": 384, "block_13_expand_relu": 576}


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    _check(weights)
    cell = keras.Input((input_size, input_size, 3), name="cell")
    # mean and variance are variables: set from the training set by training/, stored with the weights
    x = layers.Normalization(name="standardise")(cell)
    vgg, resnet, inception = (b.on(b.rescale_standardised(x, f"{name}_rescale")) for name, b in _BACKBONES.items())

    # VGG's own last pooling halves a 15x15 map to 7x7, as published
    final = [vgg.output, resnet.output, inception.output]
    size = min(maps.shape[1] for maps in final)
    concatenate2 = layers.Concatenate(name="concatenate2")([_align(maps, size, f"final{i}") for i, maps in enumerate(final)])

    mids = []
    for backbone, (name, taps) in zip((vgg, resnet, inception), _MID_LAYERS.items(), strict=True):
        for depth, tap in enumerate(taps):
            maps, label = backbone.get_layer(tap).output, f"{name}_mid{depth}"
            stride = max(1, maps.shape[1] // size)
            maps = layers.MaxPooling2D(stride, name=f"{label}_pool")(maps)
            maps = layers.Conv2D(128, 1, activation="relu", name=f"{label}_conv1")(maps)
            maps = layers.Conv2D(128, 3, padding="same", activation="relu", name=f"{label}_conv2")(maps)
            mids.append(_align(maps, size, label))
    x = layers.Concatenate(name="concatenate1")(mids)
    x = layers.Conv2D(512, 1, activation="relu", name="mid_conv1")(x)
    x = layers.Conv2D(512, 1, activation="relu", name="mid_conv2")(x)

    x = layers.Concatenate(name="concatenate3")([x, concatenate2])
    x = layers.MaxPooling2D(3, 2, padding="same", name="head_pool")(x)
    x = layers.Conv2D(512, 1, activation="relu", name="head_conv")(x)
    x = layers.Flatten(name="head_flatten")(x)
    x = layers.Dense(256, activation="relu", name="embedding")(x)
    model = keras.Model(cell, one_logit(x), name="allnet")
    for backbone in _BACKBONES.values():
        backbone.start(model, weights)
    return model


def build_pooled(*, input_size: int, weights: str | None = None) -> keras.Model:
    _check(weights)
    cell = keras.Input((input_size, input_size, 3), name="cell")
    seen = {"raw": cell, "standard": CellStandardise(name="cell_stain")(cell)}
    seen = {staining: layers.Normalization(name=f"standardise_{staining}")(x) for staining, x in seen.items()}
    inside, bands = CellMask(name="inside")(cell), DarknessBands(name="bands")(cell)
    moments, covariances = [], []
    for name, backbone in _BACKBONES.items():
        staining, taps = _TAPS[name]
        built = backbone.on(backbone.rescale_standardised(seen[staining], f"{name}_rescale"))
        for depth, (tap, (stride, taught)) in enumerate(taps.items()):
            label = f"{name}_mid{depth}"
            maps = built.get_layer(tap).output
            shares = cell_shares(inside, maps, stride, label)
            maps = layers.Conv2D(sum(_CHANNELS[block] for block in taught), 1, name=f"{label}_conv")(maps)
            # A layer of its own, so that Grad-CAM, which weighs whole maps, sees what is used of them.
            on_cell = layers.Multiply(name=f"{label}_on_cell")([maps, shares])
            in_bands = cell_shares(bands, maps, stride, f"{label}_bands")
            moments.append(MaskedMoments(name=f"{label}_moments")([on_cell, shares, in_bands]))
            mixed = mix_maps(on_cell, name=f"{label}_mix")
            covariances.append(MaskedCovariance(name=f"{label}_covariance")([mixed, shares]))
    kinds = ("concatenate1", moments), ("covariances", covariances), ("size", [CellSize(name="log_size")(inside)])
    model = read_pooled(cell, *kinds, name="allnet.pooled")
    for backbone in _BACKBONES.values():
        backbone.start(model, weights)
    return model


def _check(weights: str | None) -> None:
    if weights not in (None, "", "imagenet"):
        raise WeightsError(f"allnet has three backbones and starts from no single weights file. Received: weights={weights!r}")


def _align(maps, size: int, label: str):
    """Bring (N, n, n, C) to (N, size, size, C) with a dense stride-1 maximum: no resampling, nothing cut off."""
    excess = maps.shape[1] - size
    return layers.MaxPooling2D(excess + 1, strides=1, name=f"{label}_align")(maps) if excess else maps


ARCHITECTURE = Architecture(
    name="allnet",
    title="ALLNet",
    build=build,
    input_size=250,
    cam_layers=("head_conv", "block5_conv3", "conv5_block3_out", "mixed10"),
    source="ALLNet, paper 003: VGG16, ResNet50 and InceptionV3 with concatenate1/2/3 and in-graph standardisation. "
    "Alignment of the 7x7, 8x8 and 6x6 maps, the widths of the added convolutions, and rescaling to each backbone's range "
    "are ours.",
)
VARIANTS = {
    "pooled": Architecture(
        name="allnet.pooled",
        title="ALLNet, pooled",
        build=build_pooled,
        input_size=96,
        cam_layers=("vgg16_mid1_on_cell", "resnet50_mid1_on_cell", "inception_v3_mid1_on_cell"),
        source="ALLNet's three backbones up to its mid-depth activations (paper 003). Ours: concatenate1 joins moments of"
        " convolved maps, over the cell's dark, middling and light part, instead of maps, so that nothing has to be aligned;"
        " covariances and the cell's size stand beside them; ResNet50 sees the cell's channels standardised within it; one"
        " logit on all of that.",
        lessons={
            f"{name}_mid{depth}_conv": (stride, tuple(f"fine_{staining}_{block}" for block in taught))
            for name, (staining, taps) in _TAPS.items()
            for depth, (stride, taught) in enumerate(taps.values())
        },
    )
}
