"""Every system of the papers and ours: what the papers report, and what was measured here.

python -m training.results [FOLDER]    prints the table of docs/results.md from the cards of FOLDER, default the bundled ones
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import model_zoo
from model_zoo import BlastoscopeError, Card
from training.jobs import read_table, shipped_recipes
from training.recipe import Recipe, read_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "training" / "recipes"
PROTOCOLS = {"by_subject": "by subject", "official": "official test set", "image_level": "image-level"}  # recipe -> card
TESTED_ON = {
    "by subject": "unseen patients",
    "official test set": "unseen patients, official test set",
    "image-level": "other cells of the same patients",
}
METRICS = {
    "auroc": "AUROC",
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}
PAPERS = {
    "000": "Unnithan",
    "001": "Mir & Nissa 2019",
    "002": "Prellberg & Kramer 2019",
    "003": "Mattapalli & Athavale",
    "004": "Mouhssiena et al. 2023",
    "": "ours",
}
# Of a recipe: what may differ between two runs of which one says "the same recipe, divided otherwise".
_DIVISION = {
    *("title", "summary", "paper", "protocol", "folds", "folds_by", "test_folds", "teach_without"),
    *("validation", "refit", "shares", "seed"),
}


def tested_on(card: Card, who: str = "patients") -> str:
    """Whose cells a card's figures are of, in words: "unseen patients"."""
    if card.split.get("seen_unlabelled"):
        return f"{who} seen without labels"
    return TESTED_ON[card.split["protocol"]].replace("patients", who)


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A figure that a paper prints for its network.

    Attributes:
        paper: "000" to "004". metric: as in `Card.metrics`. value: 0..1. protocol: as in `Card.split`.
        cells: the cells it was measured on, in words.
    """

    paper: str
    metric: str
    value: float
    protocol: str
    cells: str

    def __str__(self) -> str:
        value = f"{self.value:.3f}" if self.metric == "auroc" else f"{100 * self.value:.4g}%"
        split = "by image" if self.protocol == "image-level" else "unseen patients"
        return f"{METRICS[self.metric]} {value} ({split}: {self.cells})"


def _by_image(paper: str, accuracy: float, cells: str = "validation part", auroc: float | None = None) -> tuple[Reported, ...]:
    values = {"accuracy": accuracy} | ({} if auroc is None else {"auroc": auroc})
    return tuple(Reported(paper=paper, metric=m, value=v, protocol="image-level", cells=cells) for m, v in values.items())


def _official(paper: str, metric: str, value: float, cells: str = "preliminary test set") -> Reported:
    return Reported(paper=paper, metric=metric, value=value, protocol="official test set", cells=cells)


# What each network's paper reports, the figure it is known by first.
REPORTED: dict[str, tuple[Reported, ...]] = {
    **{
        f"vanilla.{variant}": (*_by_image("000", validation), _official("000", "accuracy", test))
        for variant, validation, test in (  # Table 3
            ("1c1d", 0.848, 0.602),
            ("2c1d", 0.852, 0.612),
            ("3c1d", 0.830, 0.6122),
            ("2x2x1c1d_rmsprop", 0.854, 0.617),
            ("2x2x1c1d_adam", 0.803, 0.603),
            ("2x2x1c1d_bn_rmsprop", 0.741, 0.616),
            ("2x2x1c1d_bn_adam", 0.781, 0.572),
            ("2x2x1c1d_dropout25", 0.832, 0.6154),
            ("2x2x1c1d_dropout50", 0.799, 0.6154),
            ("2x2c1d", 0.839, 0.5415),
            ("2x2c1d_dropout25", 0.842, 0.5897),
            ("2x2c1d_dropout50", 0.85, 0.61),  # its text; Table 3 prints .830 and .617
            ("1x1c1d_zeropadding_dropout", 0.317, 0.3471),
        )
    },
    "alexnet": _by_image("001", 0.8162),
    "vgg16": _by_image("001", 0.848),
    "resnet50": _by_image("001", 0.8477),
    "inception_v3": _by_image("001", 0.8367),
    "six_block_cnn": _by_image("001", 0.9302),
    "se_resnext50": (
        _official("002", "weighted_f1", 0.8789, "preliminary test set, mean of 24 seeds"),
        _official("002", "weighted_f1", 0.8981, "the best of them"),
        _official("002", "weighted_f1", 0.8891, "final test set"),
    ),
    "allnet": _by_image("003", 0.9210, "test part", auroc=0.960),
    "vgg16.allnet_baseline": _by_image("003", 0.8620, auroc=0.906),
    "resnet50.allnet_baseline": _by_image("003", 0.8602, auroc=0.899),
    "inception_v3.allnet_baseline": _by_image("003", 0.7011, auroc=0.5),
    "efficientnet_b3": _by_image("004", 0.9775, "test part"),
}
# Their backbones, read by us.
REPORTED |= {
    name: REPORTED[name.partition(".")[0]] for name in ("allnet.pooled", "efficientnet_b3.pooled", "efficientnet_b3.turned")
}


@dataclass(frozen=True, kw_only=True)
class System:
    """A network with a recipe: measured here (`card`, `folder`) or still to be run (both None).

    Attributes:
        protocol: as in `Card.split`. recipe: a TOML file; it may be missing beside an old card.
        reads_cells: whether there are weights to read cells with.
    """

    name: str
    title: str
    summary: str
    architecture: str
    paper: str
    protocol: str
    recipe: Path
    card: Card | None = None
    folder: Path | None = None
    reads_cells: bool = False

    @property
    def reported(self) -> tuple[Reported, ...]:
        """What its paper reports, `()` for ours."""
        return REPORTED.get(self.architecture, ())

    @property
    def recipe_path(self) -> str:
        """Its recipe as one would type it in the repository's folder."""
        return str(self.recipe.relative_to(REPOSITORY) if self.recipe.is_relative_to(REPOSITORY) else self.recipe)


