"""How cells are divided: into folds and sides by subject, by image or as the official sets are, and into the fits of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.data import CLASSES, Cells
from training.errors import DataError, RecipeError
from training.recipe import Recipe

TRAINING, VALIDATION, TEST, LEFT_OUT = 0, 1, 2, -1  # sides of a split


@dataclass(frozen=True, kw_only=True)
class Part:
    """One fit of a run: which rows train it, choose its epoch, and test it; int arrays of positions in `Cells`."""

    name: str
    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def sides(self, n: int) -> np.ndarray:
        """Side of each of `n` cells, as numbered above."""
        sides = np.full(n, LEFT_OUT)
        for side, rows in ((TRAINING, self.training), (VALIDATION, self.validation), (TEST, self.test)):
            sides[rows] = side
        return sides


def divide(cells: Cells, recipe: Recipe) -> list[Part]:
    """The fits that a recipe's protocol asks for.

    Raises:
        DataError: too few subjects for the folds, or no preliminary test set where the protocol is "official".
    """
    if recipe.protocol == "image_level":
        rows = np.arange(len(cells)) if cells.preliminary is None else np.flatnonzero(~cells.preliminary)
        sides = split_by_image(cells.choose(rows), shares=recipe.shares, seed=recipe.seed)
        training, validation, test = (rows[sides == side] for side in (TRAINING, VALIDATION, TEST))
        return [Part(name="image_level", training=training, validation=validation, test=test)]
    if recipe.protocol == "official":
        sides = split_official(cells)
        training = np.flatnonzero(sides == TRAINING)
        fold_of = split_by_subject(cells.choose(training), folds=recipe.folds, seed=recipe.seed)
        held = training[(fold_of == 0) & recipe.validation]
        rest = np.setdiff1d(training, held)
        return [Part(name="official", training=rest, validation=held, test=np.flatnonzero(sides == TEST))]
    fold_of = split_into_folds(cells, folds=recipe.folds, seed=recipe.seed, by=recipe.folds_by)
    parts = []
    for k in recipe.test_folds or range(recipe.folds):
        test, validation = fold_of == k, (fold_of == (k + 1) % recipe.folds) & recipe.validation
        rows = {"training": ~(test | validation), "validation": validation, "test": test}
        parts.append(Part(name=f"fold_{k}", **{side: np.flatnonzero(where) for side, where in rows.items()}))
    return parts


def all_rows(parts: list[Part]) -> np.ndarray:
    return np.unique(np.concatenate([rows for part in parts for rows in (part.training, part.validation, part.test)]))


def shown_unlabelled(cells: Cells, parts: list[Part], recipe: Recipe) -> np.ndarray:
    """Positions of the cells that a network sees in its lessons: all that ever train it, less the folds of `teach_without`."""
    rows = np.unique(np.concatenate([rows for part in parts for rows in (part.training, part.validation)]))
    if not recipe.teach_without:
        return rows
    fold_of = split_into_folds(cells, folds=recipe.folds, seed=recipe.seed, by=recipe.folds_by)
    return rows[~np.isin(fold_of[rows], recipe.teach_without)]


def thinned(cells: Cells, each: int = 2) -> Cells:
    """At most `each` cells of a class of a subject: enough for a run that shows that everything works."""
    seen, keep = Counter(), []
    for one in zip(cells.subjects.tolist(), cells.y_true.tolist(), strict=True):
        seen[one] += 1
        keep.append(seen[one] <= each)
    return cells.choose(np.array(keep))


def split_into_folds(cells: Cells, *, folds: int, seed: int, by: str) -> np.ndarray:
    """What a recipe's `folds_by` names: "cells" is `split_by_subject`, "chance" `split_by_chance`, "stain" `split_by_stain`."""
    if by == "stain":
        return split_by_stain(cells, folds=folds)
    return (split_by_chance if by == "chance" else split_by_subject)(cells, folds=folds, seed=seed)


