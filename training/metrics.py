"""Figures on held-out cells, each with a 95% interval by subject bootstrap."""

from __future__ import annotations

import numpy as np

ECE_BINS = 15


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


def expected_calibration_error(y_true, p_all, bins: int = ECE_BINS) -> float:
    """Mean gap between predicted and observed frequency of ALL over equal-width bins. Naeini et al. 2015."""
    y_true, p_all = np.asarray(y_true, float), np.asarray(p_all, float)
    index = np.minimum((p_all * bins).astype(int), bins - 1)
    gaps = np.bincount(index, p_all - y_true, minlength=bins)
    return float(np.abs(gaps).sum() / len(y_true))


def cell_metrics(y_true, p_all, threshold: float) -> dict[str, float]:
    """Figures at one operating point; y_true int (n,), p_all float (n,) calibrated. NaN where a class is absent."""
    y_true, p_all = np.asarray(y_true), np.asarray(p_all)
    called = p_all >= threshold
    tp, fn = int((called & (y_true == 1)).sum()), int((~called & (y_true == 1)).sum())
    tn, fp = int((~called & (y_true == 0)).sum()), int((called & (y_true == 0)).sum())

    def ratio(a, b):
        return a / b if b else float("nan")

    f1_all, f1_hem = ratio(2 * tp, 2 * tp + fp + fn), ratio(2 * tn, 2 * tn + fp + fn)
    n = len(y_true)
    return {
        "auroc": auroc(y_true, p_all),
        "sensitivity": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "accuracy": (tp + tn) / n,
        "f1": f1_all,
        "weighted_f1": np.nansum([f1_all * (tp + fn), f1_hem * (tn + fp)]) / n,
        "brier": float(np.mean((p_all - y_true) ** 2)),
        "ece": expected_calibration_error(y_true, p_all),
    }


def bootstrap_metrics(y_true, p_all, subjects, threshold: float, *, draws: int = 2000, seed: int = 0) -> dict[str, list[float]]:
    """`cell_metrics` as [estimate, low, high]: 95% percentile interval over subjects drawn with replacement.

    ALL and HEM subjects are drawn apart, so that every draw holds both classes.
    """
    y_true, p_all, subjects = np.asarray(y_true), np.asarray(p_all), np.asarray(subjects)
    rows_of = {s: np.flatnonzero(subjects == s) for s in np.unique(subjects)}
    by_class = [[rows for rows in rows_of.values() if y_true[rows[0]] == value] for value in (1, 0)]
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(draws):
        rows = np.concatenate([group[i] for group in by_class for i in rng.integers(0, len(group), len(group))])
        samples.append(cell_metrics(y_true[rows], p_all[rows], threshold))
    estimate = cell_metrics(y_true, p_all, threshold)
    return {
        name: [round(float(v), 4) for v in (value, *np.nanpercentile([s[name] for s in samples], [2.5, 97.5]))]
        for name, value in estimate.items()
    }


def fit_temperature(y_true, logit) -> float:
    """The T > 0 that minimises the cross-entropy of sigmoid(logit / T). Guo et al. 2017, arXiv:1706.04599."""
    from scipy.optimize import minimize_scalar

    y_true, logit = np.asarray(y_true, float), np.asarray(logit, float)

    def loss(log_t):
        z = logit / np.exp(log_t)
        return np.mean(np.logaddexp(0, z) - y_true * z)

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.1), np.log(20)), method="bounded").x))


def youden_threshold(y_true, p_all, subjects) -> float:
    """The operating point with the largest sensitivity + specificity, every subject weighing the same. Youden 1950."""
    y_true, p_all, subjects = np.asarray(y_true), np.asarray(p_all), np.asarray(subjects)
    _, index, counts = np.unique(subjects, return_inverse=True, return_counts=True)
    weight = 1.0 / counts[index]
    weight = np.where(y_true == 1, weight / weight[y_true == 1].sum(), weight / weight[y_true == 0].sum())
    order = np.argsort(-p_all, kind="stable")
    gain = np.cumsum(np.where(y_true[order] == 1, weight[order], -weight[order]))
    distinct = np.r_[p_all[order][1:] < p_all[order][:-1], True]
    best = np.flatnonzero(distinct)[gain[distinct].argmax()]
    below = p_all[order][best + 1] if best + 1 < len(order) else 0.0
    return float(np.clip((p_all[order][best] + below) / 2, 0.01, 0.99))
