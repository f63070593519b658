"""What one browser session knows. The only file that names session_state keys."""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import io
import itertools
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import streamlit as st
from filelock import FileLock, Timeout
from PIL import Image
from streamlit import runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

from inference.cells import CellResult, score_files
from inference.engine import WORKERS, Engine
from inference.images import crop_cell, frame_cell, patient_of
from inference.sources import Source, open_files
from ui import resources

WINDOW = 450  # px kept of a cell: C-NMC's own canvas, so that any checkpoint's framing can be cut from it
THUMB = 112
_TURN_SECONDS = 1.2  # how long one script run scores before the screen is drawn again
_SAME = "The same picture as {}: counted once."
_PREFIX = "blastoscope-case-"  # of the folders below that hold windows


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays of a scored cell: a small picture in memory (a data URL), the window at native scale on disk.

    `number` counts the cells in order of arrival.
    """

    number: int
    thumb: str
    file: Path

    def window(self) -> np.ndarray:
        """uint8 (450, 450, 3), the cell centred at native scale."""
        return np.asarray(Image.open(self.file))


@dataclass(kw_only=True)
class Patient:
    """What became of one patient's files: scored cells, how many files were refused, how many wait."""

    cells: list[CellResult] = field(default_factory=list)
    refused: int = 0
    waiting: int = 0


def _hold_folder(parent: Path) -> Path:
    """A new folder for this process's windows; those that killed processes left in `parent` go first.

    Each folder has a lock that its process holds while it lives. Process numbers would not do: after a restart of a
    container they are given again, and containers that share a folder do not see each other's.
    """
    for left in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, Timeout):  # another user's, or in use
            if time.time() - left.stat().st_mtime > 5:  # else its process may be about to take the lock
                with FileLock(left / "lock", blocking=False):
                    shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
    lock = FileLock(folder / "lock", thread_local=False)
    lock.acquire()

    def leave():
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()

    atexit.register(leave)
    return folder


@functools.cache
def _windows_folder() -> Path:
    return _hold_folder(Path(tempfile.gettempdir()))


