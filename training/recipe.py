"""A recipe: the settings of one run, read from TOML. Data only, no code."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path

import model_zoo
from model_zoo import FrameSpec
from training.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one run.

    Attributes:
        architecture: a file in model_zoo/.
        crop, input_size: framing in pixels: crop at native scale, then one resize.
        weights: "" for a random start, or a `.weights.h5` file of the backbone, relative to the data folder.
        head_epochs: epochs, at ten times the rate, in which only the layers after the backbone train; its pretrained
            features are not torn up by a random head. Kumar et al. 2022, arXiv:2202.10054.
        teacher: "", or `.weights.h5` of an ImageNet MobileNetV2, relative to the data folder. Besides the labels the
            network then learns to predict its pooled features of the same augmented training cells: what a random start
            lacks. Romero et al. 2015, arXiv:1412.6550.
        epochs, draws_per_epoch: cells drawn, with replacement, in one epoch.
        learning_rate, warmup_epochs, weight_decay: AdamW with a cosine schedule; the rate is its peak.
        ema: momentum of the weight average that is evaluated and kept; 0 for none.
        label_smoothing: 0..1.
        subject_power: within a class a subject of n cells is drawn in proportion to n ** subject_power:
            1 draws cells evenly, 0 draws persons evenly.
        rotate, flip: any angle; both axes.
        shift: largest translation, as a share of the frame.
        stain: largest relative change of each entry of the 3x3 colour matrix; black stays black.
        gamma: largest relative change of the exponent.
        folds, test_fold, validation_fold: subject-disjoint folds; the rest trains.
        seed: of splits, weights, draws and augmentation.
    """

    architecture: str
    title: str
    summary: str
    crop: int
    input_size: int
    weights: str = ""
    head_epochs: int = 0
    teacher: str = ""
    epochs: int
    draws_per_epoch: int
    batch_size: int
    learning_rate: float
    warmup_epochs: float = 1.0
    weight_decay: float = 1e-4
    ema: float = 0.0
    label_smoothing: float = 0.0
    subject_power: float = 0.5
    rotate: bool = True
    flip: bool = True
    shift: float = 0.0
    stain: float = 0.0
    gamma: float = 0.0
    folds: int = 5
    test_fold: int = 2
    validation_fold: int = 0
    seed: int = 0

    def __post_init__(self):
        positive = ("crop", "input_size", "epochs", "draws_per_epoch", "batch_size", "learning_rate")
        for name in positive:
            if not getattr(self, name) > 0:  # NaN too
                raise RecipeError(f"{name} must be above 0. Received: {name}={getattr(self, name)!r}")
        for name in ("ema", "label_smoothing", "shift", "stain", "gamma"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name} must lie in 0..1, below 1. Received: {name}={getattr(self, name)!r}")
        if not 0 <= self.test_fold < self.folds or not 0 <= self.validation_fold < self.folds:
            raise RecipeError(f"test_fold and validation_fold must lie in 0..{self.folds - 1}.")
        if self.test_fold == self.validation_fold:
            raise RecipeError(f"test_fold and validation_fold must differ. Received: both {self.test_fold}")

    @property
    def framing(self) -> FrameSpec:
        return FrameSpec(crop=self.crop, size=self.input_size)


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: unreadable, an unknown or missing key (the nearest is offered), a value of the wrong type.
        UnknownArchitectureError: no such file in model_zoo/.
    """
    try:
        values = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error}") from error
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(fields)}."
            raise RecipeError(f"{path}: unknown key {key!r}.{hint}")
        wanted = {"str": str, "int": int, "float": (int, float), "bool": bool}[fields[key].type]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise RecipeError(f"{path}: {key} must be of type {fields[key].type}. Received: {key}={value!r}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise RecipeError(f"{path}: missing {', '.join(missing)}.")
    if values["architecture"] not in model_zoo.architecture_names():
        model_zoo.find_architecture(values["architecture"])  # raises, and offers the nearest name
    return Recipe(**values)
