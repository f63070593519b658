"""Fast inference of one checkpoint on onnxruntime, without TensorFlow. Why this runtime: docs/decisions/0002."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from model_zoo import Checkpoint

WORKERS = os.cpu_count() or 1


class Engine:
    """A loaded checkpoint. Safe for many threads at once; each call runs on one core.

    One core a call and one call a core beats one call over all cores (benchmarks/runtimes.py): cells are
    independent, so nothing waits for anything.
    """

    def __init__(self, checkpoint: Checkpoint):
        import onnxruntime

        self.card = checkpoint.card
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(checkpoint.weights), options, providers=["CPUExecutionProvider"])

    def predict(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probability of ALL and embedding of framed cells.

        Args:
            cells: uint8 (N, S, S, 3), from `frame_cell` with this checkpoint's framing.
        Returns:
            p_all float32 (N,), calibrated by the card's temperature; embedding float32 (N, D).
        Raises:
            ValueError: another type or shape.
        """
        size = self.card.framing.size
        if cells.dtype != np.uint8 or cells.shape[1:] != (size, size, 3):
            raise ValueError(f"cells must be uint8 (N, {size}, {size}, 3). Received: {cells.dtype} {cells.shape}")
        if len(cells) <= 1:
            parts = [self._run(cells)]
        else:
            with ThreadPoolExecutor(WORKERS) as pool:
                parts = list(pool.map(self._run, (cells[i : i + 1] for i in range(len(cells)))))
        logit, embedding = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return self.calibrate(logit[:, 0]), embedding

    def call(self, p_all: float) -> str:
        """ "ALL" or "HEM" at the card's operating point."""
        return "ALL" if p_all >= self.card.threshold else "HEM"

    def calibrate(self, logit: np.ndarray) -> np.ndarray:
        """sigmoid(logit / temperature), float32."""
        return (1 / (1 + np.exp(-np.clip(logit.astype("float64") / self.card.temperature, -60, 60)))).astype("float32")

    def _run(self, cells: np.ndarray) -> list[np.ndarray]:
        return self._session.run(["logit", "embedding"], {"cells": cells})