@dataclass
class Case:
    """The cells of one session, and what is still to be scored.

    The folder of windows is deleted some minutes after the session's tab was closed; nothing else of an upload outlives its
    scoring.
    """

    checkpoint: str
    rotations: int | None = None  # None: as many as the card was measured with
    synthetic: bool = False
    results: list[CellResult] = field(default_factory=list)
    queue: deque[tuple[str, Source, str]] = field(default_factory=deque)  # with the patient before and the upload behind
    rescoring: deque[CellResult] = field(default_factory=deque)
    counted: dict[str, str] = field(default_factory=dict)  # hash of each kept cell -> its file
    batches: dict[str, int] = field(default_factory=dict)  # upload -> which it was of those that came while none was read
    held: list = field(default_factory=list)  # uploads that may still hold bytes
    folder: tempfile.TemporaryDirectory = field(
        default_factory=lambda: tempfile.TemporaryDirectory(dir=_windows_folder(), ignore_cleanup_errors=True)
    )
    windows: itertools.count = field(default_factory=itertools.count)
    numbers: itertools.count = field(default_factory=itertools.count)
    warmed: bool = False
    explained: str = ""  # the network whose explanations were shown last
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
        return self.queue[0][0] if self.queue else ""

    @property
    def scored(self) -> list[CellResult]:
        """In order of arrival, in whatever order they were last scored."""
        return sorted((r for r in self.results if r.p_all is not None), key=_arrival)

    @property
    def refused(self) -> list[CellResult]:
        return [r for r in self.results if r.p_all is None]

    def by_patient(self) -> dict[str, Patient]:
        """Every patient of whom there is a file, also where no cell could be read; in order of arrival."""
        rescoring, queue, scored = tuple(self.rescoring), tuple(self.queue), self.scored
        patients = {r.patient: Patient() for r in sorted([*scored, *rescoring], key=_arrival)}
        for result in scored:
            patients[result.patient].cells.append(result)
        for result in self.refused:
            patients.setdefault(result.patient, Patient()).refused += 1
        for name, n in Counter([*(r.patient for r in rescoring), *(name for name, *_ in queue)]).items():
            patients.setdefault(name, Patient()).waiting = n
        return patients

    def add_uploads(self, uploads: list) -> None:
        """Queue uploads that were not seen before. A folder may arrive over several script runs."""
        with self.lock:
            fresh = [u for u in uploads if u.file_id not in self.batches]
            self.held += fresh
            batch = max(self.batches.values(), default=0) + (not self.queue)  # while one is read, more of it may arrive
            for upload in fresh:
                self.batches[upload.file_id] = batch
                name = upload.name.replace("%22", '"')  # as browsers write a quotation mark
                self._enqueue(open_files([(name, _reader(upload))]), upload.file_id)

    @property
    def joined(self) -> list[str]:
        """Patients whose cells came in several uploads, one after the other was read."""
        patients = self.by_patient().items()
        return [name for name, p in patients if len({self.batches.get(cell.upload) for cell in p.cells}) > 1]

    def take_out(self, uploads: set[str]) -> None:
        """Forget what came in these uploads, read or not. A cell of which another upload brought a copy, refused as such, stays
        as that one's."""
        with self.lock:
            self.queue = deque(entry for entry in self.queue if entry[-1] not in uploads)
            copies = {r.hash: r for r in reversed(self.refused) if r.hash and r.upload not in uploads}
            heirs = {}
            for row in (*self.results, *self.rescoring):
                if row.upload in uploads and row.kept:
                    if row.hash in copies:
                        heirs[row.hash] = copies[row.hash]
                        self.counted[row.hash] = copies[row.hash].file
                    else:
                        del self.counted[row.hash]
                        row.kept.file.unlink(missing_ok=True)
            self.results = list(_without(uploads, heirs, self.results))
            self.rescoring = deque(_without(uploads, heirs, self.rescoring))

    def add_demo(self) -> None:
        cells = [pair for patient in resources.demo().values() for pair in patient]
        with self.lock:
            self.synthetic = True
            self._enqueue(open_files((name, lambda d=data: d) for name, data in cells))

    def _enqueue(self, sources: Iterator[Source], upload: str = "") -> None:
        self.queue.extend((patient_of(source.name), source, upload) for source in sources)

    def engine(self) -> Engine:
        """What scores these cells."""
        return resources.engine(self.checkpoint, self.rotations)

    def switch(self, checkpoint: str, rotations: int | None) -> None:
        """Have every kept cell scored again, by another checkpoint or over other rotations."""
        with self.lock:
            self.checkpoint, self.rotations = checkpoint, rotations
            self.rescoring.extend(self.scored)
            self.results = self.refused

    def advance(self, first: int | None = None) -> None:
        """Score what waits for about a second, on every core; the cell of that number first."""
        self.engine()  # loads it where that is still to be done: not within the second
        with self.lock:
            engine = self.engine()  # again: a click may have switched it while this run waited
            self.rescoring = deque(sorted(self.rescoring, key=lambda r: (_arrival(r) != first, _arrival(r))))
            end = time.monotonic() + _TURN_SECONDS  # from here: whoever waited for the lock has its turn, too
            while self.rescoring and time.monotonic() < end:
                with _next(self.rescoring, max(WORKERS, 32 // engine.rotations)) as part, ThreadPoolExecutor(WORKERS) as pool:
                    self.results += pool.map(lambda r: self._score_again(r, engine), part)
            while self.queue and time.monotonic() < end:
                with _next(self.queue, max(WORKERS, 16 // engine.rotations)) as part:
                    rows = self._score([source for _, source, _ in part], engine)
                    self.results += [replace(row, upload=upload) for row, (*_, upload) in zip(rows, part, strict=True)]

    def _score(self, sources: list[Source], engine: Engine) -> list[CellResult]:
        """A row each, in order. A picture that was counted before, or that could not be kept, is a refused one."""
        rows = []
        for row in score_files(sources, engine, keep=self._keep):
            if row.p_all is None:
                pass
            elif isinstance(row.kept, OSError):
                reason = row.kept.strerror or row.kept
                row = _refuse(row, f"it could not be kept ({reason}). Make room on this machine's disk, and add it again.")
            elif row.hash in self.counted:
                row.kept.file.unlink(missing_ok=True)
                row = _refuse(row, _SAME.format(self.counted[row.hash]))
            else:
                row = replace(row, kept=replace(row.kept, number=next(self.numbers)))
                self.counted[row.hash] = row.file
            rows.append(row)
        return rows

    def _score_again(self, result: CellResult, engine: Engine) -> CellResult:
        try:
            p_all, _ = engine.predict(frame_cell(result.kept.window(), engine.card.framing)[None])
        except Exception as error:  # its window is gone, no memory: the others go on
            self.counted.pop(result.hash, None)
            return _refuse(result, f"it could not be read again ({type(error).__name__}). Add it once more.")
        return result.read_by(engine, float(p_all[0]))

    def close(self) -> None:
        """Forget everything, the windows on disk and what was not read yet, too."""
        with self.lock:
            for upload in self.held:
                _empty(upload)
            self.queue.clear()
            self.rescoring.clear()
            self.results.clear()
            self.folder.cleanup()

    def _keep(self, image: np.ndarray, box: tuple) -> Kept | OSError:
        """Several threads do this at once, so that the number of the cell is given later; an error is handed on as it is."""
        window = Image.fromarray(crop_cell(image, WINDOW, box=box))
        file = Path(self.folder.name) / f"{next(self.windows)}.png"
        try:
            window.save(file, compress_level=1, compress_type=3)  # run lengths: a quarter smaller, as quick
        except OSError as error:
            file.unlink(missing_ok=True)
            return error
        edge = (WINDOW - 300) // 2
        small = window.crop((edge, edge, WINDOW - edge, WINDOW - edge)).resize((THUMB, THUMB), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=85, method=2)
        thumb = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return Kept(number=-1, thumb=thumb, file=file)


@contextlib.contextmanager
def _next(waiting: deque, n: int):
    """Its first n. They leave it once they have rows, so that nobody who draws meanwhile takes all for read; and also after
    an error, which would come again with every run."""
    part = list(itertools.islice(waiting, n))
    try:
        yield part
    finally:
        for _ in part:
            waiting.popleft()


def _arrival(result: CellResult) -> int:
    return result.kept.number


def _without(uploads: set[str], heirs: dict[str, CellResult], rows: Iterable[CellResult]) -> Iterator[CellResult]:
    """The rows without those of the uploads; a cell that has an heir takes its place, and other copies are copies of it."""
    for row in rows:
        heir = heirs.get(row.hash)
        if row.upload in uploads:
            if heir and row.kept:
                yield replace(row, file=heir.file, patient=heir.patient, upload=heir.upload)
        elif row is not heir:
            yield replace(row, note=_SAME.format(heir.file)) if heir else row


def _refuse(result: CellResult, why: str) -> CellResult:
    return replace(result, p_all=None, call="refused", note=why, kept=None)


def _empty(upload) -> None:
    """Streamlit keeps the list of uploads, and what is in it, as long as the session."""
    upload.seek(0)
    upload.truncate()


def _reader(upload):
    """Bytes of an upload, given back to the server's memory once they are read."""
    context = get_script_run_ctx()

    def read() -> bytes:
        data = upload.getvalue()
        _empty(upload)
        if context is not None:
            context.uploaded_file_mgr.remove_file(context.session_id, upload.file_id)
        return data

    return read


_open: weakref.WeakValueDictionary[str, Case] = weakref.WeakValueDictionary()  # by session


def _begin(new: Case) -> None:
    st.session_state["case"] = new
    if runtime.exists():
        _open[get_script_run_ctx().session_id] = new
        _watch_tabs()


@functools.cache
def _watch_tabs() -> None:
    """Close cases some minutes after their tabs: Streamlit itself forgets a session only when another one ends."""

    def watch():
        since: dict[str, float] = {}
        while True:
            time.sleep(30)
            with contextlib.suppress(Exception):  # as when a session begins meanwhile: the next round does it
                _close_gone(runtime.get_instance().is_active_session, since, time.monotonic())

    threading.Thread(target=watch, daemon=True, name="tabs").start()


def _close_gone(is_active: Callable[[str], bool], since: dict[str, float], now: float) -> None:
    """`since`: when each session that has no tab was first found so. Streamlit would still take its tab back for a while."""
    kept_for = st.get_option("server.disconnectedSessionTTL") + 30
    for session, found in list(_open.items()):
        if is_active(session):
            since.pop(session, None)
        elif now - since.setdefault(session, now) > kept_for:
            found.close()
            _give_back(session)
            del _open[session], since[session]


def _give_back(session: str) -> None:
    """The server's copies of a session's uploads."""
    if runtime.exists():
        runtime.get_instance().uploaded_file_mgr.remove_session_files(session)


def case() -> Case:
    """This session's case; an empty one at first. Where its network was taken back, the default reads it again."""
    if "case" not in st.session_state:
        _begin(Case(checkpoint=resources.cards()[0].name))
    found = st.session_state["case"]
    if found.checkpoint not in [card.name for card in resources.cards()]:
        found.switch(resources.cards()[0].name, found.rotations)
    return found


def new_case() -> None:
    """Forget every cell, and the uploads with them."""
    old = case()
    old.close()
    if context := get_script_run_ctx():
        _give_back(context.session_id)
    _begin(Case(checkpoint=old.checkpoint, rotations=old.rotations))
    _renew_uploader()
    st.session_state.pop("selected", None)


def enter(page: str) -> None:
    """Note which page is drawn."""
    if st.session_state.get("page") != page:
        st.session_state["page"] = page
        _renew_uploader()


def ways_box(ways: Sequence[str]) -> dict:
    """Arguments of the control that chooses how to add cells."""
    return keep("way", ways) | {"on_change": _renew_uploader}


def uploader_box() -> dict:
    """Arguments of the uploader. A file that is taken out of its list leaves the case, too.

    Whatever draws the uploader anew gives it another key: an old list must not be taken for one that lost its files.
    """
    key = f"uploader {st.session_state.get('uploads', 0)}"
    remember("listed", key, _listed(key))

    def changed():
        before, now = remembered("listed", key), _listed(key)
        if gone := (before or set()) - now:
            case().take_out(gone)

    return {"key": key, "on_change": changed}


def _listed(key: str) -> set[str]:
    """Ids of the uploads in the list, also of those that were read and given back."""
    return {upload.file_id for upload in st.session_state.get(key) or ()}


def _renew_uploader() -> None:
    st.session_state["uploads"] = st.session_state.get("uploads", 0) + 1


def select(number: int) -> None:
    """Choose the cell that Explain and Layers show, by `Kept.number`."""
    st.session_state["selected"] = number


def open_in_box(number: int) -> dict:
    """Arguments of the box that shows the open cell; what is chosen there is opened.

    The key gives the box one identity while its options still grow and move, so that a choice made meanwhile counts.
    """
    st.session_state["cell"] = number
    return {"key": "cell", "on_change": lambda: select(st.session_state["cell"])}


def selected() -> CellResult | None:
    """The chosen cell, else the first scored one, else None."""
    cells, number = case().scored, selected_number()
    return next((r for r in cells if r.kept.number == number), cells[0] if cells else None)


def selected_number() -> int | None:
    """`Kept.number` of the chosen cell, which may still wait to be scored again; None before one is chosen."""
    return st.session_state.get("selected")


def network_box() -> dict:
    """Arguments of the box that shows the case's network; a change has the case scored again.

    As of `open_in_box`: with a key it stays one box while what it shows changes, or every second choice would be lost.
    """
    st.session_state["network"] = case().checkpoint
    return {"key": "network", "on_change": lambda: case().switch(st.session_state["network"], case().rotations)}


def rotations_box(measured: int) -> dict:
    """As `network_box`, of the box that shows whether cells are averaged over 8 rotations; `measured` is what the card was."""
    st.session_state["averaged"] = (case().rotations or measured) == 8
    return {
        "key": "averaged",
        "on_change": lambda: case().switch(case().checkpoint, 8 if st.session_state["averaged"] else 1),
    }


def keep(key: str, options: Sequence) -> dict:
    """As `stay`, of a box with options; the first one stands in for a choice that is gone."""
    chosen = st.session_state.get(key)
    st.session_state[key] = chosen if chosen in options else options[0]
    return stay(key)


def stay(key: str) -> dict:
    """Arguments of a widget whose value survives a change of page."""
    return {"key": key, "persist_state": "session"}


def step_layer(names: list[str], step: int) -> None:
    """Go to the next (1) or previous (-1) layer; stay at the ends."""
    place = names.index(st.session_state["layer"]) + step
    st.session_state["layer"] = names[min(max(place, 0), len(names) - 1)]


def follow_default() -> None:
    """After a change of the default: everyone's menus are read anew, and this session's case goes with it."""
    resources.cards.clear()
    resources.systems.clear()
    found, default = case(), resources.cards()[0].name
    if found.checkpoint != default:
        found.switch(default, found.rotations)


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


def keep_compared(names: list[str]) -> None:
    """Drop runs that can no longer be compared."""
    st.session_state["compared"] = [name for name in st.session_state.get("compared", []) if name in names]


def leave_remark(text: str) -> None:
    """Say on the next drawing of the screen why a button could not do its work."""
    st.session_state["remark"] = text


def take_remark() -> str:
    """The remark left, once; "" when there is none."""
    return st.session_state.pop("remark", "")
