"""Networks: one file an architecture, one folder a checkpoint. Importing this package does not import Keras."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from model_zoo._checkpoint import (
    Card,
    Checkpoint,
    FrameSpec,
    default_checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from model_zoo._errors import BlastoscopeError, CheckpointError, UnknownArchitectureError

__all__ = [
    "BlastoscopeError",
    "Card",
    "Checkpoint",
    "CheckpointError",
    "FrameSpec",
    "UnknownArchitectureError",
    "architecture_names",
    "architectures",
    "default_checkpoint",
    "find_architecture",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
]


def architecture_names() -> list[str]:
    """Every architecture, by the file it lives in; imports none of them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find_architecture(name: str):
    """The `Architecture` of model_zoo/<name>.py. Imports Keras.

    Raises:
        UnknownArchitectureError: no such file; the nearest name is offered.
    """
    known = architecture_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownArchitectureError(f"There is no architecture {name!r}.{hint} Known: {', '.join(known)}.")
    return importlib.import_module(f"model_zoo.{name}").ARCHITECTURE


def architectures() -> dict:
    """Every `Architecture` by name. Imports Keras."""
    return {name: find_architecture(name) for name in architecture_names()}
