"""A checkpoint: a folder with model.onnx (graph and weights), card.json, and what its training left behind.

Large weights lie in model.0.bin, model.1.bin, ... beside model.onnx. A folder may also hold a card without weights: what
was measured, not to be read cells with; or, of an ensemble, a card that names its members, folders beside it.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from model_zoo._errors import CheckpointError
from model_zoo._files import write_json

BUNDLED = Path(__file__).parent / "checkpoints"
WEIGHTS = "model.onnx"
TRAINED_ON = "trained_on.txt"  # hashes of the cells that trained it, see `inference.images.cell_hash`


@dataclass(frozen=True, kw_only=True)
class FrameSpec:
    """How a cell is framed for a network: `crop` pixels at native scale around the cell, resized once to `size`."""

    crop: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known about a checkpoint; card.json holds exactly these fields.

    `split` names how cells were divided; every figure in `metrics` is [estimate, low, high], 95% by subject
    bootstrap, on held-out subjects: auroc, sensitivity, specificity, ... and whatever else was measured.
    `operating_points`: name -> {threshold, sensitivity, specificity}.
    `subjects`: held-out subjects as [subject, y_true, n cells, n called ALL at the default operating point].
    `weights_sha256`: of all weights files together, see `hash_weights`, or of all members', see `hash_members`; "" where there
    are none. `rotations`: views of a cell whose logits are averaged. `members`: checkpoints whose logits an ensemble
    averages; they cut the same window, which is the ensemble's framing, and each resizes it for itself.
    `paper`: "000" to "004", or "" for ours.
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
    rotations: int = 1
    members: list = field(default_factory=list)
    paper: str = ""

    @property
    def threshold(self) -> float:
        return self.operating_points["default"]["threshold"]

    @classmethod
    def read(cls, path: Path) -> Card:
        try:
            fields = json.loads(path.read_text("utf-8"))
            card = cls(**fields | {"framing": FrameSpec(**fields["framing"])})
            float(card.metrics["auroc"][1]), float(card.threshold), str(card.split["protocol"])  # what every list reads
            return card
        except FileNotFoundError:
            raise CheckpointError(
                f"{path.parent} holds no {path.name}: it is no checkpoint, nor a run that finished."
            ) from None
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise CheckpointError(f"{path} is no readable card: {error}") from error

    def write(self, path: Path) -> None:
        """Write it whole or not at all: a folder with half a card would be no checkpoint, nor room for one."""
        write_json(path, dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified folder. Nothing in it is ever executed or unpickled.

    `members`: the networks of an ensemble, which has no weights of its own; () for any other.
    """

    path: Path
    card: Card
    members: tuple[Checkpoint, ...] = ()

    @property
    def networks(self) -> tuple[Checkpoint, ...]:
        """The networks that read a cell: the members, or itself."""
        return self.members or (self,)

    @property
    def name(self) -> str:
        return self.card.name

    @cached_property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @cached_property
    def trained_on(self) -> dict[str, tuple[float, bool] | None]:
        """Hash of every cell that trained it, or chose its epoch or operating point, or a member's -> P(ALL) and whether it was
        called ALL by a network that was trained without its person; None where none was. Empty where its run did not write
        them (up to 0.18.0).

        Raises:
            CheckpointError: the files that tell it are damaged.
        """
        lists, table = [network.path / TRAINED_ON for network in self.networks], self.path / "predictions.csv"
        try:
            known = {line: None for file in lists if file.exists() for line in file.read_text("ascii").split()}
            # of one network, or of an image-level split, what was held out is another picture than what trained
            others = self.card.training.get("networks", 1) > 1 and not self.card.split["protocol"].startswith("image")
            if known and others and table.exists():
                with table.open(newline="", encoding="utf-8") as file:
                    rows = [row for row in csv.DictReader(file) if row.get("cell_hash") in known]
                read = [(row["cell_hash"], float(row["p_all"]), float(row["threshold"])) for row in rows]
                known |= {cell: (p_all, p_all >= threshold) for cell, p_all, threshold in read}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: {TRAINED_ON} or {table.name} is damaged ({error}). Restore the folder."
            ) from error
        return known

    def keras_model(self):
        """The Keras model with these weights, for gradients and for training on. Imports Keras (seconds)."""
        import model_zoo
        from model_zoo._onnx import fill_model

        model = model_zoo.find_architecture(self.card.architecture).build(input_size=self.card.framing.size)
        fill_model(model, self.weights)
        return model


def weights_files(path: Path) -> list[Path]:
    """The set of files that are one network's weights: `path` (model.onnx), model.0.bin, model.1.bin, ... as there are."""
    shards = {int(f.suffixes[-2][1:]): f for f in path.parent.glob(f"{path.stem}.*.bin") if f.suffixes[-2][1:].isdigit()}
    return [path, *(shards[number] for number in sorted(shards))]


