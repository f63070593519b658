"""The table of read cells, one row a file, as the command and the app write it."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

from inference.engine import Engine

COLUMNS = ("file", "patient", "p_all", "call", "note")
MADE_BY = ("checkpoint", "weights_sha256", "operating_point", "rotations", "app_version", "use")
INTENDED_USE = "research and education; not a medical device"


def csv_row(result, engine: Engine) -> list:
    """A row under COLUMNS and MADE_BY: a file, and what made its numbers. Remarks on a scored cell join its note."""
    card, p_all = engine.card, "" if result.p_all is None else f"{result.p_all:.6f}"
    note = "; ".join(filter(None, (result.told, engine.remark if p_all else "")))
    made = [card.name, card.weights_sha256[:16], card.threshold, engine.rotations, app_version(), INTENDED_USE]
    return [inert(result.file), inert(result.patient), p_all, result.call, inert(note), *made]


@functools.cache
def app_version() -> str:
    """Of pyproject.toml, the one place that tells it."""
    return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def inert(text: str) -> str:
    """Text that a spreadsheet would run as a formula, quoted with an apostrophe; any other as it is."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
