"""Which cells a batch holds: an epoch's draws, the same whenever a run goes on."""

from __future__ import annotations

import keras
import numpy as np

from training.data import Cells
from training.recipe import Recipe


class Draws(keras.utils.PyDataset):
    """Batches of an epoch, uint8 (B, S, S, 3): a function of seed, epoch and index alone, so that a resumed run draws alike."""

    def __init__(self, recipe: Recipe, packed: np.ndarray, cells: Cells, rows: np.ndarray, batch_size: int | None = None):
        super().__init__(workers=1, max_queue_size=8)  # with two, batches change places now and then
        self.recipe, self.packed, self.y, self.epoch = recipe, packed, cells.y_true, 0
        self.batch_size = batch_size or recipe.batch_size
        of_class = [rows[cells.y_true[rows] == value] for value in (0, 1)]
        self.positive_weight = len(of_class[0]) / max(len(of_class[1]), 1) if recipe.class_weight else 1.0
        if recipe.sampling == "undersampled":
            fewest = min(map(len, of_class))
            rng = np.random.default_rng(recipe.seed)
            rows = np.sort(np.concatenate([rng.choice(of, fewest, replace=False) for of in of_class]))
        self.rows = rows
        _, index, counts = np.unique(cells.subjects[rows], return_inverse=True, return_counts=True)
        weight = counts[index].astype(float) ** (recipe.subject_power - 1)
        self.chance = np.zeros(len(rows))
        for value in (0, 1):
            of_class = self.y[rows] == value
            self.chance[of_class] = weight[of_class] / weight[of_class].sum() / 2
        self.draws = recipe.draws_per_epoch or len(rows)

    def __len__(self) -> int:
        return max(1, self.draws // self.batch_size)

    def __getitem__(self, index: int):
        rows = self._rows(index)
        y_true = self.y[rows, None].astype("float32")
        if self.recipe.teach_epochs:  # nothing but the gap to the teacher
            return self._cells(rows), np.zeros_like(y_true)
        target = {"logit": y_true, "gap": np.zeros_like(y_true)} if self.recipe.teacher else y_true
        if not self.recipe.class_weight:
            return self._cells(rows), target
        weight = np.where(y_true[:, 0] == 1, self.positive_weight, 1).astype("float32")
        return self._cells(rows), target, {"logit": weight, "gap": np.ones_like(weight)} if self.recipe.teacher else weight

    def _cells(self, rows: np.ndarray):
        return self.packed[rows] if isinstance(self.packed, np.ndarray) else keras.ops.take(self.packed, rows, axis=0)

    def _rows(self, index: int) -> np.ndarray:
        if self.recipe.sampling == "subjects":
            rng = np.random.default_rng([self.recipe.seed, self.epoch, index])
            return np.sort(rng.choice(self.rows, self.batch_size, p=self.chance))
        order = np.random.default_rng([self.recipe.seed, self.epoch]).permutation(self.rows)
        return np.sort(np.resize(order, self.draws)[index * self.batch_size : (index + 1) * self.batch_size])
