"""python -m inference PATH... -o out.csv [--checkpoint NAME] [--rotations 8]: score files, folders and ZIPs without a browser.

Exit status: 0 every file was read, 1 some were refused (their rows say why), 2 nothing could be done.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from tqdm import tqdm

import model_zoo
from inference.cells import score_files
from inference.engine import ROTATIONS, Engine
from inference.sources import open_paths
from inference.table import COLUMNS, MADE_BY, csv_row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m inference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image, folder or ZIP")
    parser.add_argument("-o", "--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--checkpoint", help="bundled name, or a checkpoint folder; default: the one that the app opens with")
    parser.add_argument(
        "--rotations",
        type=int,
        choices=ROTATIONS,
        help="average each cell over so many rotations; 8 take eight times as long; default: as the checkpoint was measured",
    )
    options = parser.parse_args(arguments)
    for path in options.paths:
        if not path.exists():
            return _fail(f"{path} does not exist.")
    try:
        name = options.checkpoint or model_zoo.default_checkpoint()
        folder = Path(name)
        checkpoint = model_zoo.load_checkpoint(folder) if folder.is_dir() else model_zoo.find_checkpoint(name)
        engine = Engine(checkpoint, rotations=options.rotations)
    except model_zoo.BlastoscopeError as error:
        return _fail(str(error))
    scored = refused = trained = 0
    try:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*COLUMNS, *MADE_BY])
            for result in tqdm(
                score_files(open_paths(options.paths, skip=options.out), engine), unit=" cells", file=sys.stderr
            ):
                writer.writerow(csv_row(result, engine))
                scored += result.p_all is not None
                refused += result.p_all is None
                trained += result.trained
    except OSError as error:
        return _fail(f"{options.out} cannot be written: {error.strerror}.")
    print(f"{scored} cells scored by {engine.card.title}, {refused} files refused -> {options.out}", file=sys.stderr)
    if trained:
        print(f"{trained} of these took part in its training: of new patients they tell nothing", file=sys.stderr)
    if not scored:
        return _fail("no cell could be scored.")
    return 1 if refused else 0


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
