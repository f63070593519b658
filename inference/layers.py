"""What a network computes inside: any layer's maps, read out of the same ONNX file that scores cells."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from inference.errors import LayerError
from model_zoo import Checkpoint

MAP_KINDS = {
    "Conv2D": "convolution",
    "GroupedConv2D": "convolution",
    "DepthwiseConv2D": "convolution",
    "Activation": "activation",
    "ReLU": "activation",
    "MaxPooling2D": "pooling",
    "AveragePooling2D": "pooling",
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One Keras layer. `shape` is its output without the batch: (h, w, C) or (D,); `role` is "" when it has no maps."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    inputs: tuple[str, ...]
    role: str


class LayerTaps:
    """A checkpoint with every convolution, activation and pooling layer readable.

    Attributes:
        layers: all layers, in order of computation.
        maps: those whose output is a stack of maps larger than 1 x 1.
    """

    def __init__(self, checkpoint: Checkpoint):
        import onnx
        import onnxruntime

        model = onnx.load(str(checkpoint.weights))
        table = json.loads(next(p.value for p in model.metadata_props if p.key == "layers"))
        self.layers = [
            Layer(
                name=row["name"],
                kind=row["kind"],
                shape=tuple(row["shape"]),
                parameters=row["parameters"],
                inputs=tuple(row["inputs"]),
                role=MAP_KINDS.get(row["kind"], "") if len(row["shape"]) == 3 and row["shape"][0] > 1 else "",
            )
            for row in table
        ]
        self.maps = [layer for layer in self.layers if layer.role]
        known = {output.name for output in model.graph.output}
        for layer in self.maps:
            if layer.name not in known:
                model.graph.output.append(onnx.helper.make_tensor_value_info(layer.name, onnx.TensorProto.FLOAT, None))
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def find(self, name: str) -> Layer:
        """A layer that has maps.

        Raises:
            LayerError: the checkpoint has no such layer, or its output is no stack of maps.
        """
        for layer in self.maps:
            if layer.name == name:
                return layer
        raise LayerError(f"Layer {name!r} has no feature maps. Choose a convolution, activation or pooling layer.")

    def feature_maps(self, cells: np.ndarray, name: str) -> np.ndarray:
        """Activations of one layer: uint8 cells (N, S, S, 3) -> float32 (N, h, w, C).

        Of a layer that is given turned copies as well (`QuarterTurns`), those of the cells as they are.

        Raises:
            LayerError: see `find`.
        """
        layer = self.find(name)
        return self._session.run([layer.name], {"cells": cells})[0][: len(cells)].transpose(0, 2, 3, 1)

    def zero_shares(self, cells: np.ndarray) -> list[tuple[Layer, float, float]]:
        """(layer, share of activations that are exactly zero, share at or below zero), in order of computation."""
        outputs = self._session.run([layer.name for layer in self.maps], {"cells": cells})
        return [
            (layer, float((maps == 0).mean()), float((maps <= 0).mean()))
            for layer, maps in zip(self.maps, (maps[: len(cells)] for maps in outputs), strict=True)
        ]


def tile_maps(maps: np.ndarray, *, columns: int, scale: int = 1, gap: int = 1) -> np.ndarray:
    """One grey picture of a stack of maps; each is standardised, x 64 + 128, clipped. Paper 001, Fig. 21.

    Args:
        maps: float (h, w, C).
        columns: maps in a row.
        scale: each activation becomes scale x scale pixels, without smoothing.
        gap: black pixels between tiles.
    Returns:
        uint8 (rows * (h * scale + gap), columns * (w * scale + gap)).
    """
    height, width, channels = maps.shape
    mean, deviation = maps.mean((0, 1)), maps.std((0, 1))
    grey = (maps - mean) / np.where(deviation > 0, deviation, 1) * 64 + 128
    grey = np.where(deviation > 0, np.clip(grey, 0, 255), 0).astype("uint8")  # a map without contrast stays black
    grey = grey.repeat(scale, 0).repeat(scale, 1)
    rows = -(-channels // columns)
    sheet = np.zeros((rows, height * scale + gap, columns, width * scale + gap), "uint8")
    for i in range(channels):
        sheet[i // columns, : height * scale, i % columns, : width * scale] = grey[:, :, i]
    return sheet.reshape(rows * (height * scale + gap), columns * (width * scale + gap))
