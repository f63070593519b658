"""Runs as processes of their own: start, queue, watch, stop, resume, delete. The run folder is the only truth.

A run holds the lock of its folder for as long as it lives, and the lock of its device while it trains. The operating
system lets go of both however the process ends, so a run that says "running" and holds no lock has crashed; process
numbers, which are given out again, are never compared. See docs/decisions/0006-jobs.md.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from model_zoo import Card, runs_folder
from model_zoo._files import write_json
from training.data import Cells
from training.devices import virtual_devices
from training.errors import DataError, RecipeError, RunError, Stopped, why
from training.recipe import Recipe, find_starts, read_recipe, write_recipe
from training.splits import split_into_folds, split_official

REPOSITORY = Path(__file__).resolve().parents[1]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
RESERVED = ("cache", "promoted", "sweeps")  # other things that live beside the runs
SHARED_CPU = "BLASTOSCOPE_SHARED_CPU"  # set where a cluster gives out the processors (training.sweep): no run waits for them
WITHOUT_A_WORD = "Ended without a word: it was killed, the machine went down, or memory ran out."
_FRAMEWORK = re.compile(
    r"[IWE]\d{4}|WARNING: All log messages before absl|To enable the following instructions"
)  # its own talk
_PROBES = 5.0  # seconds; the lock may be busy for a moment because someone looks whether it is held


# --- what a run says of itself ---


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run folder as it stands now.

    Attributes:
        state: queued, running, stopping, stopped, finished, failed, or crashed (it says that it runs, and does not).
        message: what happened, for one that ended early.
        told: run.json. progress: progress.json, {} before the first batch.
    """

    folder: Path
    state: str
    message: str
    told: dict
    progress: dict

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def alive(self) -> bool:
        return self.state in ("queued", "running", "stopping")

    @property
    def waiting(self) -> bool:
        """For a device; once it holds one it reads the cells, and then it is running."""
        return self.state == "queued" and not self.told.get("holds")

    @property
    def resumable(self) -> bool:
        return self.state in ("stopped", "failed", "crashed") and "data" in self.told

    @property
    def finishing(self) -> bool:
        """Asked to end the network in training with its epoch."""
        return (self.folder / "finish").exists()

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe as it runs; None where it cannot be read."""
        kept = self.folder / "recipe.toml"
        with contextlib.suppress(RecipeError):
            return read_recipe(kept if kept.exists() else Path(self.told.get("recipe", "")), variants=False)

    @property
    def card(self) -> Card:
        """Of a finished run. Raises CheckpointError where there is none."""
        return Card.read(self.folder / "card.json")

    def history(self) -> list[dict]:
        """One row an epoch and fold, numbers as float."""
        return read_table(self.folder / "history.csv")

    def subjects(self) -> list[dict]:
        """One row a validation subject, epoch and fold, numbers as float."""
        return read_table(self.folder / "subjects.csv", text=("fold", "subject"))

    def log_tail(self, lines: int = 12) -> str:
        """The end of the log; of what the terminal would have shown, where the run wrote none."""
        for name in ("log.txt", "terminal.txt"):
            if tail := _tail(self.folder / name, lines):
                return tail
        return ""


def run_folder(name: str) -> Path:
    """The folder of the run `name`.

    Raises:
        RunError: no such run, or a name that leads out of the folder of runs.
    """
    folder = runs_folder() / name
    if not NAME.fullmatch(name) or name in RESERVED or folder.is_symlink():
        raise RunError(f"{name!r} is no name of a run: letters, digits, - and _ alone, and no link.")
    if not (folder / "run.json").is_file():
        raise RunError(f"There is no run {name!r} in {runs_folder()}. It may have been deleted.")
    return folder


def read_run(name: str) -> RunState:
    """The run `name`, as it stands now. Raises RunError as `run_folder`."""
    return _read_run(run_folder(name))


def list_runs() -> list[RunState]:
    """Every run, the newest first."""
    root = runs_folder()
    names = sorted(os.listdir(root)) if root.is_dir() else []
    found = []
    for name in names:
        with contextlib.suppress(RunError):  # not one, or deleted just now
            found.append(read_run(name))
    return sorted(found, key=lambda run: run.told.get("started") or run.told.get("queued", ""), reverse=True)


def _read_run(folder: Path) -> RunState:
    told, message = read_json(folder / "run.json"), ""
    state = told.get("state", "crashed")
    if state in ("queued", "running"):
        if not is_alive(folder):
            told = read_json(folder / "run.json")  # it may have ended between the two looks
            state = told.get("state", "crashed")
            if state in ("queued", "running"):
                state, message = "crashed", WITHOUT_A_WORD
        elif (folder / "stop").exists():
            state = "stopping"
    return RunState(
        folder=folder,
        state=state,
        message=message or told.get("message", ""),
        told=told,
        progress=read_json(folder / "progress.json"),
    )


def is_alive(folder: Path) -> bool:
    """Whether a process holds the run's lock."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / "lock")


