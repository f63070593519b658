"""Fast inference of one checkpoint on onnxruntime, without TensorFlow. Why this runtime: docs/decisions/0002."""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from inference.images import resize_cells, rotate_cells
from model_zoo import Checkpoint

ROTATIONS = (1, 8)
WORKERS = os.cpu_count() or 1


class Engine:
    """A loaded checkpoint. Safe for many threads at once; each call runs on one core.

    One core a call and one call a core beats one call over all cores (benchmarks/runtimes.py): cells are
    independent, so nothing waits for anything.

    Attributes:
        card: of the checkpoint.
        trained_on: as of the checkpoint.
        rotations: number of views of a cell, 360 / rotations degrees apart, whose logits are averaged, and only then
            calibrated: 1, or 8 as in Prellberg & Kramer 2019 (paper 002). Those the card was measured with, unless
            told otherwise. Eight take eight times as long.
    """

    def __init__(self, checkpoint: Checkpoint, *, rotations: int | None = None):
        import onnxruntime

        self.card, self.trained_on = checkpoint.card, checkpoint.trained_on
        self.rotations = _check_rotations(self.card.rotations if rotations is None else rotations)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._networks = [
            (
                network.card.framing.size,
                onnxruntime.InferenceSession(str(network.weights), options, providers=["CPUExecutionProvider"]),
            )
            for network in checkpoint.networks
        ]

    def over(self, rotations: int) -> Engine:
        """This engine over another number of rotations; both share the loaded network. Raises ValueError."""
        other = copy.copy(self)
        other.rotations = _check_rotations(rotations)
        return other

    @property
    def remark(self) -> str:
        """A sentence where the card's figures were measured with other rotations than these; else empty."""
        if self.rotations == self.card.rotations:
            return ""
        ways = {1: "without rotations", 8: "averaged over 8 rotations"}
        return f"P(ALL) {ways[self.rotations]}; the figures on the network's card were measured {ways[self.card.rotations]}"

    def predict(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probability of ALL and embedding of framed cells.

        Args:
            cells: uint8 (N, S, S, 3), from `frame_cell` with this checkpoint's framing.
        Returns:
            p_all float32 (N,), calibrated by the card's temperature; embedding float32 (N, D), an ensemble's those of its
            members side by side. Both of the mean over the rotations; an ensemble's logit is the mean of its members'.
        Raises:
            ValueError: another type or shape.
        """
        size = self.card.framing.size
        if cells.dtype != np.uint8 or cells.shape[1:] != (size, size, 3):
            raise ValueError(f"cells must be uint8 (N, {size}, {size}, 3). Received: {cells.dtype} {cells.shape}")
        if len(cells) <= 1:
            parts = [self._read(cells)]
        else:
            with ThreadPoolExecutor(WORKERS) as pool:
                parts = list(pool.map(self._read, (cells[i : i + 1] for i in range(len(cells)))))
        logit, embedding = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return self.calibrate(logit[:, 0]), embedding

    def call(self, p_all: float) -> str:
        """ "ALL" or "HEM" at the card's operating point."""
        return "ALL" if p_all >= self.card.threshold else "HEM"

    def calibrate(self, logit: np.ndarray) -> np.ndarray:
        """sigmoid(logit / temperature), float32."""
        return (1 / (1 + np.exp(-np.clip(logit.astype("float64") / self.card.temperature, -60, 60)))).astype("float32")

    def _read(self, cells: np.ndarray) -> list[np.ndarray]:
        if self.rotations == 1:
            return self._run(cells)
        views = (self._run(rotate_cells(cells, turns)) for turns in range(0, 8, 8 // self.rotations))
        return [np.mean(arrays, axis=0) for arrays in zip(*views, strict=True)]

    def _run(self, cells: np.ndarray) -> list[np.ndarray]:
        found = []
        for size, session in self._networks:
            found.append(session.run(["logit", "embedding"], {"cells": resize_cells(cells, size)}))
        logits, embeddings = zip(*found, strict=True)
        return [np.mean(logits, axis=0), np.concatenate(embeddings, axis=1)]


def _check_rotations(rotations: int) -> int:
    if rotations not in ROTATIONS:
        raise ValueError(f"rotations must be one of {ROTATIONS}. Received: {rotations!r}")
    return rotations
