"""python -m training RECIPE --data FOLDER [--out FOLDER]: train a recipe and write a checkpoint folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from model_zoo import BlastoscopeError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("recipe", type=Path, help="a TOML file of training/recipes/")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("BLASTOSCOPE_DATA"), help="folder of C-NMC cells; default $BLASTOSCOPE_DATA"
    )
    parser.add_argument("--out", type=Path, help="checkpoint folder to write; default runs/<recipe name>")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("give --data, or set BLASTOSCOPE_DATA")
    try:
        from training.fit import train

        train(options.recipe, Path(options.data), options.out or Path("runs") / options.recipe.stem, log=_say)
    except BlastoscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error} ({error.filename or 'disk'})", file=sys.stderr)
        return 2
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
