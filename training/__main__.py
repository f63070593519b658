"""Train, evaluate and compare.

python -m training RECIPE --data FOLDER [--out RUN] [--tiny] [--both-ways] [--set KEY=VALUE ...]
python -m training RUN                        go on with a run that was stopped or killed
python -m training evaluate CHECKPOINT --data FOLDER [--rotations 8] [--out predictions.csv]
python -m training compare RUN_OR_CHECKPOINT ...
python -m training ensemble CHECKPOINT ... --out CHECKPOINT --title TITLE
python -m training sweep RECIPE ... --data FOLDER --seeds 0,1,2 [--set KEY=VALUE ...] [--out SWEEP] [--ray [ADDRESS]]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tomllib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from model_zoo import BlastoscopeError
from training.devices import keep_memory
from training.errors import RecipeError
from training.jobs import hold_device, parse_recipe

FAILED = 2


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"evaluate": _evaluate, "compare": _compare, "ensemble": _ensemble, "sweep": _sweep}
    command = commands.get(arguments[0] if arguments else "", _train)
    try:
        command(arguments if command is _train else arguments[1:])
    except KeyboardInterrupt:
        print("stopped; go on with: python -m training RUN", file=sys.stderr)
        return FAILED
    except BlastoscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"error: {error.strerror or error} ({error.filename or 'disk'})", file=sys.stderr)
        return FAILED
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m training{name}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    given = os.environ.get("BLASTOSCOPE_DATA")
    parser.add_argument(
        "--data", type=Path, default=given and Path(given), help="folder of C-NMC cells; default $BLASTOSCOPE_DATA"
    )


def _train(arguments: list[str]) -> None:
    parser = _parser("")
    parser.add_argument("recipe", type=Path, help="a TOML file of training/recipes/, or the folder of a run to go on with")
    _add_data(parser)
    parser.add_argument("--out", type=Path, help="run folder to write; default runs/<recipe name>")
    parser.add_argument(
        "--tiny", action="store_true", help="the recipe at a size that ends within minutes: shows that it works"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another value than the recipe's, as in TOML"
    )
    parser.add_argument("--both-ways", action="store_true", help="by subject and by image, to see what the split does")
    options = parser.parse_args(arguments)
    keep_memory()
    if options.recipe.is_dir():
        with hold_device(options.recipe, resume=True, devices=_devices(options.recipe, {}), log=_say):
            from training.run import read_state, resume, train  # imports Keras: not before a device is free

            told = read_state(options.recipe)
            if "data_fingerprint" in told:
                resume(options.recipe, log=_say)
            else:  # it ended while it waited for a device
                asked = {name: told[name] for name in ("tiny", "changes")}
                train(Path(told["recipe"]), Path(told["data"]), options.recipe, **asked, log=_say)
        return
    if options.data is None:
        parser.error("give --data, or set BLASTOSCOPE_DATA")
    out = options.out or Path("runs") / (options.recipe.stem + ("_tiny" if options.tiny else ""))
    changes = _parse_changes(options.set)
    outs = {out: changes}
    if options.both_ways:
        by_image = {"folds_by": "cells", "teach_without": []}  # no folds to put subjects into, or to keep from lessons
        ways = {"by_subject": {}, "image_level": by_image}
        outs = {out.with_name(f"{out.name}_{p}"): changes | {"protocol": p} | without for p, without in ways.items()}
    for folder, changed in outs.items():
        files = {"recipe": str(options.recipe.resolve()), "data": str(options.data.resolve())}
        devices = _devices(options.recipe, changed)
        with hold_device(folder, resume=False, devices=devices, log=_say, **files, tiny=options.tiny, changes=changed):
            from training.run import train

            train(options.recipe, options.data, folder, tiny=options.tiny, changes=changed, log=_say)
    if options.both_ways:
        from training.compare import compare

        _say(compare(list(outs)))


def _devices(recipe: Path, changes: dict) -> int:
    """How many GPUs a recipe or run folder asks for; 1 where that cannot be read: the run itself says what is wrong."""
    with contextlib.suppress(RecipeError, OSError, ValueError, KeyError):
        if recipe.is_dir() and (recipe / "recipe.toml").exists():
            recipe = recipe / "recipe.toml"
        elif recipe.is_dir():  # it ended while it waited for a device
            told = json.loads((recipe / "run.json").read_text("utf-8"))
            recipe, changes = Path(told["recipe"]), told["changes"]
        asked = changes.get("devices", parse_recipe(recipe).devices)
        return max(1, asked) if isinstance(asked, int) else 1
    return 1


def _parse_changes(settings: list[str]) -> dict:
    try:
        return tomllib.loads("\n".join(settings))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"--set takes KEY=VALUE, as in TOML: --set epochs=2 --set 'weights=\"imagenet\"'. {error}") from error


def _evaluate(arguments: list[str]) -> None:
    parser = _parser(" evaluate")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder")
    _add_data(parser)
    parser.add_argument("--rotations", type=int, choices=(1, 8), help="average over this many rotations; default the card's")
    parser.add_argument("--out", type=Path, help="CSV of every cell's P(ALL)")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("give --data, or set BLASTOSCOPE_DATA")
    from training.compare import evaluate

    _say(evaluate(options.checkpoint, options.data, rotations=options.rotations, out=options.out))


def _compare(arguments: list[str]) -> None:
    parser = _parser(" compare")
    parser.add_argument("folders", type=Path, nargs="+", help="run or checkpoint folders")
    from training.compare import compare

    _say(compare(parser.parse_args(arguments).folders))


def _ensemble(arguments: list[str]) -> None:
    parser = _parser(" ensemble")
    parser.add_argument("folders", type=Path, nargs="+", help="checkpoint folders, all measured on the same folds")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, beside them")
    parser.add_argument("--title", required=True, help="name on screen")
    options = parser.parse_args(arguments)
    from training.ensemble import join

    card = join(options.folders, options.out, title=options.title)
    auroc, low, high = card.metrics["auroc"]
    _say(f"wrote {options.out}: AUROC {auroc:.3f} ({low:.3f} to {high:.3f})")


def _sweep(arguments: list[str]) -> None:
    parser = _parser(" sweep")
    parser.add_argument("recipes", type=Path, nargs="+", help="TOML files; each is run with every seed on every fold")
    _add_data(parser)
    parser.add_argument("--seeds", required=True, metavar="0,1,2", help="of splits, weights, draws and augmentation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value than the recipes'")
    parser.add_argument("--out", type=Path, help="folder of the sweep's runs and its table; default runs/sweeps/<recipes>")
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on Ray, here or on the cluster at ADDRESS, whose machines all see this repository, the cells and the runs",
    )
    parser.add_argument("--cpus", type=int, default=2, help="of a run on a cluster without GPUs (default 2)")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("give --data, or set BLASTOSCOPE_DATA")
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds takes whole numbers, as in 0,1,2. Received: {options.seeds}")
    from training.sweep import sweep

    asked = {"changes": _parse_changes(options.set), "ray": options.ray, "cpus": options.cpus}
    _say(sweep(options.recipes, options.data, seeds, options.out, **asked, log=_say))


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
