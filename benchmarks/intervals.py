"""How often intervals named 95% hold the truth, where the truth is known: persons made up after those of a checkpoint.

    python -m benchmarks.intervals [CHECKPOINT] [--repetitions 400]

Each repetition makes up as many persons of each class, with as many cells, as the checkpoint held out: a person's logits are
normal around the person's mean, means normal around their class's, with the variances of the checkpoint's held-out logits.
So the figures of all persons there could be are known in closed form. Subjects that share pictures are made up as one person
or as several: nobody knows which they are. Three rules: subjects drawn apart between the plain percentiles of the draws (up
to 0.17.0), groups drawn so, and groups drawn between the percentiles that `training.metrics` now takes. Once with all
held-out persons, once with those of fold 2. Reads predictions.csv of the checkpoint; needs no data.
"""

from __future__ import annotations

import argparse
from unittest import mock

import numpy as np

import benchmarks
import model_zoo
from training.compare import read_predictions
from training.metrics import bootstrap_metrics

PLAIN = [2.5, 97.5]
FIGURES = ("auroc", "sensitivity", "specificity")
RULES = ("subjects, plain percentiles", "groups, plain percentiles", "groups, as now")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="name or folder; default the one that opens first")
    parser.add_argument("--repetitions", type=int, default=400)
    chosen = parser.parse_args(arguments)
    checkpoint = benchmarks.checkpoint(chosen.checkpoint or model_zoo.default_checkpoint())
    table = read_predictions(checkpoint.path)
    benchmarks.print_machine("numpy", "scipy")
    print(f"{checkpoint.card.title}, {chosen.repetitions} repetitions")
    rows = []
    for where, of in (("all", slice(None)), ("fold 2", table["fold"] == "fold_2")):
        world = World({name: values[of] for name, values in table.items()})
        for one_person in (True, False):
            held = coverage(world, chosen.repetitions, one_person=one_person)
            group = "one person" if one_person else "several persons"
            rows += [[where, group, rule, *(f"{share:.1%}" for share in held[rule])] for rule in RULES]
    benchmarks.print_table(["folds", "a group is", "rule", *(f"{figure} held" for figure in FIGURES)], rows)


class World:
    """Persons as those of held-out predictions, of whom there could be any number."""

    def __init__(self, table: dict[str, np.ndarray]):
        _, first, self.subject = np.unique(table["subject"], return_index=True, return_inverse=True)
        self.subjects, self.groups, self.y_true = table["subject"], table["group"], table["y_true"]
        _, self.group = np.unique(self.groups, return_inverse=True)
        count = np.bincount(self.subject)
        mean = np.bincount(self.subject, table["logit"]) / count
        squares = np.bincount(self.subject, (table["logit"] - mean[self.subject]) ** 2)
        self.centre, self.between, self.within = np.zeros((3, 2))
        for value in (0, 1):
            of = (self.y_true[first] == value) & (count >= 10)  # fewer cells tell little of a person
            within = squares[of].sum() / (count[of] - 1).sum()
            between = mean[of].var(ddof=1) - within * np.mean(1 / count[of])
            self.centre[value], self.within[value] = table["logit"][self.y_true == value].mean(), np.sqrt(within)
            self.between[value] = np.sqrt(max(between, 0.01))

    def truth(self) -> dict[str, float]:
        """Figures of all persons there could be, at logit 0."""
        from scipy.stats import norm

        spread = np.hypot(self.between, self.within)
        return {
            "auroc": norm.cdf((self.centre[1] - self.centre[0]) / np.hypot(*spread)),
            "sensitivity": norm.cdf(self.centre[1] / spread[1]),
            "specificity": norm.cdf(-self.centre[0] / spread[0]),
        }

    def p_all(self, rng: np.random.Generator, *, one_person: bool) -> np.ndarray:
        person = self.group if one_person else self.subject
        shift = rng.normal(size=person.max() + 1)[person] * self.between[self.y_true]
        logit = self.centre[self.y_true] + shift + rng.normal(size=len(person)) * self.within[self.y_true]
        return 1 / (1 + np.exp(-logit))


def coverage(world: World, repetitions: int, *, one_person: bool) -> dict[str, list[float]]:
    """By rule, the share of repetitions whose interval holds the truth, of each of FIGURES."""
    rng, truth = np.random.default_rng(0), world.truth()
    held = {rule: np.zeros(len(FIGURES)) for rule in RULES}
    for _ in range(repetitions):
        p_all = world.p_all(rng, one_person=one_person)
        with mock.patch("training.metrics._ends", return_value=PLAIN):
            plain = [bootstrap_metrics(world.y_true, p_all, world.subjects, by, 0.5) for by in (world.subjects, world.groups)]
        now = bootstrap_metrics(world.y_true, p_all, world.subjects, world.groups, 0.5)
        for rule, found in zip(RULES, (*plain, now), strict=True):
            held[rule] += [found[figure][1] <= truth[figure] <= found[figure][2] for figure in FIGURES]
    return {rule: list(count / repetitions) for rule, count in held.items()}


if __name__ == "__main__":
    main()