def hash_weights(path: Path) -> str:
    """SHA-256 of a network's weights files one after another, hexadecimal."""
    digest = hashlib.sha256()
    for part in weights_files(path):
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def hash_members(hashes: list[str]) -> str:
    """SHA-256 of an ensemble's members, from theirs, hexadecimal."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint folder.

    Raises:
        CheckpointError: no card, no weights, or weights that are not the ones the card was measured with.
    """
    path = Path(path)
    card = Card.read(path / "card.json")
    told = [Card.read(path.parent / name / "card.json") for name in card.members]
    if any(member.members or member.framing.crop != card.framing.crop for member in told):
        raise CheckpointError(f"{path} joins ensembles, or networks that see different windows. Make it again from others.")
    members = tuple(load_checkpoint(path.parent / name) for name in card.members)
    checkpoint = Checkpoint(path=path, card=card, members=members)
    if not members and not card.weights_sha256:
        raise CheckpointError(
            f"{path} has figures and no network: its run measured the recipe and kept none. Train it with refit = true, or as "
            "one fold."
        )
    if not members and not checkpoint.weights.is_file():
        raise CheckpointError(f"{path} has a card but no {WEIGHTS}. Train it, or fetch the complete folder.")
    found = hash_members([m.card.weights_sha256 for m in members]) if members else hash_weights(checkpoint.weights)
    if found != card.weights_sha256:
        what = f"{path}: a member" if members else f"{checkpoint.weights}"
        raise CheckpointError(
            f"{what} was altered, or a file beside it is missing: its SHA-256 starts {found[:12]}, "
            f"the card says {card.weights_sha256[:12]}. Restore the folder or train again."
        )
    return checkpoint


def runs_folder() -> Path:
    """Where training runs and promoted checkpoints live: $BLASTOSCOPE_RUNS, else runs/ of the repository."""
    return Path(os.environ.get("BLASTOSCOPE_RUNS") or Path(__file__).parents[1] / "runs").resolve()


def promoted_folder() -> Path:
    """The checkpoints that a person made the default of this laboratory; `training.promotion` writes it."""
    return runs_folder() / "promoted"


def promoted_names() -> list[str]:
    """Promoted checkpoints that are still there, the one promoted last at the end: it is the default."""
    try:
        names = [entry["name"] for entry in json.loads((promoted_folder() / "history.json").read_text("utf-8"))]
        return [name for name in names if (promoted_folder() / name / "card.json").is_file()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{promoted_folder() / 'history.json'} cannot be read ({error}). Delete it or restore it."
        ) from error


def list_checkpoints(root: Path | None = None) -> list[Card]:
    """Cards of every folder with weights, and of every ensemble of such, under `root` (bundled and promoted), best AUROC first.

    No weights are read.
    """
    cards = list_cards(root)
    whole = {card.name for card in cards if (card_folder(card.name, root) / WEIGHTS).is_file()}
    return [card for card in cards if card.name in whole or (card.members and whole.issuperset(card.members))]


def list_cards(root: Path | None = None) -> list[Card]:
    """Cards of every folder under `root` (bundled and promoted), with or without weights, best held-out AUROC first.

    A promoted card that cannot be read is left out, see `damaged_promotions`: it must not take the app with it.
    """
    folders = sorted(file.parent for file in (root or BUNDLED).glob("*/card.json"))
    cards = [Card.read(folder / "card.json") for folder in folders if not folder.name.startswith(".")]  # being written
    if root is None:
        cards += [found for found in map(_read_promoted, promoted_names()) if isinstance(found, Card)]
    return sorted(cards, key=lambda card: -card.metrics["auroc"][0])


def damaged_promotions() -> list[CheckpointError]:
    """Why promoted cards are missing in `list_cards`, one error each."""
    return [found for found in map(_read_promoted, promoted_names()) if isinstance(found, CheckpointError)]


def _read_promoted(name: str) -> Card | CheckpointError:
    try:
        return Card.read(promoted_folder() / name / "card.json")
    except CheckpointError as error:
        return error


def card_folder(name: str, root: Path | None = None) -> Path:
    """Where a card of `list_cards` lies: a promoted checkpoint on its own shelf, any other among the bundled."""
    return (root or (promoted_folder() if name in promoted_names() else BUNDLED)) / name


def find_checkpoint(name: str, root: Path | None = None) -> Checkpoint:
    """Load a checkpoint by name, bundled or promoted, or of `root`.

    Raises:
        CheckpointError: unknown name; the known ones are listed.
    """
    known = [card.name for card in list_checkpoints(root)]
    if name not in known:
        raise CheckpointError(f"There is no checkpoint {name!r}. Known: {', '.join(known) or 'none'}; or give a folder.")
    return load_checkpoint(card_folder(name, root))


def default_checkpoint(root: Path | None = None) -> str:
    """Name of the checkpoint that opens first: the one promoted last, else the one that is surest to be good.

    That is the highest lower end of the interval of AUROC on unseen subjects: a high figure on few persons does not win.
    Ensembles, which take the time of all their members, and networks that were shown pictures of the subjects they were
    measured on, if without labels, are for who asks for them.

    Raises:
        CheckpointError: there is none at all.
    """
    cards = list_checkpoints(root)
    if not cards:
        raise CheckpointError(
            f"{root or BUNDLED} holds no checkpoint. Train one: python -m training training/recipes/mobilenet_v2.toml"
        )
    known = {card.name for card in cards}
    if root is None and (promoted := [name for name in promoted_names() if name in known]):
        return promoted[-1]

    def rank(card: Card) -> tuple:
        by_subject = not card.split["protocol"].startswith("image")
        return by_subject, not card.members, not card.split.get("seen_unlabelled"), card.metrics["auroc"][1]

    return max(cards, key=rank).name
