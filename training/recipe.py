"""A recipe: the settings of one run, read from TOML. Data only, no code."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

import model_zoo
from model_zoo import FrameSpec
from training.errors import DataError, RecipeError

CHOICES = {
    "protocol": ("by_subject", "image_level", "official"),
    "sampling": ("subjects", "cells", "undersampled"),
    "optimizer": ("adamw", "adam", "sgd", "rmsprop"),
    "schedule": ("cosine", "constant", "steps"),
    "flip": ("", "horizontal", "both"),
    "watch": ("auroc", "accuracy", "weighted_f1", "loss"),
    "precision": ("auto", "float32", "mixed_float16", "mixed_bfloat16"),
    "rotations": (1, 8),
    "folds_by": ("cells", "chance", "stain"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one run.

    Attributes:
        architecture: a file in model_zoo/, or `file.variant`.
        paper: "000" to "004", or "" for ours.
        protocol: "by_subject": subject-disjoint folds; "official": the training folds train, the preliminary test
            set tests; "image_level": cells are divided without regard to subjects, as papers 000, 001, 003, 004 did.
        crop, input_size: framing in pixels: crop at native scale, then one resize.
        weights: "" for a random start, "imagenet" (downloaded by Keras), or a `.weights.h5` file of the backbone,
            relative to the data folder.
        grow_from: "", or `.weights.h5` of an ImageNet MobileNetV2, relative to the data folder, from which an EfficientNetB3 is
            grown on the training cells (`training.growth`).
        probe: above 0, the last layer starts as the logistic regression, of this inverse L2 penalty, on the embeddings of
            the training cells: the best answer of an untouched backbone. With epochs = 0 it is the network. Where the
            embedding joins several kinds of features, it is the mean of a regression for each.
        probe_persons: how much of what tells persons of one class apart is taken from the probe; 0 for nothing.
        probe_imaging: how much of what another stain, lamp or focus changes (`stain`, `gamma`, `blur`) is taken from the probe.
        head_epochs: epochs, at ten times the rate, in which only the layers after the backbone train; its pretrained
            features are not torn up by a random head. Kumar et al. 2022, arXiv:2202.10054.
        teacher: "", or `.weights.h5` of an ImageNet MobileNetV2, relative to the data folder. Besides the labels the
            network then learns to predict its pooled features of the same augmented training cells: what a random start
            lacks. Romero et al. 2015, arXiv:1412.6550.
        teach_epochs: above 0, the network first learns, from pictures without labels, to give its teacher's maps place by
            place (its architecture's `lessons`), once for all folds, at this recipe's draws and rates; only then come the
            probe and the labels.
        teach_without: folds whose pictures are not shown in that; the others' held-out subjects were seen, without label.
        epochs, draws_per_epoch, batch_size: cells drawn in one epoch; 0 draws every training cell once.
        sampling: "subjects": half ALL, half HEM, with replacement, a subject of n cells in proportion to
            n ** subject_power (1 draws cells evenly, 0 persons evenly); "cells": every cell alike, without
            replacement; "undersampled": so too, after the commoner class was cut to the rarer one's count.
        class_weight: weigh the loss of ALL cells by n_HEM / n_ALL (paper 002).
        optimizer, learning_rate, momentum: the rate is its peak; momentum is SGD's.
        schedule, warmup_epochs, step_epochs: "steps" divides the rate by 10 every `step_epochs`.
        weight_decay: decoupled, of matrices and kernels alone; AdamW's.
        rates: regular expression of layer names -> factor of the learning rate, 0 freezes; the first full match wins.
        ema: momentum of the weight average that is evaluated and kept; 0 for none.
        label_smoothing: 0..1.
        flip, rotate, quarter_turns, shift: mirror axes; largest angle in degrees; multiples of 90 degrees; largest
            translation as a share of the frame.
        stain: largest relative change of each colour channel; of each other channel at most a third as much is mixed into it.
            Black stays black.
        gamma: largest relative change of the exponent.
        blur: largest standard deviation, in pixels, of a Gaussian blur inside the cell.
        watch, patience: the validation figure that chooses the epoch; epochs without a better one before stopping,
            0 for never.
        folds, test_folds: number of subject-disjoint folds, and those that are held out in turn; [] for each of them.
        folds_by: "cells": as alike in cells of each class as may be, so that `seed` moves few subjects; "chance": drawn with
            `seed`, as many subjects of a class in each; "stain": from the subjects whose cells are darkest to the lightest, so
            that those tested are not stained as those trained on.
        validation: whether the next fold chooses the epoch; else all the rest trains and the last epoch is kept.
        refit: whether, after the folds, one more network trains on all subjects, to be the one that is served.
        shares: image-level shares of training, validation and test cells.
        rotations: test-time averaging of the logit over this many rotations (paper 002).
        precision: "auto" is mixed precision on a GPU and float32 elsewhere.
        devices: GPUs of one machine; each takes an equal share of every batch (`training.devices`).
        seed: of splits, weights, draws and augmentation.
    """

    architecture: str
    title: str
    summary: str
    paper: str = ""
    protocol: str = "by_subject"
    crop: int
    input_size: int
    weights: str = ""
    grow_from: str = ""
    teacher: str = ""
    teach_epochs: int = 0
    teach_without: list = field(default_factory=list)
    probe: float = 0.0
    probe_persons: float = 0.0
    probe_imaging: float = 0.0
    head_epochs: int = 0
    epochs: int
    draws_per_epoch: int = 0
    batch_size: int
    sampling: str = "subjects"
    subject_power: float = 0.5
    class_weight: bool = False
    optimizer: str = "adamw"
    learning_rate: float
    momentum: float = 0.0
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    step_epochs: int = 0
    weight_decay: float = 0.0
    rates: dict = field(default_factory=dict)
    ema: float = 0.0
    label_smoothing: float = 0.0
    flip: str = ""
    rotate: float = 0.0
    quarter_turns: bool = False
    shift: float = 0.0
    stain: float = 0.0
    gamma: float = 0.0
    blur: float = 0.0
    watch: str = "auroc"
    patience: int = 0
    folds: int = 5
    folds_by: str = "cells"
    test_folds: list = field(default_factory=list)
    validation: bool = True
    refit: bool = False
    shares: list = field(default_factory=lambda: [0.6, 0.2, 0.2])
    rotations: int = 1
    precision: str = "auto"
    devices: int = 1
    seed: int = 0

    def __post_init__(self):
        if not self.epochs and not self.probe:
            raise RecipeError("A recipe without epochs needs a probe. Received: epochs=0, probe=0")
        for name in ("crop", "input_size", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:  # NaN too
                raise RecipeError(f"{name} must be above 0. Received: {name}={getattr(self, name)!r}")
        for name in (
            "epochs",
            "teach_epochs",
            "probe",
            "probe_persons",
            "probe_imaging",
            "blur",
            "draws_per_epoch",
            "head_epochs",
            "warmup_epochs",
            "weight_decay",
            "patience",
            "momentum",
            "subject_power",
            "seed",
        ):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name} must not be below 0. Received: {name}={getattr(self, name)!r}")
        for f in dataclasses.fields(self):
            if f.type == "float" and not getattr(self, f.name) < math.inf:
                raise RecipeError(f"{f.name} must be finite. Received: {f.name}={getattr(self, f.name)!r}")
        if not self.seed < 2**32 - 2:  # augmentation draws with the next two as well
            raise RecipeError(f"seed must be below {2**32 - 2}. Received: seed={self.seed!r}")
        for name in ("ema", "label_smoothing", "shift", "stain", "gamma", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name} must lie in 0..1, below 1. Received: {name}={getattr(self, name)!r}")
        if not 0 <= self.rotate <= 180:
            raise RecipeError(f"rotate must lie in 0..180 degrees. Received: rotate={self.rotate!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                listed = ", ".join(repr(c) for c in choices)
                raise RecipeError(f"{name} must be one of {listed}. Received: {name}={getattr(self, name)!r}")
        if self.devices < 1 or self.batch_size % self.devices:
            raise RecipeError(
                "batch_size must be a multiple of devices, and devices at least 1. Received: "
                f"batch_size={self.batch_size!r}, devices={self.devices!r}"
            )
        if self.schedule == "steps" and self.step_epochs < 1:
            raise RecipeError(f'schedule = "steps" needs step_epochs above 0. Received: step_epochs={self.step_epochs!r}')
        if self.folds < 2 or (self.validation and self.protocol != "image_level" and self.folds < 3):
            raise RecipeError(
                "Folds for training, validation and test need folds >= 3; two do with validation = false. "
                f"Received: folds={self.folds!r}"
            )
        for name in ("test_folds", "teach_without"):
            named = getattr(self, name)
            if not all(isinstance(k, int) and 0 <= k < self.folds for k in named):
                raise RecipeError(f"{name} must lie in 0..{self.folds - 1}. Received: {name}={named!r}")
            if len(set(named)) < len(named):
                raise RecipeError(f"{name} must name each fold once. Received: {name}={named!r}")
        if self.probe_imaging and not (self.probe and (self.stain or self.gamma or self.blur)):
            raise RecipeError("probe_imaging needs a probe, and stain, gamma or blur: what it is to shun.")
        if self.grow_from and (self.weights or self.teach_epochs):
            raise RecipeError("grow_from sets all weights: leave weights and teach_epochs out, or it.")
        if self.teach_without and self.protocol != "by_subject":
            raise RecipeError(f'teach_without names folds of protocol = "by_subject". Received: protocol={self.protocol!r}')
        if self.folds_by != "cells" and self.protocol != "by_subject":
            raise RecipeError(f'folds_by names folds of protocol = "by_subject". Received: protocol={self.protocol!r}')
        if self.teach_epochs and not self.teacher:
            raise RecipeError(f"teach_epochs needs a teacher. Received: teach_epochs={self.teach_epochs!r}, teacher=''")
        if not all(isinstance(share, int | float) for share in self.shares):
            raise RecipeError(f"shares must be numbers. Received: shares={self.shares!r}")
        if len(self.shares) != 3 or min(self.shares) < 0 or self.shares[0] <= 0 or not abs(sum(self.shares) - 1) <= 1e-6:
            raise RecipeError(f"shares must be [training, validation, test], adding up to 1. Received: shares={self.shares!r}")
        if self.protocol == "image_level" and not (self.shares[1] or self.shares[2]):
            raise RecipeError("image_level needs a share of cells for validation or test. Received: none")
        for pattern, factor in self.rates.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise RecipeError(f"rates: {pattern!r} is no regular expression ({error}).") from error
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
                raise RecipeError(f"rates: the factor of {pattern!r} must be a number from 0. Received: {factor!r}")

    @property
    def framing(self) -> FrameSpec:
        return FrameSpec(crop=self.crop, size=self.input_size)

    def tiny(self) -> Recipe:
        """The same run at a size that ends within minutes on any machine: it shows that everything works, no more."""
        return replace(
            self,
            title=f"{self.title} (tiny)",
            summary=f"A tiny run that shows that everything works; its figures mean nothing. {self.summary}",
            input_size=min(self.input_size, 96),
            epochs=min(self.epochs, 2),
            teach_epochs=min(self.teach_epochs, 1),
            teach_without=[k for k in self.teach_without if k < 3],
            draws_per_epoch=16,
            batch_size=min(self.batch_size, 8 * self.devices),
            head_epochs=min(self.head_epochs, 1),
            folds=3,
            test_folds=[0],
            refit=False,
        )


def read_recipe(path: Path, changes: dict | None = None, *, variants: bool = True) -> Recipe:
    """Read and check a recipe.

    Args:
        changes: settings that replace the file's.
        variants: whether to look for the architecture's variant in its file, which imports Keras; else only for the file.
    Raises:
        RecipeError: unreadable, an unknown or missing key (the nearest is offered), a value of the wrong type.
        UnknownArchitectureError: no such file in model_zoo/.
    """
    try:
        values = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error}") from error
    return make_recipe(values | (changes or {}), origin=str(path), variants=variants)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the settings that differ from the defaults as TOML; `read_recipe` gives the same recipe back."""
    lines = ["# Written by a run or by the training page; the recipe it was made from holds the comments."]
    for f in dataclasses.fields(Recipe):
        value = getattr(recipe, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if value != default and f.name != "rates":
            lines.append(f"{f.name} = {json.dumps(value, ensure_ascii=False)}")  # JSON of these types is TOML too
    if recipe.rates:
        lines += ["[rates]", *(f"{json.dumps(key)} = {json.dumps(factor)}" for key, factor in recipe.rates.items())]
    Path(path).write_text("\n".join(lines) + "\n", "utf-8")


def find_starts(recipe: Recipe, data: Path) -> Recipe:
    """The recipe with the paths of the files that it starts from, which it names relative to the data folder.

    Raises:
        DataError: one is not there.
    """
    given = {name: getattr(recipe, name) for name in ("weights", "grow_from", "teacher")}
    files = {name: data / file for name, file in given.items() if file not in ("", "imagenet")}
    for file in files.values():
        if not file.is_file():
            raise DataError(f"The recipe starts from {file}, which does not exist. Put it there, or choose a random start.")
    return replace(recipe, **{name: str(file) for name, file in files.items()})


def make_recipe(values: dict, *, origin: str = "recipe", variants: bool = True) -> Recipe:
    """Check `values`, the keys of a recipe; messages begin with `origin`. `variants` and what it raises as `read_recipe`."""
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    types = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict": dict, "list": list}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(fields)}."
            raise RecipeError(f"{origin}: unknown key {key!r}.{hint}")
        wanted = fields[key].type
        if not isinstance(value, types[wanted]) or (isinstance(value, bool) and wanted != "bool"):
            raise RecipeError(f"{origin}: {key} must be of type {wanted}. Received: {key}={value!r}")
    missing = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and n not in values
    ]
    if missing:
        raise RecipeError(f"{origin}: missing {', '.join(missing)}.")
    name = values["architecture"] if variants else values["architecture"].partition(".")[0]
    if name not in model_zoo.architecture_names():
        model_zoo.find_architecture(values["architecture"])  # raises, and offers the nearest name
    try:
        return Recipe(**values)
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from error
