"""Where a network looked: Grad-CAM. Gradients need Keras on TensorFlow, so only this module loads it (seconds)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np
from PIL import Image

from inference.cells import probability
from inference.images import resize_cells
from model_zoo import Checkpoint

# inferno, sampled (van der Walt & Smith 2015): ordered in lightness, readable with any colour vision
_INFERNO = np.array(
    [
        (0, 0, 4),
        (31, 12, 72),
        (85, 15, 109),
        (136, 34, 106),
        (186, 54, 85),
        (227, 89, 51),
        (249, 140, 10),
        (249, 201, 50),
        (252, 255, 164),
    ]
)


def grad_cam(model, layer: str) -> Callable[..., np.ndarray]:
    """Compile `(cells (N, S, S, 3), label="ALL") -> cam (N, h, w)`, float32, >= 0, unnormalised.

    The map of what speaks for a label: gradient of the logit for "ALL", of its negative for "HEM"; not of the
    probability, for a saturated sigmoid has none. Source: Selvaraju et al. 2017, arXiv:1610.02391. Where the layer is given
    turned copies of the cells (`QuarterTurns`), the sum of their maps, turned back.

    Args:
        model: a flat Keras model with a layer `logit`.
        layer: name of a 4-D layer.
    """
    import keras
    import tensorflow as tf

    tapped = keras.Model(model.inputs, [model.get_layer(layer).output, model.get_layer("logit").output])

    @tf.function(reduce_retracing=True)
    def run(cells, sign):
        with tf.GradientTape() as tape:
            activation, logit = tapped(cells, training=False)
        weight = tf.reduce_mean(sign * tape.gradient(logit, activation), axis=(1, 2), keepdims=True)
        return tf.reduce_sum(weight * activation, axis=-1)

    def cam(cells: np.ndarray, label: str = "ALL") -> np.ndarray:
        sign = {"ALL": 1.0, "HEM": -1.0}[label]
        maps = run(tf.constant(cells, tf.float32), tf.constant(sign)).numpy()
        if len(maps) > len(cells):
            turned = maps.reshape(4, -1, len(cells), *maps.shape[1:])
            maps = sum(np.rot90(turned[turns], -turns, axes=(2, 3)).sum(0) for turns in range(4))
        return np.maximum(maps, 0)

    return cam


def size_share(model) -> Callable[[np.ndarray], np.ndarray]:
    """`cells (N, S, S, 3) -> (N,)`: what a cell's size adds to the logit, beside a cell of the training cells' mean log size.

    Exact: one logit on normalised features is a sum over them. 0 for a network that does not read size as a feature of its own.
    """
    import keras

    if "log_size" not in {layer.name for layer in model.layers}:
        return lambda cells: np.zeros(len(cells), "float32")
    kinds = model.get_layer("features").input
    column = sum(kind.shape[-1] for kind in kinds[: [kind._keras_history.operation.name for kind in kinds].index("size")])
    embedding, (kernel, _) = model.get_layer("embedding"), model.get_layer("logit").get_weights()
    mean, variance = (keras.ops.convert_to_numpy(v)[column] for v in (embedding.moving_mean, embedding.moving_variance))
    log_size = keras.Model(model.inputs, model.get_layer("log_size").output)

    def share(cells: np.ndarray) -> np.ndarray:
        found = keras.ops.convert_to_numpy(log_size(cells.astype("float32")))[:, 0]
        return (found - mean) / np.sqrt(variance + embedding.epsilon) * kernel[column, 0]

    return share


class Explainer:
    """A checkpoint's Grad-CAM at its first cam layer; an ensemble's is the mean of its members'. One thread at a time.

    Attributes:
        layers: the layer that is looked at, of each network.
    """

    def __init__(self, checkpoint: Checkpoint):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        import model_zoo

        # one cell needs no GPU, and TensorFlow would take all of its memory from a training run
        tf.config.set_visible_devices([], "GPU")
        cards = [network.card for network in checkpoint.networks]
        self.layers = [model_zoo.find_architecture(card.architecture).cam_layers[0] for card in cards]
        self._sizes = [card.framing.size for card in cards]
        models = [network.keras_model() for network in checkpoint.networks]
        self._cams = [grad_cam(model, layer) for model, layer in zip(models, self.layers, strict=True)]
        self._shares, self._temperature = [size_share(model) for model in models], checkpoint.card.temperature
        self._lock = threading.Lock()
        size = checkpoint.card.framing.size
        self.cam(np.zeros((1, size, size, 3), "uint8"))  # trace now, not when the first cell waits

    def cam(self, cells: np.ndarray, label: str = "ALL") -> np.ndarray:
        """What speaks for `label`: uint8 (N, S, S, 3) -> float32 (N, h, w), >= 0."""
        with self._lock:
            maps = [cam(resize_cells(cells, size), label) for cam, size in zip(self._cams, self._sizes, strict=True)]
        return maps[0] if len(maps) == 1 else average_cams(maps)

    def size_share(self, cells: np.ndarray) -> np.ndarray:
        """What size adds to the log-odds of ALL: uint8 (N, S, S, 3) -> (N,); an ensemble's mean. No map shows it."""
        with self._lock:
            found = [share(resize_cells(cells, size)) for share, size in zip(self._shares, self._sizes, strict=True)]
        return np.mean(found, axis=0) / self._temperature


