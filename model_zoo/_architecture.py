"""What a file in model_zoo/ exposes: one `ARCHITECTURE`, and `VARIANTS` of it; and the parts that several files share."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import keras

from model_zoo._errors import WeightsError

# Of batch norms. Keras' .99 leaves the moving averages an epoch behind when an epoch is a hundred steps.
MOMENTUM = 0.95


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A buildable network.

    Attributes:
        name: file name in model_zoo/, or "file.variant", as recipes and cards spell it.
        title: name on screen.
        build: `build(*, input_size, weights=None) -> keras.Model`, a flat functional graph that takes raw
            RGB 0..255 (N, S, S, 3) and gives `p_all` (N, 1). It has a 2-D layer `embedding`
            (the input of the last dense layer) and a layer `logit` (N, 1); both outputs stay float32 under
            a mixed precision policy. `weights`: None, "imagenet" (Keras downloads the backbone's), or a local
            `.weights.h5` file of the backbone; raises WeightsError.
        input_size: S in pixels, as published or as tested best.
        cam_layers: names of 4-D activation layers, one per branch, deepest first.
        source: the paper and what is ours.
        lessons: what the network can be taught without labels: name of a 4-D layer -> how many pixels its places are apart,
            and the maps it is to give: layers of mobilenet_v2_pyramid, whose channels are joined.
    """

    name: str
    title: str
    build: Callable[..., keras.Model]
    input_size: int
    cam_layers: tuple[str, ...]
    source: str
    lessons: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)


def one_logit(embedding):
    """(N, D) -> `p_all` (N, 1) by one sigmoid unit."""
    return _probability(keras.layers.Dense(1, name="logit", dtype="float32")(embedding))


def two_way(embedding):
    """(N, D) -> `p_all` (N, 1) by a softmax over [HEM, ALL]: softmax([a, b])[1] == sigmoid(b - a)."""
    class_logits = keras.layers.Dense(2, name="class_logits", dtype="float32")(embedding)
    return _probability(LogitDifference(name="logit", dtype="float32")(class_logits))


def _probability(logit):
    return keras.layers.Activation("sigmoid", name="p_all", dtype="float32")(logit)


@keras.saving.register_keras_serializable("blastoscope")
class LogitDifference(keras.layers.Layer):
    """(N, 2) class logits [HEM, ALL] -> (N, 1) their difference, the logit of P(ALL) under a two-way softmax."""

    def call(self, class_logits):
        return class_logits[:, 1:] - class_logits[:, :1]

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 1)

    def write_onnx(self, g, class_logits):
        return g.node("Gemm", [class_logits, g.constant([[-1.0], [1.0]])])


@keras.saving.register_keras_serializable("blastoscope")
class GroupedConv2D(keras.layers.Conv2D):
    """Conv2D with `groups` that also trains on a CPU: same weights, same function.

    XLA, which Keras' TensorFlow and JAX backends use for grouped convolutions, has no quick gradient of them on a CPU:
    36 s for a step through one layer of SE-ResNeXt50 (8 cells, 75 x 75 x 128, 32 groups, two cores), .15 s in this
    form: neighbouring groups joined to ordinary convolutions of 32 channels, with zeros between the groups.
    """

    def convolution_op(self, inputs, kernel):
        if keras.backend.backend() == "torch" or not keras.distribution.list_devices()[0].startswith("cpu"):
            return super().convolution_op(inputs, kernel)
        h, w, depth, filters = kernel.shape
        joined = max(1, 32 // depth)
        while self.groups % joined:
            joined -= 1
        parts = self.groups // joined
        # (h, w, depth, filters) -> one block-diagonal kernel a part
        kernel = keras.ops.reshape(kernel, (h, w, 1, depth, parts, joined, filters // self.groups))
        diagonal = keras.ops.reshape(keras.ops.eye(joined, dtype=kernel.dtype), (joined, 1, 1, joined, 1))
        kernel = keras.ops.reshape(kernel * diagonal, (h, w, joined * depth, parts, filters // parts))
        return keras.ops.concatenate(
            [
                super(GroupedConv2D, self).convolution_op(x, kernel[:, :, :, i])
                for i, x in enumerate(keras.ops.split(inputs, parts, axis=-1))
            ],
            axis=-1,
        )


def name_by_position(layers: list[keras.layers.Layer], prefix: str) -> None:
    """Give auto-named layers ("conv2d_17") names that do not depend on what was built before in this process."""
    counts: dict[str, int] = {}
    for layer in layers:
        kind = keras.src.utils.naming.to_snake_case(type(layer).__name__)
        if layer.name == kind or layer.name.removeprefix(f"{kind}_").isdigit():
            counts[kind] = counts.get(kind, 0) + 1
            layer.name = f"{prefix}_{kind}_{counts[kind]}"


def start(model: keras.Model, weights: str | None, *, bare: Callable[[], keras.Model], imagenet=None, prefix: str = "") -> None:
    """Copy a backbone's initial weights into `model`, layer by layer of the same name.

    Args:
        weights: None leaves them random; "imagenet"; or a local `.weights.h5` file of the backbone alone.
        bare: builds the backbone alone.
        imagenet: builds it with ImageNet weights that Keras downloads; None where Keras offers none.
        prefix: begins the names in `model`, which may hold the backbone's first layers alone.
    Raises:
        WeightsError: there are no such weights, they cannot be fetched, or they do not fit.
    """
    if not weights:
        return
    if weights == "imagenet":
        if imagenet is None:
            raise WeightsError(
                f"Keras offers no ImageNet weights of {model.name}. Start from random weights, or from a local .weights.h5 "
                "file of its backbone. Received: weights='imagenet'"
            )
        try:
            backbone = imagenet()
        except Exception as error:  # Keras raises a bare Exception where there is no network
            raise WeightsError(
                f"The ImageNet weights of {model.name} could not be downloaded: {error}. Without a network, give a local "
                ".weights.h5 file of the backbone, or start from random weights."
            ) from error
    else:
        if not Path(weights).is_file():
            raise WeightsError(f"The initial weights {weights} of {model.name} do not exist.")
        backbone = bare()
        try:
            backbone.load_weights(weights)
        except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
            reason = str(error).strip().partition("\n")[0]
            raise WeightsError(f"{weights} does not hold the weights of {model.name}'s backbone alone: {reason}") from error
    present = {layer.name for layer in model.layers}
    for layer in backbone.layers:
        if layer.weights and prefix + layer.name in present:  # a network that reads middle layers ends before the last ones
            mine = model.get_layer(prefix + layer.name)
            mine.set_weights(layer.get_weights())
            refresh([mine])


def refresh(layers) -> None:
    """After weights were set: Normalization computes with copies of its weights, which are made anew."""
    for layer in layers:
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()
