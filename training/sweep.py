"""Recipes x seeds x folds: each a run of its own, one after the other or on a Ray cluster, then one table of them all.

A sweep's folder holds a run folder for each, and `table.csv`. A sweep that was interrupted goes on with what is missing. See
docs/decisions/0009-ray.md.
"""

from __future__ import annotations

import csv
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from model_zoo import runs_folder
from model_zoo._files import whole_file
from training import jobs
from training.compare import pair_cells, read_predictions
from training.data import index_cells
from training.errors import RecipeError, RunError, Stopped
from training.metrics import PAIRED, cell_metrics, paired_difference
from training.recipe import Recipe, read_recipe, write_recipe
from training.results import METRICS, PROTOCOLS, TESTED_ON

RETRIES = 3  # of a run whose worker was killed
NO_RAY = (
    "Ray is not installed. Install it with: python -m pip install -r requirements-ray.txt. Without --ray the runs go one after "
    "the other on this machine."
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a sweep: the recipe as it runs there, and the name of the recipe it was made from."""

    name: str
    recipe: Recipe
    folder: Path

    @property
    def finished(self) -> bool:
        return jobs._read_run(self.folder).state == "finished"


def sweep(
    recipes: list[Path],
    data: Path,
    seeds: list[int],
    out: Path | None = None,
    *,
    changes: dict | None = None,
    ray: str | None = None,
    cpus: int = 2,
    log: Callable[[str], None] = print,
) -> str:
    """Run what is missing of recipes x seeds x folds below `out`; write its table.csv, and return it in words.

    Args:
        recipes: TOML files; the recipe.toml of a run or checkpoint repeats it with other seeds.
        out: default runs/sweeps/<names of the recipes>.
        changes: settings that replace those of every recipe.
        ray: None for one run after the other; "" for a Ray cluster of this machine alone, else a cluster's address. All its
            machines see this repository, the cells and `out` under the same paths.
        cpus: of a run on a cluster without GPUs.
    Raises:
        RecipeError, DataError: before anything runs. RunError: `out` holds another sweep, or runs did not finish; the
        table of those that did is written all the same. Stopped: interrupted.
    """
    if ray is not None:
        _import_ray()
    cells = index_cells(data)
    out = Path(out or runs_folder() / "sweeps" / _folder_name(recipes)).resolve()
    data, planned = Path(data).resolve(), plan(recipes, seeds, out, changes)
    for run in planned:
        jobs.check_feasible(run.recipe, data, cells)
    for run in planned:
        _ask(run, data)
    missing = [run for run in planned if not run.finished]
    log(f"{out}: {len(planned)} runs, {len(missing)} of them to do")
    try:
        if missing and ray is not None:
            _run_on_ray(missing, data, ray, cpus, log)
        elif missing:
            jobs.run_in_turn({run.folder.name: _arguments(run.folder, data) for run in missing}, log)
    except KeyboardInterrupt:
        raise Stopped("The sweep was stopped. The same command goes on with what is missing.") from None
    rows = summarize(planned)
    if rows:
        write_table(out / "table.csv", rows)
    unfinished = [jobs._read_run(run.folder) for run in planned if not run.finished]
    if unfinished:
        why = "; ".join(f"{run.name}: {run.message or run.state}" for run in unfinished[:5])
        raise RunError(
            f"{len(unfinished)} of {len(planned)} runs did not finish. {why}. The same command goes on with them; "
            f"{out / 'table.csv'} is of the seeds that are complete."
        )
    return describe(rows)


def _folder_name(recipes: list[Path]) -> str:
    """The recipes' names, cut where together they are longer than the name of a folder may be."""
    joined = "-".join(map(_name_of, recipes))
    return joined if len(joined) <= 100 else f"{joined[:90]}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"


def _name_of(recipe: Path) -> str:
    """A recipe's name: its file's, or that of the run or checkpoint whose recipe.toml it is."""
    path = Path(recipe).resolve()
    return path.parent.name if path.name == "recipe.toml" else path.stem


def plan(recipes: list[Path], seeds: list[int], out: Path, changes: dict | None = None) -> list[Planned]:
    """The runs of a sweep, without a refit: a sweep measures, and serves no network.

    A fold is a run of its own if validation cells choose its operating point. Without them it comes from the other folds, so
    that the folds stay in one run.

    Raises:
        RecipeError: a recipe that cannot be read or changed, or two of one name.
    """
    names = [_name_of(file) for file in recipes]
    if len(set(names)) < len(names):
        raise RecipeError(f"Two recipes have one name, and would share run folders. Rename one. Received: {', '.join(names)}")
    if "seed" in (changes or {}):
        raise RecipeError("The seeds of a sweep are given by --seeds, as in --seeds 0,1,2. Received: --set seed")
    planned = []
    for name, file in zip(names, recipes, strict=True):
        recipe = read_recipe(file, changes)
        folds = [recipe.test_folds]
        if recipe.protocol == "by_subject" and recipe.validation:
            folds = [[k] for k in recipe.test_folds or range(recipe.folds)]
        for seed in dict.fromkeys(seeds):
            for held in folds:
                folder = out / f"{name}_seed_{seed}{f'_fold_{held[0]}' if len(held) == 1 else ''}"
                changed = replace(recipe, seed=seed, test_folds=held, refit=False)
                planned.append(Planned(name=name, recipe=changed, folder=folder))
    return planned


def _ask(run: Planned, data: Path) -> None:
    """Write down what is to run, unless it runs already."""
    asked = run.folder / "asked.toml"
    if (run.folder / "run.json").exists():
        if read_recipe(asked, variants=False) != run.recipe or jobs._read_run(run.folder).told.get("data") != str(data):
            raise RunError(f"{run.folder} was begun with other settings or other cells. Give the sweep another --out.")
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    write_recipe(run.recipe, asked)


def _arguments(folder: Path, data: Path) -> list[str]:
    """Of `python -m training`: to begin the run, or to go on with it."""
    if (folder / "run.json").exists():
        return [str(folder)]
    return [str(folder / "asked.toml"), "--data", str(data), "--out", str(folder)]


def _import_ray():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its maker otherwise
    try:
        import ray
    except ImportError as error:
        raise RecipeError(NO_RAY) from error
    return ray


def _run_on_ray(missing: list[Planned], data: Path, address: str, cpus: int, log) -> None:
    """A task a run. A worker ends with its task and gives all memory back; a killed one's task is given to another."""
    ray = _import_ray()
    alone = {"include_dashboard": False, "object_store_memory": 100 * 2**20}  # nothing large goes through Ray
    try:
        if ":" in address:  # Ray itself would try for many minutes
            host, port = address.removeprefix("ray://").rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=30).close()
        ray.init(address=address or "local", **({} if address else alone))
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"There is no Ray cluster at {address or 'this machine'}: {error}") from error
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        kind = "GPU" if any(machine.get("GPU") for machine in machines) else "CPU"
        needs = [run.recipe.devices if kind == "GPU" else cpus for run in missing]
        most = max(machine.get(kind, 0) for machine in machines)
        if max(needs) > most:
            raise RunError(f"A run takes {max(needs)} {kind}s of one machine. The largest of this cluster has {most:.0f}.")
        here, repository = os.getcwd(), str(jobs.REPOSITORY)
        told = {name: value for name, value in os.environ.items() if name.startswith(("BLASTOSCOPE_", "KERAS_", "TF_"))}
        told |= {"BLASTOSCOPE_RUNS": str(runs_folder())} | ({jobs.SHARED_CPU: "1"} if kind == "CPU" else {})

        # Pickled with all it needs: until it has run, a worker does not know where this repository is.
        def go_on(folder: str, data: str) -> None:
            import os
            import sys

            os.chdir(here)
            sys.path.insert(0, repository)
            os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it; a run by itself has none
            os.environ.update(told)
            from training.sweep import run_here

            run_here(folder, data)

        task = ray.remote(max_calls=1, max_retries=RETRIES)(go_on)
        asked = {}
        for run, need in zip(missing, needs, strict=True):
            takes = {"num_gpus": need} if kind == "GPU" else {"num_cpus": need}
            asked[task.options(name=run.folder.name, **takes).remote(str(run.folder), str(data))] = run
        waiting = list(asked)
        while waiting:
            (done,), waiting = ray.wait(waiting)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                log(f"{asked[done].folder.name}: {str(error).strip().splitlines()[0]}")
            log(f"{len(asked) - len(waiting)} of {len(asked)}: {asked[done].folder.name}")
    finally:
        ray.shutdown()