def average_cams(maps: list[np.ndarray]) -> np.ndarray:
    """Mean of the maps of several networks, float (N, h, w) each, on the finest of their grids.

    A place of a coarse map stands for more of the window: values are taken per area before they are averaged.
    """
    finest = max(cams.shape[1:] for cams in maps)
    total = np.zeros((len(maps[0]), *finest), "float32")
    for cams in maps:
        for i, cam in enumerate(cams):
            enlarged = Image.fromarray(cam.astype("float32")).resize(finest[::-1], Image.Resampling.BILINEAR)
            total[i] += np.asarray(enlarged) * cam.size
    return total / len(maps)


def colorize(values: np.ndarray) -> np.ndarray:
    """float (H, W) in 0..1 -> uint8 (H, W, 3) on the inferno scale."""
    stops = np.linspace(0, 1, len(_INFERNO))
    return np.stack([np.interp(values, stops, channel) for channel in _INFERNO.T], -1).astype("uint8")


def overlay_cam(image: np.ndarray, cam: np.ndarray, opacity: float) -> np.ndarray:
    """Lay a map over the cell it explains.

    Args:
        image: uint8 (H, W, 3), the framed window the network saw.
        cam: float (h, w), >= 0, of the whole window; scaled by its own maximum.
        opacity: 0 shows the cell alone, 1 the map alone.
    Returns:
        uint8 (H, W, 3).
    """
    peak = cam.max()
    scaled = Image.fromarray((cam / peak if peak > 0 else cam).astype("float32"))
    scaled = np.clip(np.asarray(scaled.resize(image.shape[1::-1], Image.Resampling.BILINEAR)), 0, 1)
    return np.rint(image * (1 - opacity) + colorize(scaled) * opacity).astype("uint8")


def describe_cam(cam: np.ndarray, mask: np.ndarray, label: str) -> str:
    """One sentence on where the map lies: cam (h, w) >= 0 and bool mask (H, W) of the same window."""
    if cam.max() <= 0:
        return f"The map is empty: at this layer nothing in the window speaks for {label}."
    inside = Image.fromarray((mask * 255).astype("uint8")).resize(cam.shape[::-1], Image.Resampling.BOX)
    share = float((cam * (np.asarray(inside) / 255)).sum() / cam.sum())
    if share >= 0.7:
        return f"{share:.0%} of the map lies on the cell."
    return f"Only {share:.0%} of the map lies on the cell; the rest is background, so read it with caution."


def describe_size(share: float, p_all: float) -> str:
    """One sentence on what size adds; "" where it adds nothing. share: of the log-odds of `p_all`."""
    if share == 0:
        return ""
    odds = p_all / max(1 - p_all, 1e-6) * np.exp(-share)
    told, without = probability(p_all), probability(odds / (1 + odds))
    if told == without:
        return "The cell's size, which no map shows, hardly changes P(ALL)."
    speaks_for = "ALL" if share > 0 else "HEM"
    size = f"The cell's size, which no map shows, speaks for {speaks_for}"
    return f"{size}: of average size, P(ALL) would be {without} instead of {told}."
