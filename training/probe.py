"""The last layer as penalised logistic regressions on what the layers before it give, fitted in one step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

import keras
import numpy as np

from training.augment import augmentation
from training.data import Cells
from training.draws import Draws
from training.errors import RecipeError, halt
from training.recipe import Recipe

CHANGED = 1600  # training cells that are imaged otherwise to show a probe what to shun


def fit_probe(network, recipe: Recipe, packed, cells: Cells, rows, report, batch_size: int) -> None:
    """Set the last layer to the logistic regression on the training cells' embeddings, each class and subject weighed as drawn.

    An embedding that is a batch norm takes over the embeddings' statistics, so that all features count alike. Where it
    joins several kinds of features, the last layer is the mean of one regression for each kind.
    """
    from sklearn.linear_model import LogisticRegression

    embedding, last = network.get_layer("embedding"), network.get_layer("logit")
    if not last.weights:
        raise RecipeError(f"{recipe.architecture} ends in two units, which no regression can set: leave probe out.")
    normalised = isinstance(embedding, keras.layers.BatchNormalization)
    features_of = keras.Model(network.inputs, embedding.input if normalised else embedding.output)
    started = time.time()
    same, features = report.untouched or ("", None)
    if (weights := _digest(features_of)) != same:  # mostly every fold starts from one network: its features are computed once
        report.untouched = features = None  # room for the others
        features = _features(features_of, packed, np.arange(len(packed)), batch_size, report)
        report.untouched = weights, features
    width, changes = features.shape[1], None
    if recipe.probe_imaging:
        few = np.sort(np.random.default_rng(recipe.seed).permutation(rows)[:CHANGED])
        # turned as well, cells would differ by what hides the imaging: measured, docs/decisions/0013
        imaging = augmentation(replace(recipe, flip="", rotate=0, quarter_turns=False, shift=0))
        changes = _features(features_of, packed, few, batch_size, report, imaging) - features[few]
    shift, variance, kernel, bias, iterations = *np.zeros((3, width), "float32"), 0.0, []
    chance = Draws(replace(recipe, sampling="subjects"), packed, cells, rows).chance
    y_true, subjects = cells.y_true[rows], cells.subjects[rows]
    for part in (parts := _kinds_of_features(embedding)):
        columns, scale = features[rows, part], np.float32(1)  # the one copy: with many cells these are gigabytes
        if normalised:
            shift[part] = columns.mean(0)
            columns -= shift[part]
            variance[part] = np.einsum("ij,ij->j", columns, columns) / len(columns)
            scale = np.sqrt(variance[part] + embedding.epsilon)
            columns /= scale
        shunned = [recipe.probe_persons**0.5 * _between_persons(columns, y_true, subjects)]
        if changes is not None:
            shunned.append((recipe.probe_imaging / len(changes)) ** 0.5 * changes[:, part] / scale)
        shrink = _shrinking(np.concatenate(shunned))
        for i in range(0, len(columns), 512):
            columns[i : i + 512] = shrink(columns[i : i + 512])
        model = LogisticRegression(C=recipe.probe, max_iter=100).fit(columns, y_true, sample_weight=chance * len(rows))
        kernel[part] = shrink(model.coef_)[0] / len(parts)  # for features as they come
        bias += model.intercept_[0] / len(parts)
        iterations.append(int(model.n_iter_[0]))
    if normalised:
        embedding.moving_mean.assign(shift)
        embedding.moving_variance.assign(variance)
    last.set_weights([kernel[:, None], np.array([bias], "float32")])
    took = f"{iterations} iterations, {time.time() - started:.0f} s"
    report.log(f"probe: {width} features of {len(rows)} cells, {took}")


def _features(features_of, packed, rows, batch_size: int, report, augment=()) -> np.ndarray:
    """(n, D) of the cells, each drawn once by `augment`'s layers."""
    found = np.empty((len(rows), features_of.output.shape[-1]), "float32")
    for i in range(0, len(rows), batch_size):
        halt(report)
        batch = packed[rows[i : i + batch_size]]
        for layer in augment:
            batch = layer(batch, training=True)
        batch = keras.ops.convert_to_numpy(batch).astype("float32")
        found[i : i + batch_size] = keras.ops.convert_to_numpy(features_of.predict_on_batch(batch))
    return found


def _digest(network) -> str:
    """Of its weights: folds differ where a standardisation is set, a head trained or a network grown for each."""
    digest = hashlib.blake2b(digest_size=16)
    for weight in network.get_weights():
        digest.update(weight.tobytes())
    return digest.hexdigest()


def _kinds_of_features(embedding) -> list[slice]:
    """The columns of each tensor that were joined into what the embedding normalises; else all columns are one kind.

    A regression for each kind, averaged, errs less than one for all: they err apart.
    """
    before = embedding.input._keras_history.operation
    apart = isinstance(embedding, keras.layers.BatchNormalization) and isinstance(before, keras.layers.Concatenate)
    joined = before.input if apart else [embedding.output]
    ends = np.cumsum([tensor.shape[-1] for tensor in joined])
    return [slice(end - tensor.shape[-1], end) for end, tensor in zip(ends, joined, strict=True)]


def _between_persons(features, y_true, subjects) -> np.ndarray:
    """(persons, D): where each lies from the mean of its class, divided by the root of their number.

    The rows' squares add up to the variance between persons: within-class covariance normalisation, Hatch et al. 2006
    (Interspeech), there of speakers.
    """
    names, index, counts = np.unique(subjects, return_inverse=True, return_counts=True)
    means = np.stack([features[index == i].mean(0) for i in range(len(names))])
    classes = np.array([y_true[index == i][0] for i in range(len(names))])
    for value in (0, 1):
        of = classes == value
        means[of] -= np.average(means[of], axis=0, weights=counts[of] ** 0.5)
    return means * np.sqrt(counts / (counts + 10) / len(names))[:, None]  # a mean of few cells is mostly noise


def _shrinking(shunned: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """How features (n, D) are shrunk along what the rows `shunned` (m, D) differ by, before a penalised regression.

    A direction in which they vary by v is scaled by 1 / sqrt(1 + v): it then costs more to use. Of what other
    imaging changes: nuisance attribute projection, Solomonoff et al. 2005 (ICASSP), softened.
    """
    shunned = shunned.astype("float64")
    variances, vectors = np.linalg.eigh(shunned @ shunned.T)  # far fewer rows than features
    kept = variances > 1e-3  # the rest would be shrunk by less than a thousandth
    directions = ((vectors[:, kept] / np.sqrt(variances[kept])).T @ shunned).astype("float32")
    factors = (1 / np.sqrt(1 + variances[kept]) - 1).astype("float32")
    return lambda features: features + (features @ directions.T * factors) @ directions
