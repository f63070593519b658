"""Networks: one file an architecture, one folder a checkpoint. Importing this package does not import Keras."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from model_zoo._checkpoint import (
    Card,
    Checkpoint,
    FrameSpec,
    card_folder,
    damaged_promotions,
    default_checkpoint,
    find_checkpoint,
    list_cards,
    list_checkpoints,
    load_checkpoint,
    promoted_folder,
    promoted_names,
    runs_folder,
)
from model_zoo._errors import BlastoscopeError, CheckpointError, UnknownArchitectureError, WeightsError

__all__ = [
    "BlastoscopeError",
    "Card",
    "Checkpoint",
    "CheckpointError",
    "FrameSpec",
    "UnknownArchitectureError",
    "WeightsError",
    "architecture_names",
    "architectures",
    "card_folder",
    "damaged_promotions",
    "default_checkpoint",
    "find_architecture",
    "find_checkpoint",
    "list_cards",
    "list_checkpoints",
    "load_checkpoint",
    "promoted_folder",
    "promoted_names",
    "runs_folder",
]


def architecture_names() -> list[str]:
    """Every file that holds an architecture, or a family of them; imports none."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find_architecture(name: str):
    """The `Architecture` of model_zoo/<name>.py; "file.variant" is one of that file's VARIANTS. Imports Keras.

    Raises:
        UnknownArchitectureError: no such file or variant; the nearest name is offered.
    """
    file, _, variant = name.partition(".")
    known = architecture_names()
    if file in known:
        module = importlib.import_module(f"model_zoo.{file}")
        if not variant:
            return module.ARCHITECTURE
        variants = getattr(module, "VARIANTS", {})
        if variant in variants:
            return variants[variant]
        known = [file, *(f"{file}.{v}" for v in variants)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownArchitectureError(f"There is no architecture {name!r}.{hint} Known: {', '.join(known)}.")


def architectures() -> dict:
    """Every `Architecture` by its own name, variants included. Imports Keras."""
    modules = [importlib.import_module(f"model_zoo.{file}") for file in architecture_names()]
    return {entry.name: entry for m in modules for entry in (m.ARCHITECTURE, *getattr(m, "VARIANTS", {}).values())}
