"""Train, evaluate and compare.

python -m training RECIPE --data FOLDER [--out RUN] [--tiny] [--both-ways] [--set KEY=VALUE ...]
python -m training RUN [--data FOLDER]        go on with a run that was stopped or killed; FOLDER if its cells were moved
python -m training evaluate CHECKPOINT --data FOLDER [--rotations 8] [--out predictions.csv] [--other-people]
python -m training compare RUN_OR_CHECKPOINT ...
python -m training ensemble CHECKPOINT ... --out CHECKPOINT --title TITLE
python -m training sweep RECIPE ... --data FOLDER --seeds 0,1,2 [--set KEY=VALUE ...] [--out SWEEP] [--ray [ADDRESS]]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tomllib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from model_zoo import BlastoscopeError, runs_folder
from training.data import index_cells
from training.devices import keep_memory
from training.errors import RecipeError, RunError
from training.jobs import check_feasible, hold_device, read_json, run_in_turn
from training.recipe import read_recipe

FAILED = 2


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"evaluate": _evaluate, "compare": _compare, "ensemble": _ensemble, "sweep": _sweep}
    command = commands.get(arguments[0] if arguments else "", _train)
    try:
        if command is _train and re.fullmatch("[a-z]+", arguments[0] if arguments else "") and not Path(arguments[0]).exists():
            raise RecipeError(f"{arguments[0]!r} is no recipe, no run folder, and none of {', '.join(commands)}.")
        command(arguments if command is _train else arguments[1:])
    except KeyboardInterrupt:
        print("stopped; of a run, python -m training and its folder go on with it", file=sys.stderr)
        return FAILED
    except BlastoscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except MemoryError as error:
        print(f"error: this machine has too little memory. {error}".strip(), file=sys.stderr)
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
    parser.add_argument("--data", type=Path, help="folder of C-NMC cells; default $BLASTOSCOPE_DATA")


def _data(parser: argparse.ArgumentParser, given: Path | None) -> Path:
    if not (folder := given or os.environ.get("BLASTOSCOPE_DATA")):
        parser.error("give --data, or set BLASTOSCOPE_DATA")
    return Path(folder)


def _train(arguments: list[str]) -> None:
    parser = _parser("")
    parser.add_argument("recipe", type=Path, help="a TOML file of training/recipes/, or the folder of a run to go on with")
    _add_data(parser)
    parser.add_argument("--out", type=Path, help="run folder to write; default runs/<recipe name>, or below $BLASTOSCOPE_RUNS")
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
        asked = {"--out": options.out, "--tiny": options.tiny, "--set": options.set, "--both-ways": options.both_ways}
        if given := ", ".join(name for name, value in asked.items() if value):
            parser.error(f"{options.recipe} goes on as it was begun: leave out {given}, or start its recipe with another --out")
        with hold_device(options.recipe, resume=True, devices=_devices(options.recipe), log=_say):
            from training.run import read_state, resume, train  # imports Keras: not before a device is free

            told = read_state(options.recipe)
            if "data_fingerprint" in told:
                resume(options.recipe, options.data, log=_say)
            else:  # it ended while it waited for a device
                asked = {name: told[name] for name in ("tiny", "changes")}
                train(Path(told["recipe"]), options.data or Path(told["data"]), options.recipe, **asked, log=_say)
        return
    options.data = _data(parser, options.data)
    out = options.out or runs_folder() / (options.recipe.stem + ("_tiny" if options.tiny else ""))
    changes = _parse_changes(options.set)
    if options.both_ways:
        _both_ways(options, out, changes)
        return
    # what is wrong with it or with the folder is told before it waits for a device
    recipe = read_recipe(options.recipe, changes, variants=False)
    check_feasible(recipe.tiny() if options.tiny else recipe, options.data, index_cells(options.data))
    asked = _asked(options, changes)
    with hold_device(out, resume=False, devices=recipe.devices, log=_say, **asked):
        from training.run import train

        train(options.recipe, options.data, out, tiny=options.tiny, changes=changes, log=_say)


def _asked(options, changes: dict) -> dict:
    """What run.json says of a run that has not begun."""
    files = {"recipe": str(options.recipe.resolve()), "data": str(options.data.resolve())}
    return files | {"tiny": options.tiny, "changes": changes}


def _both_ways(options, out: Path, changes: dict) -> None:
    """A run by subject, one by image, and both beside each other; of what an earlier try left, only what is missing."""
    by_image = {"folds_by": "cells", "teach_without": []}  # no folds to put subjects into, or to keep from lessons
    ways = {"by_subject": changes, "image_level": changes | by_image}
    commands, folders, cells = {}, [], index_cells(options.data)
    for protocol, changed in ways.items():
        changed, folder = changed | {"protocol": protocol}, out.with_name(f"{out.name}_{protocol}")
        recipe = read_recipe(options.recipe, changed, variants=False)
        check_feasible(recipe.tiny() if options.tiny else recipe, options.data, cells)  # a mistake is told before anything runs
        folders.append(folder)
        told = read_json(folder / "run.json")
        if told and any(told.get(name) != value for name, value in _asked(options, changed).items()):
            raise RunError(f"{folder} was begun with other settings or other cells. Give another --out.")
        if not told:
            settings = [f"--set={name}={_in_toml(value)}" for name, value in changed.items()]
            given = [str(options.recipe), "--data", str(options.data), "--out", str(folder), *settings]
            commands[folder.name] = [*given, *["--tiny"] * options.tiny]
        elif told["state"] != "finished":
            commands[folder.name] = [str(folder)]
    run_in_turn(commands, _say)
    for folder in folders:
        if read_json(folder / "run.json").get("state") != "finished":
            raise RunError(f"{folder} did not finish. The same command goes on with it.")
    from training.compare import compare

    _say(compare(folders))


def _in_toml(value) -> str:
    """JSON of a recipe's types is TOML, but for tables."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_in_toml(key)} = {_in_toml(of)}' for key, of in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def _devices(folder: Path) -> int:
    """How many GPUs a run folder asks for; 1 where that cannot be read: the run itself says what is wrong."""
    with contextlib.suppress(RecipeError, KeyError):
        if (folder / "recipe.toml").exists():
            return read_recipe(folder / "recipe.toml", variants=False).devices
        told = read_json(folder / "run.json")  # it ended while it waited for a device
        return read_recipe(Path(told["recipe"]), told["changes"], variants=False).devices
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
    parser.add_argument(
        "--other-people",
        action="store_true",
        help="the subjects are none of those that trained it, though some have their ids: leave nobody out",
    )
    options = parser.parse_args(arguments)
    data = _data(parser, options.data)
    from training.compare import evaluate

    asked = {"rotations": options.rotations, "out": options.out, "other_people": options.other_people}
    _say(evaluate(options.checkpoint, data, **asked))


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
    data = _data(parser, options.data)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds takes whole numbers, as in 0,1,2. Received: {options.seeds}")
    from training.sweep import sweep

    asked = {"changes": _parse_changes(options.set), "ray": options.ray, "cpus": options.cpus}
    _say(sweep(options.recipes, data, seeds, options.out, **asked, log=_say))


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