def read_json(file: Path) -> dict:
    """{} where there is none; files are replaced whole, so none is ever half-written."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_table(file: Path, text: tuple[str, ...] = ("fold",)) -> list[dict]:
    """Rows of a CSV that may be being written, all columns but `text` as float; [] where there is none.

    A last row that is not whole is left for the next look.
    """
    try:
        lines = file.read_text("utf-8").splitlines(keepends=True)
    except OSError:
        return []
    whole = [line for line in lines if line.endswith("\n")]
    return [
        {k: v if k in text else float(v or "nan") for k, v in row.items()}
        for row in csv.DictReader(io.StringIO("".join(whole)))
    ]


def _tail(file: Path, lines: int) -> str:
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - 16_000))
            text = opened.read().decode("utf-8", "replace")
    except OSError:
        return ""
    said = (line.rpartition("\r")[2] for line in text.splitlines() if line.strip() and not _FRAMEWORK.match(line))
    return "\n".join(list(said)[-lines:])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# --- within the run's own process ---


@contextlib.contextmanager
def hold_device(folder: Path, *, resume: bool, devices: int = 1, log: Callable[[str], None] = print, **told):
    """Be the process of the run in `folder`, and wait until a device is free; the run that asked first goes first.

    To be entered before Keras is imported: meanwhile run.json says "queued", and the GPU is neither seen nor filled.
    On leaving, a run that never came to say more is "failed" with the error's message; a folder that this call made
    is removed then.

    Args:
        folder: the run folder. Without `resume` it may be new, or hold a recipe.toml alone.
        devices: how many GPUs it takes, all that CUDA is then told of; without GPUs the one device is the processor.
        log: is told, once, that the run must wait.
        told: what run.json says besides, for a resume of a run that never began: `recipe`, `data`, `tiny`, `changes`.
    Yields:
        Names of the devices held, such as ["cpu"] or ["gpu 0"].
    Raises:
        RunError: the folder is in use, holds a run already, or (with `resume`) none, or a finished one.
        Stopped: a person stopped it while it waited.
    """
    made = not folder.exists()
    if resume and made:
        raise RunError(f"{folder} holds no run. Start one: python -m training RECIPE --out {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    mine = _lock(folder)
    try:
        mine.acquire(timeout=_PROBES, poll_interval=0.01)
    except Timeout:
        raise RunError(f"{folder} is running already, in another process.") from None
    held, unused = {}, False
    try:
        known = read_json(folder / "run.json")
        if resume and not known:
            raise RunError(f"{folder} holds no run. Start one: python -m training RECIPE --out {folder}")
        if resume and known["state"] == "finished":
            raise RunError(f"{folder} is finished. To train again, start its recipe with another --out.")
        if known and not resume and known["state"] == "finished":
            raise RunError(f"{folder} already holds a finished run. Give another --out.")
        if known and not resume:
            raise RunError(f"{folder} already holds a run. Resume it: python -m training {folder}. Or give another --out.")
        (folder / "stop").unlink(missing_ok=True)
        waiting = (
            known | told | {"state": "queued", "message": "", "pid": os.getpid(), "queued": _now(), "ended": "", "holds": []}
        )
        write_json(folder / "run.json", waiting)
        try:
            held = _wait_for(folder, waiting["queued"], devices, log)
            write_json(folder / "run.json", waiting | {"holds": list(held)})
            yield list(held)
        except BaseException as error:
            if read_json(folder / "run.json").get("state") == "queued":  # it never came to say more
                stopped = isinstance(error, Stopped | KeyboardInterrupt)
                ended = {"state": "stopped" if stopped else "failed", "message": why(error), "ended": _now()}
                with contextlib.suppress(OSError):  # a full disk, maybe
                    write_json(folder / "run.json", waiting | ended)
                unused = made and not stopped
            raise
    finally:
        for lock in (*held.values(), mine):
            lock.release()
        if unused:
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for(folder: Path, asked: str, devices: int, log: Callable[[str], None]) -> dict[str, FileLock]:
    """Locks of free devices by name, once no run that asked earlier waits."""
    for tried in itertools.count():
        if (folder / "stop").exists():
            raise Stopped("Stopped while it waited for the device; nothing was trained yet.")
        earlier = (r for r in list_runs() if r.waiting and r.told["queued"] < asked and r.folder != folder.resolve())
        if (SHARED_CPU in os.environ or not any(earlier)) and (held := _take(devices)):
            return held
        if not tried:
            log("Waiting: other runs have this machine's GPUs, or its processor. This one starts when they end.")
        time.sleep(0.5)


def _take(devices: int) -> dict[str, FileLock]:
    """Locks of as many free devices by name, {} where fewer are free; CUDA is told to see no others.

    Raises:
        RunError: the machine has fewer.
    """
    found = gpus()
    virtual = {f"cpu {i}": "" for i in range(1, virtual_devices())}
    names = {f"gpu {gpu['index']}": gpu["uuid"] for gpu in found} or {"cpu": "", **virtual}
    if devices > len(names):
        raise RunError(f"The recipe asks for {devices} GPUs. This machine has {len(found)}.")
    place = runs_folder() / ".devices"
    place.mkdir(parents=True, exist_ok=True)
    held = {}
    for name in names:
        lock = FileLock(place / f"{platform.node()} {name}.lock".replace(" ", "-"))
        with contextlib.suppress(Timeout):
            if SHARED_CPU not in os.environ:
                lock.acquire(timeout=0)
            held[name] = lock
        if len(held) == devices:
            if found:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[name] for name in held)
            return held
    for lock in held.values():
        lock.release()
    return {}


@contextlib.contextmanager
def free_device(devices: int = 1):
    """Hold so many devices for a short while; yields the first one's name, or None while runs hold too many of them.

    Raises:
        RunError: the machine has fewer.
    """
    held = _take(devices)
    try:
        yield next(iter(held), None)
    finally:
        for lock in held.values():
            lock.release()


def gpus() -> list[dict]:
    """GPUs that a process started here would see, as nvidia-smi tells them; [] where there is none.

    Returns:
        {index, uuid, name, memory_mb, used_mb, busy_percent, capability} for each; a figure that the driver withholds is None.
    """
    fields = ("index", "uuid", "name", "memory.total", "memory.used", "utilization.gpu", "compute_cap")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for row in csv.reader(answer.splitlines(), skipinitialspace=True):
        index, uuid, name, *figures = row
        numbers = (float(f) if f.replace(".", "").isdigit() else None for f in figures)
        told = dict(zip(("memory_mb", "used_mb", "busy_percent", "capability"), numbers, strict=True))
        found.append({"index": index, "uuid": uuid, "name": name} | told)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    wanted = [v.strip() for v in visible.split(",")]
    return [gpu for gpu in found if any(v and (v == gpu["index"] or gpu["uuid"].startswith(v)) for v in wanted)]


def describe_device() -> str:
    """The device that a run would take, in words: GPU name and memory, or the processor."""
    found = gpus()
    if found:
        memory = found[0]["memory_mb"]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return f"{found[0]['name']}{f', {memory / 1024:.0f} GB' if memory else ''}{more}"
    return f"CPU, {os.cpu_count()} cores (no NVIDIA GPU was found)"


# --- from outside: what a person does with runs ---


def start_run(recipe: Recipe, data: Path, name: str, *, tiny: bool = False) -> RunState:
    """Start a run in its own process, which outlives this one. Where the name is taken, a number is added.

    Args:
        data: folder of cells within the allowed roots; see `allowed_folder`.
        name: plain text; the folder's name is made from it.
    Raises:
        RunError: the name cannot be used, or the process ended at once. DataError: the folder is refused.
    """
    data = allowed_folder(data)
    find_starts(recipe, data)  # raises
    folder = _claim(name)
    try:
        write_recipe(recipe, folder / "asked.toml")  # the run writes recipe.toml itself
        arguments = [str(folder / "asked.toml"), "--data", str(data), "--out", str(folder), *["--tiny"] * tiny]
        _launch(folder, arguments)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise RunError(f"{folder} cannot be written: {error.strerror}. Free space, then start again.") from error
    except RunError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return _read_run(folder)


def resume_run(name: str) -> RunState:
    """Go on with a run that was stopped, failed or crashed, exactly where it was.

    Raises:
        RunError: it is finished, or running already.
    """
    run = read_run(name)
    if not run.resumable:
        raise RunError(f"Run {name} is {run.state}: only one that was stopped, failed or crashed can go on.")
    allowed_folder(run.told["data"])
    _launch(run.folder, [str(run.folder)])
    return _read_run(run.folder)


def stop_run(name: str) -> None:
    """Ask a run to end; it does within one batch, and keeps its best and last epoch.

    Raises:
        RunError: it does not run.
    """
    run = read_run(name)
    if not run.alive:
        raise RunError(f"Run {name} does not run: it is {run.state}.")
    (run.folder / "stop").touch()


def finish_run(name: str) -> None:
    """Ask a run to end the network in training with this epoch; its best so far is kept and measured. The next trains in full.

    Raises:
        RunError: it does not run.
    """
    run = read_run(name)
    if run.state != "running":
        raise RunError(f"Run {name} trains nothing now: it is {run.state}.")
    (run.folder / "finish").touch()


def delete_run(name: str) -> None:
    """Delete a run folder and all that is in it; promoted copies stay.

    Raises:
        RunError: it runs, may not be deleted, or an ensemble beside it names it.
    """
    folder = run_folder(name)
    for card in folder.parent.glob("*/card.json"):
        if name in read_json(card).get("members", ()):
            raise RunError(f"Run {name} is a member of the ensemble {card.parent}. Delete that folder first.")
    mine = _lock(folder)
    try:
        mine.acquire(timeout=1, poll_interval=0.01)
    except Timeout:
        raise RunError(f"Run {name} is running. Stop it first, then delete it.") from None
    try:
        (folder / "run.json").unlink()  # from here on it is no run, for all who look
    except OSError as error:
        raise RunError(f"{folder} cannot be deleted: {error.strerror}.") from error
    finally:
        mine.release()
    shutil.rmtree(folder, ignore_errors=True)


def _claim(name: str) -> Path:
    """A new folder; making it is what decides between two who start at once."""
    root = runs_folder()
    if "/" in name or "\\" in name or ".." in name:
        raise RunError(f"{name!r} is a path. Give the run a plain name; it is kept in {root}.")
    latin = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()  # Übung: Ubung
    plain = re.sub(r"[^a-z0-9_]+", "-", latin.lower()).strip("-")[:60]
    if not plain or plain in RESERVED:
        raise RunError(f"{name!r} cannot be the name of a run. Use letters and digits.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            folder = root / (plain if number == 1 else f"{plain}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise RunError(f"{root} cannot be written: {error.strerror}. Give its path in BLASTOSCOPE_RUNS.") from error
    raise RunError(f"There are a thousand runs named {plain!r}. Choose another name.")


def run_in_turn(commands: dict[str, list[str]], log: Callable[[str], None]) -> None:
    """`python -m training` with each of these arguments, in a process of its own: its memory, a GPU's too, is given back."""
    found = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    for number, (name, arguments) in enumerate(commands.items(), 1):
        log(f"{number} of {len(commands)}: {name}")
        process = subprocess.Popen([sys.executable, "-m", "training", *arguments], env=os.environ | {"PYTHONPATH": found})
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()  # it was interrupted too, and writes down where it was
            raise


