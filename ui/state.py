"""What one browser session knows. The only file that names session_state keys."""

from __future__ import annotations

import base64
import io
import itertools
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import streamlit as st
from PIL import Image
from streamlit.runtime.scriptrunner import get_script_run_ctx

from inference.cells import CellResult, score_files
from inference.engine import WORKERS, Engine
from inference.images import crop_cell, frame_cell, patient_of
from inference.sources import Source, open_files
from ui import resources

WINDOW = 450  # px kept of a cell: C-NMC's own canvas, so that any checkpoint's framing can be cut from it
THUMB = 112
_TURN_SECONDS = 1.2  # how long one script run scores before the screen is drawn again


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays of a scored cell: a small picture in memory (a data URL), the window at native scale on disk."""

    number: int
    thumb: str
    file: Path

    def window(self) -> np.ndarray:
        """uint8 (450, 450, 3), the cell centred at native scale."""
        return np.asarray(Image.open(self.file))


@dataclass
class Case:
    """The cells of one session, and what is still to be scored.

    The folder of windows is deleted with the session; nothing else of an upload outlives its scoring.
    """

    checkpoint: str
    rotations: int | None = None  # None: as many as the card was measured with
    synthetic: bool = False
    results: list[CellResult] = field(default_factory=list)
    queue: deque[Source] = field(default_factory=deque)
    rescoring: deque[CellResult] = field(default_factory=deque)
    seen: set[str] = field(default_factory=set)
    folder: tempfile.TemporaryDirectory = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="blastoscope-"))
    numbers: itertools.count = field(default_factory=itertools.count)
    warmed: bool = False
    # A click starts a new script run while the old one may still be scoring: one at a time touches the lists below.
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> int:
        return len(self.results) + self.waiting

    @property
    def waiting(self) -> int:
        return len(self.queue) + len(self.rescoring)

    @property
    def next_patient(self) -> str:
        """Whose cells are read now; empty when none are."""
        return patient_of(self.queue[0].name) if self.queue else ""

    @property
    def scored(self) -> list[CellResult]:
        return [r for r in self.results if r.p_all is not None]

    @property
    def refused(self) -> list[CellResult]:
        return [r for r in self.results if r.p_all is None]

    def by_patient(self) -> dict[str, list[CellResult]]:
        """Scored cells by patient, in order of arrival."""
        patients: dict[str, list[CellResult]] = {}
        for result in self.scored:
            patients.setdefault(result.patient, []).append(result)
        return patients

    def add_uploads(self, uploads: list) -> None:
        """Queue uploads that were not seen before. A folder may arrive over several script runs."""
        with self.lock:
            fresh = [u for u in uploads if u.file_id not in self.seen]
            self.seen.update(u.file_id for u in fresh)
            self.queue.extend(open_files((u.name, _reader(u)) for u in fresh))

    def add_demo(self) -> None:
        cells = [pair for patient in resources.demo().values() for pair in patient]
        with self.lock:
            self.synthetic = True
            self.queue.extend(open_files((name, lambda d=data: d) for name, data in cells))

    def engine(self) -> Engine:
        """What scores these cells."""
        return resources.engine(self.checkpoint, self.rotations)

    def switch(self, checkpoint: str, first: CellResult | None, rotations: int | None = None) -> None:
        """Have every kept cell scored again, by another checkpoint or over other rotations, the open one first."""
        with self.lock:
            self.checkpoint, self.rotations = checkpoint, rotations
            self.rescoring.extend(sorted(self.scored, key=lambda r: r is not first))
            self.results = self.refused

    def advance(self) -> None:
        """Score what waits for about a second, on every core."""
        self.engine()  # loads it where that is still to be done: not within the second
        end = time.monotonic() + _TURN_SECONDS
        with self.lock:
            engine = self.engine()  # again: a click may have switched it while this run waited
            while self.rescoring and time.monotonic() < end:
                part = [self.rescoring.popleft() for _ in range(min(max(WORKERS, 32 // engine.rotations), len(self.rescoring)))]
                framed = np.stack([frame_cell(r.kept.window(), engine.card.framing) for r in part])
                for result, p_all in zip(part, engine.predict(framed)[0].tolist(), strict=True):
                    self.results.append(replace(result, p_all=p_all, call=engine.call(p_all)))
            while self.queue and time.monotonic() < end:
                part = [self.queue.popleft() for _ in range(min(max(WORKERS, 16 // engine.rotations), len(self.queue)))]
                self.results.extend(score_files(part, engine, keep=self._keep))

    def close(self) -> None:
        """Forget everything, the windows on disk too."""
        with self.lock:
            self.queue.clear()
            self.rescoring.clear()
            self.results.clear()
            self.folder.cleanup()

    def _keep(self, image: np.ndarray, box: tuple) -> Kept:
        window = Image.fromarray(crop_cell(image, WINDOW, box=box))
        number = next(self.numbers)
        file = Path(self.folder.name) / f"{number}.png"
        window.save(file, compress_level=1, compress_type=3)  # run lengths: a quarter smaller, as quick
        edge = (WINDOW - 300) // 2
        small = window.crop((edge, edge, WINDOW - edge, WINDOW - edge)).resize((THUMB, THUMB), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=85, method=2)
        return Kept(number=number, thumb=f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", file=file)


def _reader(upload):
    """Bytes of an upload, given back to the server's memory once they are read."""
    context = get_script_run_ctx()

    def read() -> bytes:
        data = upload.getvalue()
        if context is not None:
            context.uploaded_file_mgr.remove_file(context.session_id, upload.file_id)
        return data

    return read


