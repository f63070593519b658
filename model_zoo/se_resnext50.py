"""SE-ResNeXt50 (32x4d), paper 002: Prellberg & Kramer. Same function as timm's `seresnext50_32x4d` from the same weights.

tests/model_zoo/timm_reference.py compares the two, and converts timm's ImageNet weights for `weights`.
"""

import keras
from keras import layers

from model_zoo._architecture import Architecture, GroupedConv2D, one_logit, start

_GROUPS, _REDUCTION = 32, 16
_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # (blocks, width); 2 x width channels inside a block, 4 x between them


def build(*, input_size: int, weights: str | None = None) -> keras.Model:
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = layers.GlobalAveragePooling2D(name="embedding")(_features(cell))
    model = keras.Model(cell, one_logit(x), name="se_resnext50")
    start(model, weights, bare=lambda: build_backbone(input_size=input_size))
    return model


def build_backbone(*, input_size: int) -> keras.Model:
    """The part that `weights` of `build` fills. Its layers are timm's modules, with "_" for "."."""
    cell = keras.Input((input_size, input_size, 3), name="cell")
    return keras.Model(cell, _features(cell), name="se_resnext50")


def build_classifier(*, input_size: int, classes: int = 1000) -> keras.Model:
    """The ImageNet form, cells -> class logits (N, classes): 27,559,896 parameters with 1000 classes, as timm's."""
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = layers.GlobalAveragePooling2D(name="embedding")(_features(cell))
    return keras.Model(cell, layers.Dense(classes, name="fc", dtype="float32")(x), name="se_resnext50")


def _features(cell):
    x = layers.Normalization(mean=[123.675, 116.28, 103.53], variance=[58.395**2, 57.12**2, 57.375**2], name="rescale")(
        cell
    )  # torchvision's mean and deviation
    x = _convolution(x, 64, 7, "conv1", stride=2)
    x = layers.Activation("relu", name="act1")(_batch_norm(x, "bn1"))
    x = layers.ZeroPadding2D(1, name="maxpool_pad")(x)
    x = layers.MaxPooling2D(3, 2, name="maxpool")(x)
    for stage, (blocks, width) in enumerate(_STAGES, 1):
        for i in range(blocks):
            x = _block(x, width, stride=2 if stage > 1 and i == 0 else 1, name=f"layer{stage}_{i}")
    return x


def _block(x, width: int, *, stride: int, name: str):
    inner, outer = 2 * width, 4 * width
    y = _convolution(x, inner, 1, f"{name}_conv1")
    y = layers.Activation("relu", name=f"{name}_act1")(_batch_norm(y, f"{name}_bn1"))
    y = _convolution(y, inner, 3, f"{name}_conv2", stride=stride, groups=_GROUPS)
    y = layers.Activation("relu", name=f"{name}_act2")(_batch_norm(y, f"{name}_bn2"))
    y = _batch_norm(_convolution(y, outer, 1, f"{name}_conv3"), f"{name}_bn3")
    gate = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_se_squeeze")(y)
    gate = layers.Conv2D(outer // _REDUCTION, 1, activation="relu", name=f"{name}_se_fc1")(gate)
    gate = layers.Conv2D(outer, 1, activation="sigmoid", name=f"{name}_se_fc2")(gate)
    y = layers.Multiply(name=f"{name}_se")([y, gate])
    if x.shape[-1] != outer:
        x = _batch_norm(_convolution(x, outer, 1, f"{name}_downsample_0", stride=stride), f"{name}_downsample_1")
    return layers.Activation("relu", name=f"{name}_out")(layers.Add(name=f"{name}_add")([x, y]))


def _convolution(x, filters: int, size: int, name: str, *, stride: int = 1, groups: int = 1):
    """Padded alike on all sides, as in PyTorch: where the stride is 2, Keras' "same" is not."""
    padding = "same"
    if stride > 1 and size > 1:
        x, padding = layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x), "valid"
    options = {"strides": stride, "padding": padding, "use_bias": False, "kernel_initializer": "he_normal", "name": name}
    if groups > 1:
        return GroupedConv2D(filters, size, groups=groups, **options)(x)
    return layers.Conv2D(filters, size, **options)(x)


def _batch_norm(x, name: str):
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)


ARCHITECTURE = Architecture(
    name="se_resnext50",
    title="SE-ResNeXt50",
    build=build,
    input_size=300,
    cam_layers=("layer4_2_out",),
    source="Paper 002: SE-ResNeXt50 32x4d with one logit. Xie et al. 2017, arXiv:1611.05431; Hu et al. 2018, arXiv:1709.01507. "
    "ImageNet weights: timm's, converted.",
)
