"""One script a figure: `python -m benchmarks.NAME` prints a Markdown table. All of them: `make bench`.

Absolute times belong to the machine named above each table; figures meant for comparison are taken in one run,
in turns. Real cells come from $BLASTOSCOPE_DATA (cnmc/fold_*/{all,hem}/*.webp).
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import io
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import model_zoo

ROOT = Path(__file__).parent.parent
BATCH = 16
CHROMIUM_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # every figure is the processor's, but those of training_speed
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def data_root() -> Path:
    """$BLASTOSCOPE_DATA; ends the script where it holds no cells."""
    root = os.environ.get("BLASTOSCOPE_DATA", "")
    if not root or not any(Path(root).glob("cnmc/fold_*/*/*.webp")):
        sys.exit(f"error: $BLASTOSCOPE_DATA must name a folder that holds cnmc/fold_*/*/*.webp. Received: {root!r}")
    return Path(root)


def real_cells(n: int) -> list[Path]:
    """n files spread evenly over those of $BLASTOSCOPE_DATA; they repeat where there are fewer."""
    files = sorted(data_root().glob("cnmc/fold_*/*/*.webp"))
    return [files[i * max(len(files), n) // n % len(files)] for i in range(n)]


def as_bmp(path: Path) -> bytes:
    """A cell in the format C-NMC is distributed in."""
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "BMP")
    return buffer.getvalue()


def checkpoint(name: str | None) -> model_zoo.Checkpoint:
    """A bundled checkpoint by name, any by its folder; None is the one the app opens with."""
    try:
        if name and (Path(name) / "card.json").is_file():
            return model_zoo.load_checkpoint(Path(name))
        return model_zoo.find_checkpoint(name or model_zoo.default_checkpoint())
    except model_zoo.BlastoscopeError as error:
        sys.exit(f"error: {error}")


def network(name: str | None) -> model_zoo.Checkpoint:
    """A checkpoint that is one network, not an ensemble of several; see `checkpoint`."""
    found = checkpoint(name)
    if found.members:
        sys.exit(f"error: {name} is an ensemble. Give one of its networks: {', '.join(found.card.members)}")
    return found


def in_turns(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant. They take turns, each round starts with another; a first round is not counted."""
    seconds = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def print_machine(*packages: str) -> None:
    """One line: what the figures below were measured on, and how busy it was."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    model = found[1] if found else platform.processor() or platform.machine()
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    print(
        f"{os.cpu_count()} cores of {model}, {datetime.date.today()}, load average {os.getloadavg()[0]:.1f} at the start; "
        f"Python {platform.python_version()}, {versions}\n",
        flush=True,
    )


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Markdown: the first column is text, the others are numbers."""
    table = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("|", " | ".join([row[0].ljust(len(first)), *others]), "|")
    print(flush=True)


@dataclass(frozen=True, kw_only=True)
class App:
    """A running server: its process, when it was started (`time.perf_counter`), where its temporary files lie."""

    process: subprocess.Popen
    started: float
    url: str
    temporary: Path

    def wait_until_listening(self, seconds: float = 120) -> None:
        port = int(self.url.rpartition(":")[2])
        while time.perf_counter() < self.started + seconds and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.01)
        sys.exit(f"error: the app did not start: {(self.temporary / 'log').read_text()[-2000:]}")

    def has_loaded(self, library: str) -> bool:
        """Whether a shared library is mapped into the server (Linux)."""
        return library in Path(f"/proc/{self.process.pid}/maps").read_text()


@contextlib.contextmanager
def running_app() -> Iterator[App]:
    """The app as `make run` starts it, on a free port; always stopped, its temporary files deleted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stopped benchmark stops its server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True)
    with kept as folder, open(f"{folder}/log", "w") as log:
        command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"TMPDIR": folder}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield App(process=process, started=started, url=f"http://127.0.0.1:{port}", temporary=Path(folder))
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL):  # the whole session: the server may have children
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, sign)
                    process.wait(10)


def find_chromium() -> str | None:
    """The executable, under whatever name."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def open_browser():
    """A headless Chromium, started before the server so that only the app is on the clock."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def open_home(page, app: App) -> None:
    """Load the home page; returns when its uploader and its demo button are on the screen."""
    app.wait_until_listening()
    page.goto(app.url, wait_until="commit")
    page.get_by_test_id("stFileUploaderDropzone").wait_for()
    page.get_by_role("button", name="demo patients").wait_for()


def drop(page, *files: Path) -> None:
    """Give files to the home page's uploader."""
    page.locator("input[type=file]").first.set_input_files([str(file) for file in files])
