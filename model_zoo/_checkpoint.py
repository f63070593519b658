"""A checkpoint: a folder with model.onnx (graph and weights), card.json, and what its training left behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from model_zoo._errors import CheckpointError

BUNDLED = Path(__file__).parent / "checkpoints"
WEIGHTS = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class FrameSpec:
    """How a cell is framed for a network: `crop` pixels at native scale around the cell, resized once to `size`."""

    crop: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known about a checkpoint; card.json holds exactly these fields.

    `split` names how cells were divided; every figure in `metrics` is [estimate, low, high], 95% by subject
    bootstrap, on held-out subjects. `operating_points`: name -> {threshold, sensitivity, specificity}.
    `subjects`: held-out subjects as [subject, y_true, n cells, n called ALL at the default operating point].
    """

    name: str
    title: str
    architecture: str
    framing: FrameSpec
    positive_class: str
    summary: str
    data: dict
    split: dict
    training: dict
    metrics: dict
    operating_points: dict
    temperature: float
    subjects: list
    limits: list
    weights_sha256: str
    licence: str
    versions: dict

    @property
    def threshold(self) -> float:
        return self.operating_points["default"]["threshold"]

    @classmethod
    def read(cls, path: Path) -> Card:
        try:
            fields = json.loads(path.read_text("utf-8"))
            return cls(**fields | {"framing": FrameSpec(**fields["framing"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is no readable card: {error}") from error

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", "utf-8")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified folder. Nothing in it is ever executed or unpickled."""

    path: Path
    card: Card

    @property
    def name(self) -> str:
        return self.card.name

    @cached_property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    def keras_model(self):
        """The Keras model with these weights, for gradients and for training on. Imports Keras (seconds)."""
        import model_zoo
        from model_zoo._onnx import fill_model

        model = model_zoo.find_architecture(self.card.architecture).build(input_size=self.card.framing.size)
        fill_model(model, self.weights)
        return model


def hash_weights(path: Path) -> str:
    """SHA-256 of a weights file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint folder.

    Raises:
        CheckpointError: no card, no weights, or weights that are not the ones the card was measured with.
    """
    path = Path(path)
    checkpoint = Checkpoint(path=path, card=Card.read(path / "card.json"))
    if not checkpoint.weights.is_file():
        raise CheckpointError(f"{path} has a card but no {WEIGHTS}. Train it, or fetch the complete folder.")
    found = hash_weights(checkpoint.weights)
    if found != checkpoint.card.weights_sha256:
        raise CheckpointError(
            f"{checkpoint.weights} was altered: its SHA-256 starts {found[:12]}, "
            f"the card says {checkpoint.card.weights_sha256[:12]}. Restore the folder or train again."
        )
    return checkpoint


def list_checkpoints(root: Path = BUNDLED) -> list[Card]:
    """Cards of every folder with weights under `root`, best held-out AUROC first. Weights are not read."""
    folders = sorted(weights.parent for weights in root.glob(f"*/{WEIGHTS}"))
    cards = [Card.read(folder / "card.json") for folder in folders if not folder.name.startswith(".")]  # ".": being written
    return sorted(cards, key=lambda card: -card.metrics["auroc"][0])


def find_checkpoint(name: str, root: Path = BUNDLED) -> Checkpoint:
    """Load a bundled checkpoint by name.

    Raises:
        CheckpointError: unknown name; the known ones are listed.
    """
    known = [card.name for card in list_checkpoints(root)]
    if name not in known:
        raise CheckpointError(f"There is no checkpoint {name!r}. Known: {', '.join(known) or 'none'}.")
    return load_checkpoint(root / name)


def default_checkpoint(root: Path = BUNDLED) -> str:
    """Name of the checkpoint that opens first: EfficientNetB3 where it is bundled, else the best one.

    Raises:
        CheckpointError: there is none at all.
    """
    names = [card.name for card in list_checkpoints(root)]
    if not names:
        raise CheckpointError(f"{root} holds no checkpoint. Train one: python -m training training/recipes/mobilenet_v2.toml")
    return "efficientnet_b3" if "efficientnet_b3" in names else names[0]