def run_here(folder: str, data: str) -> None:
    """Begin or go on with a run in this process. What becomes of it stands in its folder.

    If it still runs, this waits: a lock on a shared disk may outlive the machine that held it by a minute.
    """
    from training.__main__ import main

    while jobs.is_alive(Path(folder)):
        time.sleep(1)
    if jobs._read_run(Path(folder)).state != "finished":
        sys.argv[1:] = _arguments(Path(folder), Path(data))  # the run writes down its command
        main(sys.argv[1:])


def summarize(planned: list[Planned]) -> list[dict]:
    """One row a recipe: its figures over seeds, and how much better it is than the first; from complete seeds alone.

    A seed's figures are of all cells that its folds held out, each with the operating point of its run. The difference
    from the first recipe is of the cells that both held out with the same seed: P(ALL) and operating point of a cell are
    averaged over the seeds, which leaves what a recipe answers whatever the luck of its draws, and
    `training.metrics.paired_difference` then draws subjects again.

    Returns:
        recipe, title, protocol (as in `Card.split`), seeds, runs, cells; each of METRICS as mean over seeds, `_min` and
        `_max`; against, shared_cells, and for each of PAIRED `<metric>_gap`, `_gap_low`, `_gap_high`, None where there is none.
    """
    rows, first = [], {}
    for name in dict.fromkeys(run.name for run in planned):
        runs = [run for run in planned if run.name == name]
        seeds = {}
        for seed in dict.fromkeys(run.recipe.seed for run in runs):
            of_seed = [run for run in runs if run.recipe.seed == seed]
            if all(run.finished for run in of_seed):
                seeds[seed] = _held_out([run.folder for run in of_seed])
        if not seeds:
            continue
        recipe = runs[0].recipe
        row = {"recipe": name, "title": recipe.title, "protocol": PROTOCOLS[recipe.protocol], "seeds": len(seeds)}
        row["runs"] = len(seeds) * sum(run.recipe.seed == recipe.seed for run in runs)
        row["cells"] = len(set().union(*(table["cell"] for table in seeds.values())))
        figures = [cell_metrics(table["y_true"], table["p_all"], table["threshold"]) for table in seeds.values()]
        for metric in METRICS:
            values = [figure[metric] for figure in figures]
            for suffix, of in (("", np.mean), ("_min", min), ("_max", max)):
                row[metric + suffix] = round(float(of(values)), 4)
        shared = _shared(first, seeds) if rows else {"y_true": np.zeros(0)}
        compared = 0 < shared["y_true"].sum() < len(shared["y_true"])
        row |= {"against": rows[0]["recipe"] if compared else "", "shared_cells": len(shared["y_true"]) if compared else 0}
        gaps = paired_difference(**shared) if compared else dict.fromkeys(PAIRED, (None, None, None))
        row |= {f"{m}_gap{end}": value for m in PAIRED for end, value in zip(("", "_low", "_high"), gaps[m], strict=True)}
        first = first or seeds
        rows.append(row)
    return rows