def list_systems(root: Path | None = None) -> list[System]:
    """Every card (bundled and promoted, or under `root`), then every shipped recipe that no card was made with.

    Splits on unseen patients come first, within a split what can read cells, then the best AUROC. Imports no Keras and
    reads no weights.

    Raises:
        CheckpointError, RecipeError: a file that cannot be read.
    """
    readable = {card.name for card in model_zoo.list_checkpoints(root)}
    measured = []
    for card in model_zoo.list_cards(root):
        folder = model_zoo.card_folder(card.name, root)
        measured.append(
            System(
                name=card.name,
                title=card.title,
                summary=card.summary,
                architecture=card.architecture,
                paper=card.paper or _paper_of(card.architecture),
                protocol=card.split["protocol"],
                recipe=folder / "recipe.toml",
                card=card,
                folder=folder,
                reads_cells=card.name in readable,
            )
        )
    known = {(system.architecture, system.protocol) for system in measured}
    waiting = [
        System(
            name=name,
            title=recipe.title,
            summary=recipe.summary,
            architecture=recipe.architecture,
            paper=recipe.paper or _paper_of(recipe.architecture),
            protocol=PROTOCOLS[recipe.protocol],
            recipe=RECIPES / f"{name}.toml",
        )
        for name, recipe in shipped_recipes().items()
        if (recipe.architecture, PROTOCOLS[recipe.protocol]) not in known
    ]
    order = list(TESTED_ON)
    by_split = sorted(
        measured, key=lambda s: (order.index(s.protocol), not s.reads_cells, -_finite(s.card.metrics["auroc"][0]))
    )
    return by_split + sorted(waiting, key=lambda system: (system.paper or "ours", system.name))


def _paper_of(architecture: str) -> str:
    return REPORTED[architecture][0].paper if architecture in REPORTED else ""


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def both_ways(systems: list[System]) -> list[tuple[System, System, bool]]:
    """Networks measured both ways: (on unseen patients, by image, whether the recipes differ in the split alone)."""
    pairs = []
    for by_image in systems:
        if by_image.card is None or by_image.protocol != "image-level":
            continue
        others = [s for s in systems if s.card and s.protocol == "by subject" and s.architecture == by_image.architecture]
        alike = [s for s in others if (known := _settings(s)) is not None and known == _settings(by_image)]
        if others:
            pairs.append(((alike or others)[0], by_image, bool(alike)))
    return pairs


def _settings(system: System) -> dict | None:
    """What a recipe sets apart from how cells are divided; None without a recipe."""
    if not system.recipe.exists():
        return None
    recipe = read_recipe(system.recipe, variants=False)
    return {f.name: getattr(recipe, f.name) for f in dataclasses.fields(Recipe) if f.name not in _DIVISION}


def read_history(folder: Path) -> list[dict]:
    """history.csv of a run or checkpoint: one row an epoch and fold, `fold` str, all else float; [] without one."""
    return [{"fold": ""} | row for row in read_table(Path(folder) / "history.csv")]


def with_interval(values: list[float] | None) -> str:
    """[estimate, low, high] as `0.87 (0.79–0.93)`; a dash where it was not measured."""
    if values is None or not math.isfinite(values[0]):
        return "–"
    return f"{values[0]:.2f} ({values[1]:.2f}–{values[2]:.2f})"


def cost(card: Card) -> dict[str, str]:
    """How much training a card's figures took, in words: `work`, `time` and `device`."""
    told, networks = card.training, card.training.get("networks", 1)
    work = f"{told['epochs']} epochs" if "cells_drawn" not in told else f"{told['cells_drawn']:,} cells drawn"
    regressions = f"{networks} regression{'s' if networks > 1 else ''}"
    if card.members:
        work = f"none of its own; {networks} networks of its {len(card.members)} members"
    elif told.get("cells_drawn") == 0:
        work = f"{regressions} on {'a grown' if told['start'].startswith('grown') else 'an untouched'} backbone"
    elif not told["epochs"] and told.get("teacher"):
        work = f"{told['cells_drawn']:,} cells drawn without labels, then {regressions}"
    elif networks > 1:
        work += f" by {networks} networks"
    return {"work": work, "time": in_words(3600 * told["hours"]), "device": told["device"].partition(":")[0].upper()}


def in_words(seconds: float) -> str:
    """A duration to about two digits: "40 seconds", "12 minutes", "3.5 hours", "2.1 days"."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return "1 second" if seconds < 1.5 else f"{seconds:.0f} seconds"


def table(root: Path | None = None) -> str:
    """The Markdown table of docs/results.md: every system by paper, both protocols, beside the paper's own figures."""
    columns = ["network", "paper", "tested on", *METRICS.values(), "training", "time", "device", "the paper reports"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    order = list(TESTED_ON)
    by_paper = sorted(list_systems(root), key=lambda s: (s.paper or "ours", s.architecture, order.index(s.protocol)))
    for system in by_paper:
        metrics, spent = ({}, {}) if system.card is None else (system.card.metrics, cost(system.card))
        tested = tested_on(system.card) if system.card else f"not run yet ({TESTED_ON[system.protocol]})"
        cells = [system.title, f"{PAPERS[system.paper]} ({system.paper})" if system.paper else PAPERS[""], tested]
        cells += [with_interval(metrics.get(name)) for name in METRICS]
        cells += [spent.get(name, "–") for name in ("work", "time", "device")]
        cells.append("; ".join(map(str, system.reported)) or "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="folder of checkpoint folders; default the bundled ones")
    folder = parser.parse_args(arguments).folder
    try:
        print(table(folder))
    except BlastoscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
