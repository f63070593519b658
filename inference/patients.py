"""From cells to a careful sentence about a patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inference.gate import unlike
from inference.images import HARMLESS
from model_zoo import Card

# Below this corrected share of blasts, or above it, an interval must lie as a whole to be called. The line that
# is quoted for marrow blasts; C-NMC itself cannot validate shares, see docs/decisions/0005.
BLAST_LINE = 0.20
MIN_CELLS = 20
_RATES, _SHARES = 20, 501  # quantiles of persons' error rates; shares from 0 to 1


@dataclass(frozen=True, kw_only=True)
class PatientSummary:
    """One patient's cells at one operating point.

    Attributes:
        n, called: cells scored, and of them called ALL.
        fraction: called / n, with its 95% Wilson interval `low`..`high`.
        corrected: the share of ALL cells if these cells are misread like those of one held-out subject or another
            (median, and 95% interval `corrected_low`..`corrected_high`, in 0..1).
        verdict: "consistent with ALL", "indeterminate" or "not consistent with ALL".
        reason: why, in one sentence.
    """

    n: int
    called: int
    fraction: float
    low: float
    high: float
    corrected: float
    corrected_low: float
    corrected_high: float
    verdict: str
    reason: str


def wilson_interval(called: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a proportion called/n. Wilson 1927, JASA 22:209-212.

    Cells of one smear are not independent, so the true uncertainty is wider.

    Raises:
        ValueError: n < 1, or called outside 0..n.
    """
    if n < 1 or not 0 <= called <= n:
        raise ValueError(f"need 0 <= called <= n and n >= 1. Received: called={called}, n={n}")
    p, z2 = called / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return min(p, max(0.0, float(centre - half))), max(p, min(1.0, float(centre + half)))  # rounding at 0 and n


def carries_weight(note: str) -> bool:
    """Whether a cell's note speaks against its P(ALL). One on the file's format does not: its effect is dealt with."""
    return bool(HARMLESS.sub("", note).strip("; "))


def summarize_patient(p_all, card: Card, *, noted: int = 0, measures=()) -> PatientSummary:
    """Fraction of one patient's cells called ALL, corrected for the checkpoint's errors on unseen subjects.

    The correction is Rogan & Gladen's (1978, Am J Epidemiol 107:71-76), (fraction - fpr) / (tpr - fpr), as Bayesians make it
    (Gelman & Carpenter 2020, J R Stat Soc C 69:1269-1283), so that few cells say little also where the plain formula ends
    at 0 or 1. Its interval carries the counting error, and that nobody knows as whose of the held-out subjects this person's
    cells are misread: persons differ far more than the mean of their error rates is uncertain.

    Args:
        p_all: float (n,), calibrated probabilities in [0, 1].
        card: of the checkpoint that gave them.
        noted: how many of the cells have a note that `carries_weight`; more than half leave no answer.
        measures: (n, 4), `inference.gate.MEASURES` of the cells, or () where they are not known; medians unlike those of the
            persons that the network knows leave no answer.
    Raises:
        ValueError: empty input, or a value outside [0, 1] (NaN included).
    """
    p_all = np.asarray(p_all, "float64")
    if p_all.ndim != 1 or not len(p_all) or not ((p_all >= 0) & (p_all <= 1)).all():
        raise ValueError(f"p_all must be non-empty, 1-D and within [0, 1]. Received: shape {p_all.shape}")
    n, called = len(p_all), int((p_all >= card.threshold).sum())
    low, high = wilson_interval(called, n)
    corrected, corrected_low, corrected_high = _correct(called, n, card.subjects)
    verdict, reason = _answer(n, noted, measures, low, high, corrected_low, corrected_high, card)
    return PatientSummary(
        n=n,
        called=called,
        fraction=called / n,
        low=low,
        high=high,
        corrected=corrected,
        corrected_low=corrected_low,
        corrected_high=corrected_high,
        verdict=verdict,
        reason=reason,
    )


