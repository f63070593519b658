"""Score a stream of files: the one function behind the Case page and `python -m inference`."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from inference.engine import WORKERS, Engine
from inference.errors import GateError, InputError
from inference.gate import describe_unlike, inspect_cell
from inference.images import cell_hash, decode_image, frame_cell, patient_of
from inference.sources import Source


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One file's row.

    Attributes:
        file, patient: cleaned for showing.
        p_all: calibrated probability, None when refused.
        call: "ALL", "HEM" (at the checkpoint's operating point) or "refused".
        note: one sentence or several; empty for an ordinary cell. Those on `picture`, then how it differs from the cells that
            the network knows.
        picture: what is to be said of the picture, whatever the network.
        kept: what `keep` returned for this cell; None when refused.
        measures: of the cell, see `inference.gate.MEASURES`; () when refused.
        hash: of the cell's pixels, see `inference.images.cell_hash`; "" when refused.
        trained: whether this very picture took part in the network's training, so that `p_all` says nothing of new patients.
        held_out: then, P(ALL) and whether it was called ALL where its person was held out of training; None where it never was.
        upload: which upload it came from, where the caller says so.
    """

    file: str
    patient: str
    p_all: float | None
    call: str
    note: str
    picture: tuple[str, ...] = ()
    kept: object = None
    measures: tuple[float, ...] = ()
    upload: str = ""
    hash: str = ""
    trained: bool = False
    held_out: tuple[float, bool] | None = None

    def read_by(self, engine: Engine, p_all: float) -> CellResult:
        """This row with what a network says of the cell."""
        note = "; ".join((*self.picture, *describe_unlike(self.measures, engine.card.data.get("usual"))))
        trained, held_out = self.hash in engine.trained_on, engine.trained_on.get(self.hash)
        return replace(self, p_all=p_all, call=engine.call(p_all), note=note, trained=trained, held_out=held_out)

    @property
    def told(self) -> str:
        """Note and remark."""
        return "; ".join(filter(None, (self.note, self.remark)))

    @property
    def remark(self) -> str:
        """A sentence where this cell took part in the network's training; else empty."""
        if not self.trained or self.p_all is None:
            return ""
        unseen = f"; when held out, it read {probability(self.held_out[0], digits=3)}" if self.held_out else ""
        return f"this cell took part in the network's training, so its P(ALL) says nothing of new patients{unseen}"


def score_file(source: Source, engine: Engine, keep: Callable[[np.ndarray, tuple], object] | None = None) -> CellResult:
    """Read, check, frame and score one file. Bad input becomes a refused row, never an exception.

    `keep` is called with the decoded image and the box of the cell in it.
    """
    row = CellResult(file=source.name, patient=patient_of(source.name), p_all=None, call="refused", note="")
    try:
        image, notes = decode_image(source.read(), name=source.name)
        quality = inspect_cell(image)
        if quality.kind == "refused":
            raise GateError(source.name, quality.reasons[0])
        framed = frame_cell(image, engine.card.framing, box=quality.box)
        p_all = float(engine.predict(framed[None])[0][0])
        kept = keep(image, quality.box) if keep else None
    except InputError as error:
        return replace(row, note=error.sentence)
    except Exception as error:  # no memory, a runtime's own: the other files go on
        return replace(row, note=f"it could not be scored ({type(error).__name__}). Add it again.")
    row = replace(row, picture=(*notes, *quality.reasons), measures=quality.measures, kept=kept)
    return replace(row, hash=cell_hash(image, box=quality.box)).read_by(engine, p_all)


def score_files(
    sources: Iterable[Source], engine: Engine, keep: Callable[[np.ndarray, tuple], object] | None = None
) -> Iterator[CellResult]:
    """`score_file` over a stream, on every core, in order; at most a few files are in memory at once."""
    sources = iter(sources)
    with ThreadPoolExecutor(WORKERS) as pool:
        running = deque(pool.submit(score_file, s, engine, keep) for s in itertools.islice(sources, 2 * WORKERS))
        try:
            while running:
                result = running.popleft().result()
                running.extend(pool.submit(score_file, s, engine, keep) for s in itertools.islice(sources, 1))
                yield result
        finally:  # the consumer left: do not start what was queued
            for future in running:
                future.cancel()


def probability(p_all: float, threshold: float = 0.5, digits: int = 2) -> str:
    """0.987 as "0.99"; what would round to 0 or 1 as "<0.01" or ">0.99", since no network is certain. As many more digits as
    it takes to tell on which side of the operating point it lies: 0.496 is called HEM, and "0.50" would not be."""
    while digits < 6 and (round(p_all, digits) >= threshold) != (p_all >= threshold):
        digits += 1
    least = 10**-digits
    if p_all < least / 2:
        return f"<{least:.{digits}f}"
    return f">{1 - least:.{digits}f}" if p_all >= 1 - least / 2 else f"{p_all:.{digits}f}"
