"""Resident memory of the server while one session is given ZIP after ZIP.

    BLASTOSCOPE_DATA=... python -m benchmarks.memory

Measured when the memory has been still for some seconds after each ZIP, of the server and its children; the browser's
is not counted. TensorFlow is loaded in the background after the first ZIP, so growth is read from 400 cells on.
"""

from __future__ import annotations

import argparse
import collections
import re
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil

import benchmarks

READING = re.compile(r"^Reading \d+ of")  # the page's progress line
SETTLED = 400  # cells after which everything that is loaded once has been loaded


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--zip", type=int, default=200, help="cells in a ZIP (default 200)")
    parser.add_argument("--format", choices=["bmp", "webp"], default="bmp", help="of the images in the ZIP (default bmp)")
    options = parser.parse_args(arguments)
    cells = benchmarks.real_cells(options.cells)
    name = benchmarks.checkpoint(None).card.title
    benchmarks.print_machine("streamlit", "onnxruntime", "tensorflow")
    rows = []
    with tempfile.TemporaryDirectory() as folder, benchmarks.open_browser() as browser, benchmarks.running_app() as app:
        page = browser.new_page()
        benchmarks.open_home(page, app)
        rows.append((0, still_memory(app), 0, 0.0))
        for first in range(0, len(cells), options.zip):
            part = cells[first : first + options.zip]
            file = write_zip(Path(folder) / f"patient {first // options.zip + 1}.zip", part, options.format)
            given, start = first + len(part), time.perf_counter()
            benchmarks.drop(page, file)
            wait_until_read(page, app, given)
            seconds = time.perf_counter() - start
            rows.append((given, still_memory(app), sum(file.stat().st_size for file in windows(app)), seconds))
            file.unlink()
        peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{app.process.pid}/status").read_text())
    print(f"{name}, {options.cells} real cells as {options.format.upper()} in ZIPs of {options.zip}, one session\n")
    benchmarks.print_table(
        ["cells so far", "resident MB", "windows on disk MB", "seconds for this ZIP"],
        [[f"{n:,}", f"{memory / 1e6:,.0f}", f"{disk / 1e6:,.0f}", f"{seconds:.1f}"] for n, memory, disk, seconds in rows],
    )
    later = [(n, memory) for n, memory, *_ in rows if n >= SETTLED]
    if len(later) > 1:
        slope = np.polyfit(*zip(*later, strict=True), 1)[0]
        print(f"Growth from {SETTLED} cells on: {slope * 1000 / 1e6:,.0f} MB per 1,000 cells.")
    print(f"Largest at any moment: {int(peak[1]) * 1024 / 1e6:,.0f} MB.")


def write_zip(path: Path, cells, kind: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for cell in cells:
            archive.writestr(f"{cell.stem}.{kind}", benchmarks.as_bmp(cell) if kind == "bmp" else cell.read_bytes())
    return path


def still_memory(app, *, samples: int = 6, timeout: float = 90) -> int:
    """Resident bytes of the server and its children, once `samples` of them, half a second apart, lie within 1 MB."""
    server, end = psutil.Process(app.process.pid), time.monotonic() + timeout
    seen = collections.deque(maxlen=samples)
    while time.monotonic() < end and (len(seen) < samples or max(seen) - min(seen) > 1e6):
        time.sleep(0.5)
        seen.append(sum(process.memory_info().rss for process in [server, *server.children(recursive=True)]))
    return seen[-1]


def wait_until_read(page, app, n: int, *, timeout: float = 600) -> None:
    """Until the session has n cells: a window on disk for each that was scored, a line for those that were refused."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        refused = re.search(r"(\d+) of \d+ files were refused", page.inner_text("body"))
        if len(windows(app)) + int(refused[1] if refused else 0) >= n and not page.get_by_text(READING).count():
            return
        time.sleep(0.1)
    raise SystemExit(f"error: the app did not read {n} cells within {timeout:.0f} s.")


def windows(app) -> list[Path]:
    return list(app.temporary.glob("blastoscope-*/*/*.png"))


if __name__ == "__main__":
    main()
