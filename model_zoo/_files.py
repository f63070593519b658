"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(file: Path, tag: str = "") -> Iterator[Path]:
    """A path beside `file` to write to; it becomes `file` when all went well, and goes otherwise.

    A killed process leaves it; the next one writes over it. `tag` tells processes apart that may write `file` at once.
    """
    unfinished = file.with_name(f".{file.name}{tag}.partial")
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_json(file: Path, values) -> None:
    """Write JSON that appears whole or not at all."""
    with whole_file(file) as unfinished:
        unfinished.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