def split_by_subject(cells: Cells, *, folds: int, seed: int) -> np.ndarray:
    """Fold number of every cell, int (n,). No group of subjects lies in two folds; folds are as alike in cells as may be.

    Groups with many cells are laid out first and find their place whatever the seed: it moves few. For another division use
    `split_by_chance`.

    Raises:
        DataError: a class has fewer subject groups than folds, or a fold would hold one class only.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    _raise_if_too_few(cells, folds)
    fold_of = np.empty(len(cells), "int64")
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(cells.y_true, cells.y_true, cells.groups)):
        fold_of[held_out] = fold
    return _with_both_classes(cells, folds, fold_of)


def split_by_chance(cells: Cells, *, folds: int, seed: int) -> np.ndarray:
    """Fold number of every cell, int (n,): groups of subjects are drawn, as many of a class for each fold.

    Args:
        seed: of the draw; another seed is another division.
    Raises:
        DataError: a class has fewer subject groups than folds, or a fold would hold one class only.
    """
    names, index = np.unique(cells.groups, return_inverse=True)
    return _deal(cells, folds, np.random.default_rng(seed).random(len(names))[index])


def split_by_stain(cells: Cells, *, folds: int) -> np.ndarray:
    """Fold number of every cell, int (n,): in fold 0 the subjects whose cells are stained darkest, in the last the lightest.

    Each has as many groups of subjects, class by class. With two folds a network is tested on stains it was not trained on.

    Args:
        cells: as `verify_cells` returns them.
    Raises:
        DataError: a class has fewer subject groups than folds, or a fold would hold one class only.
    """
    return _deal(cells, folds, cells.darkness)


def _deal(cells: Cells, folds: int, key: np.ndarray) -> np.ndarray:
    """Lay the groups of each class, from the highest mean of their cells' `key` to the lowest, into equally many a fold."""
    _raise_if_too_few(cells, folds)
    names, index = np.unique(cells.groups, return_inverse=True)
    count = np.bincount(index)
    mean, malignant = (np.bincount(index, weights=x) / count for x in (key, cells.y_true))
    fold_of = np.empty(len(names), "int64")
    for of_class in (malignant >= 0.5, malignant < 0.5):
        highest_first = np.flatnonzero(of_class)[np.argsort(-mean[of_class], kind="stable")]
        for fold, groups in enumerate(np.array_split(highest_first, folds)):
            fold_of[groups] = fold
    return _with_both_classes(cells, folds, fold_of[index])


def _with_both_classes(cells: Cells, folds: int, fold_of: np.ndarray) -> np.ndarray:
    for fold in range(folds):
        if len(set(cells.y_true[fold_of == fold])) < 2:
            raise DataError(
                f"Fold {fold} of {folds} got cells of one class only. Use fewer folds, another seed, or other folds_by."
            )
    return fold_of


def _raise_if_too_few(cells: Cells, folds: int) -> None:
    for value, label in CLASSES:
        n = len(set(cells.groups[cells.y_true == value]))
        if n < folds:
            way_out = (
                f"Use at most {n} folds" if n > 1 else 'Choose protocol = "image_level", which says nothing on unseen persons'
            )
            raise DataError(
                f"{folds} folds need at least {folds} groups of {label} subjects. Received: {n}. {way_out}, or add subjects."
            )


def split_by_image(cells: Cells, *, shares: Sequence[float], seed: int) -> np.ndarray:
    """Side of every cell, int (n,), drawn within each class: cells of one subject come to lie on both sides.

    Args:
        shares: of TRAINING, VALIDATION and TEST, each in [0, 1], with sum 1.
        seed: of the draw.
    Raises:
        RecipeError: shares that are none.
        DataError: a class has too few cells for its shares.
    """
    if len(shares) != 3 or min(shares) < 0 or not np.isclose(sum(shares), 1):
        raise RecipeError(f"shares must be three numbers from 0 on with sum 1. Received: {list(shares)}")
    sides, rng = np.empty(len(cells), "int64"), np.random.default_rng(seed)
    for value, label in CLASSES:
        rows = rng.permutation(np.flatnonzero(cells.y_true == value))
        ends = np.rint(np.cumsum(shares) * len(rows)).astype(int)
        for side, part in enumerate(np.split(rows, ends[:-1])):
            if shares[side] and not len(part):
                raise DataError(f"{len(rows)} {label} cells are too few for shares of {list(shares)}. Add cells.")
            sides[part] = side
    return sides


def split_official(cells: Cells) -> np.ndarray:
    """Side of every cell, int (n,): TRAINING for the training folds, TEST for the preliminary test set.

    The test set stays whole, as in published figures. Training subjects in a group with a test subject are LEFT_OUT.

    Raises:
        DataError: no preliminary test set, or a side without one of the classes.
    """
    if cells.preliminary is None or not cells.preliminary.any():
        raise DataError(
            "The official split needs the preliminary test set: C-NMC_test_prelim_phase_data and, beside it, "
            "C-NMC_test_prelim_phase_data_labels.csv. Add both to the data folder, or train a recipe by subject."
        )
    shared = np.isin(cells.groups, cells.groups[cells.preliminary])
    sides = np.where(cells.preliminary, TEST, np.where(shared, LEFT_OUT, TRAINING))
    for side, what in ((TRAINING, "training folds"), (TEST, "preliminary test set")):
        for value, label in CLASSES:
            if not ((sides == side) & (cells.y_true == value)).any():
                raise DataError(f"The {what} hold no {label} cells of subjects of their own. Check the data folder.")
    return sides


def check_sides(cells: Cells, sides: np.ndarray) -> None:
    """Make sure that no group of subjects lies on two sides of a split (int (n,); LEFT_OUT is none).

    Raises:
        DataError: names the group.
    """
    for group in sorted(set(cells.groups)):
        lies_on = set(sides[cells.groups == group].tolist()) - {LEFT_OUT}
        if len(lies_on) > 1:
            raise DataError(
                f"Subjects {group.replace('+', ', ')} share pictures but lie on both sides of the split. Keep them together."
            )
