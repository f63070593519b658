"""Figures on held-out cells, each with a 95% interval by subject bootstrap.

What is drawn again are groups of subjects, as in a split: those that share pictures are one group, for they may be one person.
"""

from __future__ import annotations

import numpy as np

ECE_BINS = 15
PAIRED = ("auroc", "accuracy", "weighted_f1")  # of `paired_difference`
_GRID = 801  # logits among which the operating point is sought


def sigmoid(logit):
    with np.errstate(over="ignore"):  # 1 / inf is the 0 that it is
        return 1 / (1 + np.exp(-logit))


def auroc(y_true, y_score) -> float:
    """Probability that a random ALL cell scores above a random HEM cell (ties count half); NaN with one class."""
    from scipy.stats import rankdata

    y_true, ranks = np.asarray(y_true), rankdata(y_score)
    positive = int(y_true.sum())
    negative = len(y_true) - positive
    if not positive or not negative:
        return float("nan")
    return float((ranks[y_true == 1].sum() - positive * (positive + 1) / 2) / (positive * negative))


def roc_points(y_true, y_score) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every distinct score, falling; both float, from 0 to 1."""
    y_true, y_score = np.asarray(y_true), np.asarray(y_score)
    order = np.argsort(-y_score, kind="stable")
    last = np.r_[np.diff(y_score[order]) != 0, True]  # tied scores are one point
    positive, negative = np.cumsum(y_true[order])[last], np.cumsum(1 - y_true[order])[last]
    return np.r_[0, negative / max(negative[-1], 1)], np.r_[0, positive / max(positive[-1], 1)]


def cell_metrics(y_true, p_all, threshold) -> dict[str, float]:
    """Figures at one operating point, or at one for each cell; y_true int (n,), p_all float (n,) calibrated.

    "weighted": the classes' figures averaged by their numbers of cells. "ece": mean gap between predicted and observed
    frequency of ALL over equal-width bins (Naeini et al. 2015). NaN where a class is absent.
    """
    once = np.ones((1, 1)), np.zeros(len(y_true), int)  # all cells as one subject's, drawn once
    figures = _of_draws(*once, np.asarray(y_true), np.asarray(p_all, float), threshold)
    return {name: float(value[0]) for name, value in figures.items()}


def bootstrap_metrics(y_true, p_all, subjects, groups, threshold, *, draws: int = 2000) -> dict[str, list[float]]:
    """`cell_metrics` and `subject_accuracy` as [estimate, low, high], 95%, over groups of subjects drawn again.

    ALL and HEM groups are drawn apart, with replacement, so that every draw holds both classes (a group of both, which is
    drawn apart as well, excepted). `subject_accuracy` is the mean over subjects of the share of their cells called right
    (paper 002, Fig. 3).

    Args:
        y_true: int (n,). p_all: float (n,), calibrated. subjects, groups: str (n,), as of `training.data.Cells`.
        threshold: operating point, a number or float (n,).
    """
    y_true, p_all = np.asarray(y_true), np.asarray(p_all, float)
    index, times, ends = _draw(y_true, groups, draws)
    figures = _of_draws(times, index, y_true, p_all, threshold)
    _, first, subject = np.unique(subjects, return_index=True, return_inverse=True)
    right = np.bincount(subject, (p_all >= threshold) == (y_true == 1)) / np.bincount(subject)
    mine = np.zeros((times.shape[1], len(first)))  # which subjects are a group's
    mine[index[first], np.arange(len(first))] = 1
    return _with_intervals(figures | {"subject_accuracy": times @ (mine @ right) / (times @ mine.sum(1))}, ends, least=0)


def _with_intervals(figures: dict[str, np.ndarray], ends: list[float] | None, *, least: float) -> dict[str, list[float]]:
    """[estimate, low, high] of figures of the cells as they are, then of every draw; NaN where the cells give none, and from
    `least` to 1, all that a figure may be, where there are no ends."""

    def interval(values) -> list[float]:
        if not np.isfinite(values[0]):
            return [np.nan, np.nan]
        return list(np.nanpercentile(values[1:], ends)) if ends else [least, 1]

    return {name: [round(float(v), 4) for v in (values[0], *interval(values))] for name, values in figures.items()}


def fit_temperature(y_true, logit) -> float:
    """The T > 0 that minimises the cross-entropy of sigmoid(logit / T). Guo et al. 2017, arXiv:1706.04599."""
    from scipy.optimize import minimize_scalar

    y_true, logit = np.asarray(y_true, float), np.asarray(logit, float)

    def loss(log_t):
        z = logit / np.exp(log_t)
        return np.mean(np.logaddexp(0, z) - y_true * z)

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.1), np.log(20)), method="bounded").x))


def youden_threshold(y_true, logit, subjects) -> float:
    """The logit with the largest sensitivity + specificity, both smoothed by a normal kernel. Youden 1950.

    Their plain sum is a ragged line of 50 persons' steps whose highest tooth lies elsewhere for any other 50; a kernel
    estimate errs less (Fluss, Faraggi & Reiser 2005, Biometrical Journal 47). A subject weighs as the root of its cells:
    alike would give ten cells the say of four hundred.

    Args:
        y_true: int (n,). logit: float (n,). subjects: str (n,).
    Returns:
        the logit; 0 where a class is absent.
    """
    from scipy.special import ndtr

    y_true, logit, subjects = np.asarray(y_true), np.asarray(logit, float), np.asarray(subjects)
    if y_true.min() == y_true.max():
        return 0.0
    grid = np.linspace(logit.min(), logit.max(), _GRID)
    below = []
    for value in (0, 1):
        z = logit[y_true == value]
        _, index, counts = np.unique(subjects[y_true == value], return_inverse=True, return_counts=True)
        weight = counts[index] ** -0.5
        weight /= weight.sum()
        deviation = np.sqrt(weight @ (z - weight @ z) ** 2)
        # Silverman's width (1986) for as many draws as there are persons: cells of one are alike
        width = max(0.9 * deviation * len(counts) ** -0.2, (grid[1] - grid[0]) / 2, 1e-9)
        below.append(np.array([weight @ ndtr((at - z) / width) for at in grid]))
    gain = below[0] - below[1]
    return float(grid[np.flatnonzero(gain >= gain.max() - 1e-9)].mean())  # the middle, where classes lie apart


def paired_difference(y_true, p_a, p_b, groups, *, thresholds=(0.5, 0.5), draws: int = 2000) -> dict[str, list[float]]:
    """How much better b is than a on the same cells: [b - a, low, high], 95% by paired bootstrap over groups of subjects.

    Each draw takes groups with replacement, ALL and HEM apart, and measures both on them. Efron & Tibshirani 1993.

    Args:
        y_true: int (n,), both classes. p_a, p_b: float (n,). groups: str (n,), as in `bootstrap_metrics`.
        thresholds: operating points of a and b, each a number or float (n,).
    Returns:
        of each of PAIRED.
    """
    y_true = np.asarray(y_true)
    index, times, ends = _draw(y_true, groups, draws)
    found = [_of_draws(times, index, y_true, np.asarray(p), t) for p, t in zip((p_a, p_b), thresholds, strict=True)]
    return _with_intervals({name: found[1][name] - found[0][name] for name in PAIRED}, ends, least=-1)


def _draw(y_true: np.ndarray, groups, draws: int) -> tuple[np.ndarray, np.ndarray, list[float] | None]:
    """Groups of each class drawn with replacement.

    Returns:
        each cell's group (n,); how often every draw took each group (draws + 1, G), row 0 each once; the two percentiles of
        the draws between which a 95% interval lies, None where a class has one group: nothing tells how much persons differ.
    """
    names, index = np.unique(groups, return_inverse=True)
    kind = np.array([y_true[index == i][0] for i in range(len(names))])
    classes = [of for value in (1, 0) if len(of := np.flatnonzero(kind == value))]
    rng, times = np.random.default_rng(0), np.ones((draws + 1, len(names)))
    for of in classes:
        times[1:, of] = rng.multinomial(len(of), np.full(len(of), 1 / len(of)), draws)
    cells = np.bincount(index).astype(float)
    effective = min(cells[of].sum() ** 2 / (cells[of] ** 2).sum() for of in classes)
    return index, times, _ends(effective) if min(map(len, classes)) > 1 else None


def _ends(n: float) -> list[float]:
    """Percentiles for a 95% interval from n groups of the scarcer class; for many 2.5 and 97.5.

    Those of few groups' draws lie too near: they lack n / (n - 1) of the variance, and Student's wider tails. Hesterberg
    2015, American Statistician 69:371-386, "expanded percentile". Groups of unlike size count as fewer: n is Kish's (1965)
    effective number, the square of the sum of their cells by the sum of the squares.
    """
    from scipy.stats import norm, t

    low = 100 * float(norm.cdf(-np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1)))
    return [low, 100 - low]


def reliability(y_true, p_all, groups, *, draws: int = 2000) -> list[dict[str, float]]:
    """What a P(ALL) was worth: the share of ALL among cells of about the same P(ALL), in ten equal-width bins.

    Returns:
        for each bin that holds cells: `p_all`, their mean; `share` that is ALL, with `low` and `high`, 95% by subject
        bootstrap as in `bootstrap_metrics`; `n` cells.
    """
    y_true, p_all = np.asarray(y_true), np.asarray(p_all, float)
    bins = 10
    index, times, ends = _draw(y_true, groups, draws)
    place = np.minimum((p_all * bins).astype(int), bins - 1)
    cell = index * bins + place

    def of_draws(weights):
        return times @ np.bincount(cell, weights, minlength=times.shape[1] * bins).reshape(-1, bins)

    n, positive, mass = (of_draws(w) for w in (np.ones(len(y_true)), y_true.astype(float), p_all))
    with np.errstate(invalid="ignore"):
        share = positive / n  # NaN in a draw that took no cell of this bin
    rows = []
    for b in np.flatnonzero(n[0]):
        low, high = np.nanpercentile(share[:, b], ends) if ends else (0, 1)
        row = {"p_all": mass[0, b] / n[0, b], "share": share[0, b], "low": low, "high": high}
        rows.append({name: float(value) for name, value in row.items()} | {"n": int(n[0, b])})
    return rows


def _of_draws(times, index, y_true, p_all, threshold) -> dict[str, np.ndarray]:
    """Figures of every draw, from sums by group: `times` (draws, G); each figure (draws,)."""
    positive, called, size = y_true == 1, p_all >= threshold, times.shape[1]

    def total(values):
        """Of every draw, from a number for each cell."""
        return times @ np.bincount(index, values, minlength=size)

    wins = np.zeros((size, size))  # over ALL cells of one group and HEM cells of another: which scores higher
    for other in range(size):
        scores = np.sort(p_all[(index == other) & ~positive])
        rank = (np.searchsorted(scores, p_all[positive], "left") + np.searchsorted(scores, p_all[positive], "right")) / 2
        wins[:, other] = np.bincount(index[positive], rank, minlength=size)
    tp, fn, fp, tn = map(total, (positive & called, positive & ~called, ~positive & called, ~positive & ~called))
    n_all, n_hem = tp + fn, fp + tn
    n = n_all + n_hem
    place = index * ECE_BINS + np.minimum((p_all * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = times @ np.bincount(place, p_all - y_true, minlength=size * ECE_BINS).reshape(size, ECE_BINS)

    def weighted(of_all, of_hem):
        return (np.nan_to_num(of_all) * n_all + np.nan_to_num(of_hem) * n_hem) / n

    with np.errstate(invalid="ignore", divide="ignore"):
        f1_all, f1_hem = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fp + fn)
        return {
            "auroc": ((times @ wins) * times).sum(axis=1) / (n_all * n_hem),
            "sensitivity": tp / n_all,
            "specificity": tn / n_hem,
            "accuracy": (tp + tn) / n,
            "f1": f1_all,
            "weighted_f1": weighted(f1_all, f1_hem),
            "weighted_precision": weighted(tp / (tp + fp), tn / (tn + fn)),
            "weighted_recall": weighted(tp / n_all, tn / n_hem),
            "brier": total((p_all - y_true) ** 2) / n,
            "ece": np.abs(gaps).sum(axis=1) / n,
        }
