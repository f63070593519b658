"""What a file in model_zoo/ exposes: one `ARCHITECTURE`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A buildable network.

    Attributes:
        name: file name in model_zoo/, as recipes and cards spell it.
        title: name on screen.
        build: `build(*, input_size, weights=None) -> keras.Model`, a flat functional graph that takes raw
            RGB 0..255 (N, S, S, 3) and gives `p_all` (N, 1). It has a 2-D layer `embedding`
            (the input of the last dense layer) and a layer `logit` (N, 1).
            `weights`: None, or a local `.weights.h5` file of the backbone.
        input_size: S in pixels, as published or as tested best.
        cam_layers: names of 4-D activation layers, one per branch, deepest first.
        source: the paper and what is ours.
    """

    name: str
    title: str
    build: Callable[..., keras.Model]
    input_size: int
    cam_layers: tuple[str, ...]
    source: str


@keras.saving.register_keras_serializable("blastoscope")
class LogitDifference(keras.layers.Layer):
    """(N, 2) class logits [HEM, ALL] -> (N, 1) their difference, the logit of P(ALL) under a two-way softmax."""

    def call(self, class_logits):
        return class_logits[:, 1:] - class_logits[:, :1]

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 1)


def name_by_position(layers: list[keras.layers.Layer], prefix: str) -> None:
    """Give auto-named layers ("conv2d_17") names that do not depend on what was built before in this process."""
    counts: dict[str, int] = {}
    for layer in layers:
        kind = keras.src.utils.naming.to_snake_case(type(layer).__name__)
        if layer.name == kind or layer.name.removeprefix(f"{kind}_").isdigit():
            counts[kind] = counts.get(kind, 0) + 1
            layer.name = f"{prefix}_{kind}_{counts[kind]}"


def copy_backbone_weights(model: keras.Model, backbone: keras.Model, path: str) -> None:
    """Load `path` into `backbone` and copy it, layer by layer of the same name, into `model`."""
    backbone.load_weights(path)
    for layer in backbone.layers:
        if layer.weights:
            model.get_layer(layer.name).set_weights(layer.get_weights())
