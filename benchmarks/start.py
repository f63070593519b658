"""From starting the server to the first screen, and to the first probability of a dropped cell.

    BLASTOSCOPE_DATA=... python -m benchmarks.start

Each run is a fresh server process and an empty browser cache; files are in the operating system's cache. A headless
Chromium waits beforehand. Expected: the first screen within 3 s, without TensorFlow; the first probability within 6 s.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path

import benchmarks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="medians are of this many (default 3)")
    options = parser.parse_args(arguments)
    (cell,) = benchmarks.real_cells(1)
    name = benchmarks.checkpoint(None).card.title
    benchmarks.print_machine("streamlit", "onnxruntime", "playwright")
    with tempfile.TemporaryDirectory() as folder, benchmarks.open_browser() as browser:
        file = Path(folder) / f"{cell.stem}.bmp"
        file.write_bytes(benchmarks.as_bmp(cell))
        runs = [run(browser, file) for _ in range(options.rounds)]
    listening, screen, probability, tensorflow = zip(*runs, strict=True)
    print(f"Seconds from the start of the process, {name}, {options.rounds} runs\n")
    benchmarks.print_table(
        ["until", "median", "least", "most", "goal"],
        [
            [label, *(f"{f(values):.1f}" for f in (statistics.median, min, max)), goal]
            for label, values, goal in (
                ("the server listens", listening, ""),
                ("first screen: uploader and demo button", screen, "3.0"),
                ("first P(ALL), of a cell dropped at once", probability, "6.0"),
            )
        ],
    )
    print(f"TensorFlow was in the server at the first screen in {sum(tensorflow)} of {options.rounds} runs (goal: 0).")


def run(browser, file: Path) -> tuple[float, float, float, bool]:
    """Seconds until: the server listens, the first screen, the first probability; and whether TensorFlow was there."""
    with browser.new_context() as context, benchmarks.running_app() as app:
        page = context.new_page()
        app.wait_until_listening()
        listening = time.perf_counter() - app.started
        benchmarks.open_home(page, app)
        screen = time.perf_counter() - app.started
        tensorflow = app.has_loaded("libtensorflow")
        benchmarks.drop(page, file)
        page.get_by_label(re.compile(r"P\(ALL\) [<>]?[01]\.\d")).first.wait_for(timeout=120_000)
        return listening, screen, time.perf_counter() - app.started, tensorflow


if __name__ == "__main__":
    main()
