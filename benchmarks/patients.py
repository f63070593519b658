"""What the app answers for a patient, asked for persons whose truth is known: whole held-out persons, and mixtures of two.

    python -m benchmarks.patients [CHECKPOINT ...]

Every subject of C-NMC is all ALL or all HEM, so a marrow with some blasts is made up here: cells of one held-out person with
ALL and of one healthy one, as many as the share says, drawn with replacement. The reference (error rates, extremes) is the
card's other persons. Reads predictions.csv of each folder; needs no data. Persons with fewer cells than an answer needs are
not mixed; that cells carry no note and are of a usual size and stain is taken for granted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections import Counter

import numpy as np

import benchmarks
import model_zoo
from inference.patients import MIN_CELLS, summarize_patient
from training.compare import read_predictions

VERDICTS = ("consistent with ALL", "indeterminate", "not consistent with ALL")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="names or folders; default every bundled one measured on several folds")
    parser.add_argument("--cells", type=int, default=100, help="of a mixture (default 100)")
    chosen = parser.parse_args(arguments)
    cards = [card for card in model_zoo.list_checkpoints() if len(card.split.get("test_folds", ())) > 1]
    benchmarks.print_machine("numpy")
    whole, mixed = [], []
    for checkpoint in map(benchmarks.checkpoint, chosen.checkpoints or [card.name for card in cards]):
        card, p_all = checkpoint.card, by_subject(read_predictions(checkpoint.path))
        whole.append([card.title, *(_answers(card, p_all, y_true) for y_true in (1, 0))])
        for share in SHARES:
            told, held = mixtures(card, p_all, share, chosen.cells)
            mixed.append([card.title, *(f"{part:.0%}" for part in (share, *(told[verdict] for verdict in VERDICTS), held))])
    print("Whole persons: consistent with ALL, indeterminate, not consistent")
    benchmarks.print_table(["network", "with ALL", "healthy"], whole)
    print(f"Mixtures of {chosen.cells} cells, of every pair of a person with ALL and a healthy one")
    benchmarks.print_table(["network", "ALL cells", *VERDICTS, "share within the 95% interval"], mixed)


def by_subject(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """P(ALL) of each subject's cells."""
    return {name: table["p_all"][table["subject"] == name] for name in np.unique(table["subject"])}


def _without(card: model_zoo.Card, *names: str) -> model_zoo.Card:
    return dataclasses.replace(card, subjects=[row for row in card.subjects if row[0] not in names])


def _answers(card: model_zoo.Card, p_all: dict[str, np.ndarray], y_true: int) -> str:
    names = [name for name, value, *_ in card.subjects if value == y_true]
    told = Counter(summarize_patient(p_all[name], _without(card, name)).verdict for name in names)
    return ", ".join(str(told[verdict]) for verdict in VERDICTS)


def mixtures(card: model_zoo.Card, p_all: dict[str, np.ndarray], share: float, n: int) -> tuple[dict[str, float], float]:
    """Share of pairs with each answer, and with the share inside the interval; every pair is drawn once."""
    rng, told, held = np.random.default_rng(0), Counter(), 0
    ill, healthy = ([name for name, value, m, _ in card.subjects if value == y and m >= MIN_CELLS] for y in (1, 0))
    pairs, blasts = list(itertools.product(ill, healthy)), round(share * n)
    for one, other in pairs:
        cells = np.concatenate([rng.choice(p_all[one], blasts), rng.choice(p_all[other], n - blasts)])
        summary = summarize_patient(cells, _without(card, one, other))
        told[summary.verdict] += 1
        held += summary.corrected_low - 0.005 <= blasts / n <= summary.corrected_high + 0.005  # as the screen rounds it
    return {verdict: told[verdict] / len(pairs) for verdict in VERDICTS}, held / len(pairs)


if __name__ == "__main__":
    main()