def _held_out(folders: list[Path]) -> dict[str, np.ndarray]:
    """The cells that some runs held out, one after the other."""
    tables = [read_predictions(folder) for folder in folders]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _shared(first: dict[int, dict], other: dict[int, dict]) -> dict:
    """The arguments of `paired_difference` for the cells that both held out with the same seed, averaged over seeds."""
    pairs = []
    for seed in first.keys() & other.keys():
        cells, pair = pair_cells(first[seed], other[seed])
        pairs.append((cells, pair["y_true"], pair["groups"], pair["p_a"], pair["p_b"], *pair["thresholds"]))
    if not pairs:
        return {"y_true": np.zeros(0)}
    cells, y_true, groups, *averaged = map(np.concatenate, zip(*pairs, strict=True))
    _, once, place, times = np.unique(cells, return_index=True, return_inverse=True, return_counts=True)
    p_a, p_b, *thresholds = (np.bincount(place, values) / times for values in averaged)
    return {"y_true": y_true[once], "groups": groups[once], "p_a": p_a, "p_b": p_b, "thresholds": tuple(thresholds)}


def describe(rows: list[dict]) -> str:
    """The table of `summarize` as Markdown, and the differences in lines below it."""
    columns = ["recipe", "tested on", "seeds", "runs", "cells", *(f"{label}, mean (min..max)" for label in METRICS.values())]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        figures = (f"{row[metric]:.3f} ({row[f'{metric}_min']:.3f}..{row[f'{metric}_max']:.3f})" for metric in METRICS)
        told = [
            row["recipe"],
            TESTED_ON[row["protocol"]],
            *(f"{row[name]:.0f}" for name in ("seeds", "runs", "cells")),
            *figures,
        ]
        lines.append(f"| {' | '.join(told)} |")
    for row in rows:
        if row["against"]:
            shared = f"on {row['shared_cells']:.0f} shared cells, P(ALL) averaged over seeds:"
            lines += ["", f"{row['recipe']} minus {row['against']} {shared}"]
            for metric in PAIRED:
                gap, low, high = (row[f"{metric}_gap{end}"] for end in ("", "_low", "_high"))
                lines.append(f"  {metric:20} {gap:+.3f} ({low:+.3f} to {high:+.3f})")
    return "\n".join(lines)


def write_table(file: Path, rows: list[dict]) -> None:
    with whole_file(file) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def list_sweeps() -> dict[str, list[dict]]:
    """The tables of runs/sweeps by folder, the newest first; rows as `summarize` gives them.

    Raises:
        RunError: a file that is none.
    """
    text = ("recipe", "title", "protocol", "against")
    figures = [f"{metric}{end}" for metric in METRICS for end in ("", "_min", "_max")]
    gaps = [f"{metric}_gap{end}" for metric in PAIRED for end in ("", "_low", "_high")]
    columns = (*text, "seeds", "runs", "cells", *figures, "shared_cells", *gaps)
    found = {}
    for file in sorted(runs_folder().glob("sweeps/*/table.csv"), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            with file.open(newline="", encoding="utf-8") as opened:
                rows = list(csv.DictReader(opened))
            found[file.parent.name] = [
                {name: row[name] if name in text else float(row[name]) if row[name] else None for name in columns}
                for row in rows
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{file} is no table of a sweep. Run the sweep's command again: it writes it anew.") from error
    return found