def case() -> Case:
    """This session's case; an empty one at first. Where its network was taken back, the default reads it again."""
    if "case" not in st.session_state:
        st.session_state["case"] = Case(checkpoint=resources.cards()[0].name)
    found = st.session_state["case"]
    if found.checkpoint not in [card.name for card in resources.cards()]:
        found.switch(resources.cards()[0].name, first=None)
    return found


def new_case() -> None:
    """Forget every cell, and the uploads with them."""
    old = case()
    old.close()
    st.session_state["case"] = Case(checkpoint=old.checkpoint, rotations=old.rotations)
    st.session_state["uploads"] = upload_generation() + 1
    st.session_state.pop("selected", None)


def upload_generation() -> int:
    """Part of the uploaders' keys: a new one empties them."""
    return st.session_state.get("uploads", 0)


def select(number: int) -> None:
    """Choose the cell that Explain and Layers show, by `Kept.number`."""
    st.session_state["selected"] = number


def selected() -> CellResult | None:
    """The chosen cell, else the first scored one, else None."""
    cells = case().scored
    number = st.session_state.get("selected")
    return next((r for r in cells if r.kept.number == number), cells[0] if cells else None)


def keep_layer(names: list[str]) -> None:
    """Let the chosen layer survive a change of page; a network without it starts at its first."""
    chosen = st.session_state.get("layer")
    st.session_state["layer"] = chosen if chosen in names else names[0]


def step_layer(names: list[str], step: int) -> None:
    """Go to the next (1) or previous (-1) layer; stay at the ends."""
    place = names.index(st.session_state["layer"]) + step
    st.session_state["layer"] = names[min(max(place, 0), len(names) - 1)]


def follow_default() -> None:
    """After a change of the default: everyone's menus are read anew, and this session's case goes with it."""
    resources.cards.clear()
    found, default = case(), resources.cards()[0].name
    if found.checkpoint != default:
        found.switch(default, first=selected())


def remember(what: str, of, value) -> None:
    """Keep `value`, which was found for `of`, until it is found for another."""
    st.session_state[what] = (of, value)


def remembered(what: str, of):
    """What was kept for `of`, else None."""
    kept_for, value = st.session_state.get(what, (None, None))
    return value if kept_for == of else None


def watch(run: str) -> None:
    """Let the Train page show this run."""
    st.session_state["watched"] = run


def keep_watched(names: list[str]) -> None:
    """Let the choice survive a change of page; of a deleted run it goes to the newest."""
    chosen = st.session_state.get("watched")
    st.session_state["watched"] = chosen if chosen in names else names[0]


def keep_compared(names: list[str]) -> None:
    """Drop runs that can no longer be compared."""
    st.session_state["compared"] = [name for name in st.session_state.get("compared", []) if name in names]


def leave_remark(text: str) -> None:
    """Say on the next drawing of the screen why a button could not do its work."""
    st.session_state["remark"] = text


def take_remark() -> str:
    """The remark left, once; "" when there is none."""
    return st.session_state.pop("remark", "")