def _launch(folder: Path, arguments: list[str]) -> None:
    """Start `python -m training` in a session of its own, and wait until it has taken the run over."""
    with (folder / "terminal.txt").open("ab") as terminal:
        process = subprocess.Popen(
            [sys.executable, "-m", "training", *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"BLASTOSCOPE_RUNS": str(runs_folder()), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while process.poll() is None and read_json(folder / "run.json").get("pid") != process.pid:
        time.sleep(0.05)
    if process.poll() not in (None, 0) and read_json(folder / "run.json").get("pid") != process.pid:
        said = _tail(folder / "terminal.txt", 3) or f"exit code {process.returncode}"
        raise RunError(f"The run could not start: {said.removeprefix('error: ')}")


def shipped_recipes() -> dict[str, Recipe]:
    """The recipes of training/recipes/ by file name, without `.toml`."""
    return {
        file.stem: read_recipe(file, variants=False) for file in sorted((REPOSITORY / "training" / "recipes").glob("*.toml"))
    }


def check_feasible(recipe: Recipe, data: Path, cells: Cells) -> None:
    """What a run would find wrong once it has a device, told before it waits for one.

    Raises:
        DataError: too few cells for the recipe's split, or no weights to begin with.
    """
    describe_split(recipe, cells)
    find_starts(recipe, data)


def describe_split(recipe: Recipe, cells: Cells) -> str:
    """How a recipe divides these cells, in a sentence.

    Raises:
        DataError: they are too few for it.
    """
    if recipe.protocol == "image_level":
        shares = " / ".join(f"{100 * share:.0f}" for share in recipe.shares)
        return (
            f"Image-level split, {shares} % for training, validation and test: cells of a patient lie on both sides, so the "
            "figures say nothing about unseen patients."
        )
    if recipe.protocol == "official":
        split_official(cells)
        return "Official split: the training folds train, the preliminary test set is measured; no subject is in both."
    held = recipe.test_folds or range(recipe.folds)
    how = "each is held out in turn" if len(held) == recipe.folds > 1 else f"fold {', '.join(map(str, held))} is held out"
    drawn = {"cells": "", "chance": " drawn by chance", "stain": " from the darkest stained to the lightest"}[recipe.folds_by]
    unmeasured = recipe.folds_by == "stain" and cells.darkness is None  # a run measures it; as many subjects lie in each fold
    by = "chance" if unmeasured else recipe.folds_by
    fold_of = split_into_folds(cells, folds=recipe.folds, seed=recipe.seed, by=by)
    subjects = len(set(cells.subjects[np.isin(fold_of, list(held))]))
    if recipe.protocol == "by_subject" and recipe.refit:
        how += "; one more network then trains on all subjects, and is the one to read cells with"
    figures = f"Figures will be of {subjects} subjects the network never saw."
    return f"Split by subject into {recipe.folds} folds{drawn}; {how}. {figures}"


# --- data folders that the app may read ---


def allowed_roots() -> list[Path]:
    """$BLASTOSCOPE_DATA and the folders of $BLASTOSCOPE_DATA_ROOTS (separated as in PATH), links resolved."""
    given = [os.environ.get("BLASTOSCOPE_DATA", ""), *os.environ.get("BLASTOSCOPE_DATA_ROOTS", "").split(os.pathsep)]
    return list(dict.fromkeys(Path(text).resolve() for text in given if text.strip()))


def allowed_folder(path: str | Path) -> Path:
    """`path`, links resolved, if it and all links in it stay within the allowed roots.

    Raises:
        DataError: it does not, is no folder, or no root is set.
    """
    roots, folder = allowed_roots(), Path(path).resolve()

    def inside(place: Path) -> bool:
        return any(place.is_relative_to(root) for root in roots)

    if not roots:
        raise DataError(
            "No data folder is set. Start the app with BLASTOSCOPE_DATA=/path/to/cells, the folder that holds them."
        )
    if not inside(folder):
        raise DataError(
            f"{path} lies outside the data folders of this app ({', '.join(map(str, roots))}). Copy the cells there, or have "
            "whoever runs the app add the folder to BLASTOSCOPE_DATA_ROOTS."
        )
    if not folder.is_dir():
        raise DataError(f"{path} is no folder.")
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            entry = Path(place, name)
            if entry.is_symlink() and not inside(entry.resolve()):
                raise DataError(f"{entry} is a link that leads out of the data folders. Copy what it points to instead.")
    return folder


def list_folders() -> list[Path]:
    """The allowed roots, and the folders directly below them."""
    return [
        folder
        for root in allowed_roots()
        if root.is_dir()
        for folder in (root, *sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    ]


# --- what a run would be like ---


def try_recipe(recipe: Recipe, data: Path, *, tiny: bool = False) -> dict:
    """Measure one training step and draw augmented cells, in a process that is gone when this returns.

    Returns:
        `picture`: PNG, a row a cell, first as it is, then augmented; `sentence`: how long the run will take and on
        what; `seconds`: float, or None where the device is busy.
    Raises:
        RunError: with what the process said.
    """
    with tempfile.TemporaryDirectory(prefix="blastoscope-") as folder:
        write_recipe(recipe, Path(folder) / "recipe.toml")
        command = [sys.executable, "-m", "training.estimate", folder, "--data", str(allowed_folder(data)), *["--tiny"] * tiny]
        environment = os.environ | {"BLASTOSCOPE_RUNS": str(runs_folder())}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RunError(f"The recipe could not be tried: {said[-1].removeprefix('error: ')}")
        return read_json(Path(folder) / "told.json") | {"picture": (Path(folder) / "cells.png").read_bytes()}