def _answer(n, noted, measures, low, high, corrected_low, corrected_high, card: Card) -> tuple[str, str]:
    """Verdict and reason. Persons differ: the cells must also read unlike every held-out subject of the other class.

    Held-out subjects with fewer than MIN_CELLS cells are left out, as their own share is too uncertain.
    """
    if n < MIN_CELLS:
        return "indeterminate", f"Fewer than {MIN_CELLS} cells are too few to answer for a patient."
    if len(measures):
        medians = np.median(np.asarray(measures, "float64"), axis=0)
        if found := unlike(medians, card.data.get("usual"), "person"):
            how, why = found[0]
            doubt = "The network's figures may not hold for them."
            return "indeterminate", f"The cells are {how}. {why.capitalize()}? {doubt}"
    if 2 * noted > n:
        return "indeterminate", "More than half of the cells carry a note: the network's figures may not hold for them."
    read = {value: [k / m for _, y_true, m, k in card.subjects if y_true == value and m >= MIN_CELLS] for value in (1, 0)}
    if not (read[0] and read[1]):
        return "indeterminate", (
            f"The network was measured on too few persons with {MIN_CELLS} cells or more of each class to answer for a patient."
        )
    highest_hem, lowest_all = max(read[0]), min(read[1])
    unseen = "whose label the network had never seen" if card.split.get("seen_unlabelled") else "the network had never seen"
    if corrected_low >= BLAST_LINE:
        if low > highest_hem:
            return (
                "consistent with ALL",
                f"Also with the network's errors taken out, more than {BLAST_LINE:.0%} are ALL, and no healthy person "
                f"{unseen} (of {MIN_CELLS} cells or more) had so many cells called ALL.",
            )
        return "indeterminate", f"A healthy person {unseen} had {highest_hem:.0%} of the cells called ALL, too."
    if corrected_high < BLAST_LINE:
        if high < lowest_all:
            return (
                "not consistent with ALL",
                f"Also with the network's errors taken out, fewer than {BLAST_LINE:.0%} are ALL, and no person with ALL "
                f"{unseen} (of {MIN_CELLS} cells or more) had so few cells called ALL.",
            )
        return "indeterminate", f"A person with ALL {unseen} had only {lowest_all:.0%} of the cells called ALL, too."
    return "indeterminate", f"With the network's errors taken out, the share may lie below {BLAST_LINE:.0%} or above."


def _correct(called: int, n: int, subjects: list) -> tuple[float, float, float]:
    """Median and 95% interval of the share of ALL cells: what the count leaves of a uniform prior over 0..1.

    Averaged over pairs of what one held-out subject with ALL and one healthy one show of the network's error rates; the
    patient's own cells say nothing about these. Subjects with fewer than MIN_CELLS cells count where there are no others.
    """
    rates = []
    for value in (1, 0):
        of = [(m, k / m) for _, y_true, m, k in subjects if y_true == value]
        of = [rate for m, rate in of if m >= MIN_CELLS] or [rate for _, rate in of]
        if not of:  # nothing is known of the network's errors, so nothing of the share
            return 0.5, 0.0, 1.0
        rates.append(np.quantile(of, (np.arange(_RATES) + 0.5) / _RATES))
    tpr, fpr = (rate.ravel() for rate in np.meshgrid(*rates))
    # a pair that the network does not tell apart says nothing about the share
    gap = np.where(tpr - fpr > 0.05, tpr - fpr, 0)
    share = np.linspace(0, 1, _SHARES)
    p_called = np.clip(fpr[:, None] + share * gap[:, None], 1e-9, 1 - 1e-9)
    likelihood = called * np.log(p_called) + (n - called) * np.log1p(-p_called)
    likelihood = np.exp(likelihood - likelihood.max(1, keepdims=True))
    below = np.cumsum((likelihood / likelihood.sum(1, keepdims=True)).mean(0))
    low, median, high = np.interp([0.025, 0.5, 0.975], below, share)
    return float(median), float(low), float(high)
