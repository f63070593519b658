"""A run: one recipe on one folder of cells, in one run folder that tells everything and resumes after a kill."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np

from inference.images import subject_of
from model_zoo import Card
from model_zoo._architecture import refresh
from model_zoo._checkpoint import TRAINED_ON, WEIGHTS, hash_weights
from model_zoo._files import write_json
from model_zoo._onnx import write_onnx
from training.calibration import (
    BALANCED,
    ESTIMATED,
    GIVEN,
    UNCHOSEN,
    calibrate,
    calibrate_parts,
    operating_points,
    pool_parts,
    subject_rows,
    write_predictions,
)
from training.data import Cells, cache_folder, index_cells, pack_cells, usual_ranges, verify_cells
from training.devices import find_devices, keep_compiled, list_devices, precise, spread
from training.draws import Draws
from training.errors import DataError, OutOfMemory, RunError, Stopped, halt, why
from training.fit import append_rows, build_network, fit, memory_told, predict_logit, save_arrays, split_of
from training.growth import grow
from training.jobs import gpus
from training.metrics import bootstrap_metrics
from training.recipe import Recipe, find_starts, read_recipe, write_recipe
from training.results import PROTOCOLS
from training.splits import (
    Part,
    all_rows,
    check_sides,
    divide,
    shown_unlabelled,
    thinned,
)

SENTENCES = {
    "by_subject": "Measured on subjects the network never saw; subjects that share a picture stay on one side.",
    "official": "Measured on the official preliminary test set: subjects the network never saw.",
    "image_level": "image-level split: cells of a patient on both sides. The figures are not those of an unseen patient.",
}


def train(
    recipe_file: Path,
    data: Path,
    out: Path,
    *,
    tiny: bool = False,
    changes: dict | None = None,
    log: Callable[[str], None] = print,
) -> Card:
    """Run a recipe; `out` becomes a run folder and, once finished, a checkpoint folder.

    Validation cells choose the epoch, the temperature and the operating point; test cells are read once, at the end.

    Args:
        recipe_file: a TOML recipe.
        data: folder of C-NMC cells, see `index_cells`; `weights` of the recipe is relative to it.
        tiny: the recipe at a size that ends within minutes; its figures mean nothing.
        changes: settings that replace the recipe's.
    Raises:
        RecipeError, DataError, RunError: before anything is written.
        Stopped: a file `stop` appeared in the run folder.
    """
    out, shipped = Path(out), read_recipe(recipe_file)
    if (out / "run.json").exists() and read_state(out)["state"] != "queued":
        raise RunError(f"{out} already holds a run. Resume it: python -m training {out}. Or give another --out.")
    recipe = read_recipe(recipe_file, changes)
    recipe = recipe.tiny() if tiny else recipe

    def keep_recipe(path: Path) -> None:
        if recipe == shipped:
            shutil.copy(recipe_file, path)  # with its comments
        else:
            write_recipe(recipe, path)

    return Run(out, recipe, Path(data), log).execute(keep_recipe, tiny)


def resume(folder: Path, data: Path | None = None, *, log: Callable[[str], None] = print) -> Card:
    """Go on with a run that was stopped or killed, exactly as if it had not been.

    Args:
        data: where its cells lie now, if they were moved.
    Raises:
        RunError: no run, or a finished one. DataError: the cells are no longer the ones it began with.
    """
    folder = Path(folder)
    told = read_state(folder)
    if told["state"] == "finished":
        raise RunError(f"{folder} is finished. To train again, start its recipe with another --out.")
    return Run(folder, read_recipe(folder / "recipe.toml"), Path(data or told["data"]), log).execute(None, told["tiny"])


def read_state(folder: Path) -> dict:
    """What run.json says.

    Raises:
        RunError: it is missing or unreadable.
    """
    try:
        return json.loads((Path(folder) / "run.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} holds no run. Start one: python -m training RECIPE --out {folder}") from error


class Run:
    """The run folder in the making; `fit` reports to it."""

    def __init__(self, folder: Path, recipe: Recipe, data: Path, log: Callable[[str], None]):
        self.folder, self.data, self._say, self._told, self._progress = folder, data.resolve(), log, {}, {}
        self.recipe = find_starts(recipe, data)
        self._written, self.untouched, self._taught = 0.0, None, None

    def execute(self, keep_recipe: Callable[[Path], None] | None, tiny: bool) -> Card:
        """Train from the start, after `keep_recipe` wrote the recipe into the folder, or, without it, go on."""
        devices = find_devices(self.recipe.devices)
        keep_compiled(cache_folder() / "compiled")
        cells = self.chosen(tiny)
        parts = divide(cells, self.recipe)
        known = read_state(self.folder) if (self.folder / "run.json").exists() else {}
        if known.get("data_fingerprint", cells.fingerprint) != cells.fingerprint:
            raise DataError(f"{self.data} no longer holds the cells that {self.folder} began with. Start a new run.")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.recipe.protocol != "image_level":
            for part in parts:
                check_sides(cells, part.sides(len(cells)))
        if keep_recipe:
            keep_recipe(self.folder / "recipe.toml")
        self._told = {"started": _now(), "seconds": 0} | known
        self.told(
            state="running",
            message="",
            pid=os.getpid(),
            ended="",
            data=str(self.data),
            tiny=tiny,
            data_fingerprint=cells.fingerprint,
            command=f"python -m training {' '.join(sys.argv[1:])}",
            device=" ".join(devices),
            versions={p: version(p) for p in ("keras", keras.backend.backend(), "numpy")},
            commit=_commit(),
            seed=self.recipe.seed,
        )
        self._began = time.time() - self._told["seconds"]  # of all tries, had they been one
        try:
            card = self._train(cells, parts)
        except BaseException as error:
            state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
            message = why(error)
            with contextlib.suppress(OSError):  # a full disk is the very reason, it may be
                self.told(state=state, message=message, ended=_now(), seconds=self._spent())
                self.log(f"{state}: {message}")
            raise
        self.told(state="finished", ended=_now(), seconds=self._spent())
        (self.folder / "progress.json").unlink(missing_ok=True)
        return card

    def chosen(self, tiny: bool) -> Cells:
        """The cells of the data folder that can be read, with what was found in them; a few of each subject if `tiny`."""
        cells = index_cells(self.data)
        if tiny:
            cells = thinned(cells)
        cells, self.findings = verify_cells(cells, cache=cache_folder(), progress=self._every(500, "looked at", self._say))
        return cells

    # --- what fit() reports to ---

    def log(self, line: str) -> None:
        self._say(line)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{_now()} {line}\n")

    def told(self, **changes) -> None:
        self._told |= changes
        write_json(self.folder / "run.json", self._told)

    def _spent(self) -> float:
        """Seconds, those of earlier tries too."""
        return round(time.time() - self._began, 1)

    def progress(self, **values) -> None:
        self._progress |= values
        if time.time() - self._written >= 1 or values.get("batch") == values.get("batches"):
            write_json(self.folder / "progress.json", self._progress)
            self._written = time.time()

    def history(self, row: dict) -> None:
        append_rows(self.folder / "history.csv", [row])
        self.told(seconds=self._spent())  # it may be killed

    def subjects(self, rows: list[dict]) -> None:
        append_rows(self.folder / "subjects.csv", rows)

    def stopping(self) -> bool:
        return (self.folder / "stop").exists()

    def finishing(self) -> bool:
        """Whether the network in training is to end with its best epoch so far; the next one trains in full."""
        return (self.folder / "finish").exists()

    def _every(self, step: int, verb: str, log) -> Callable[[int, int], None]:
        """What reading cells one by one reports to."""

        def progress(done: int, total: int) -> None:
            halt(self)
            if done % step == 0 or done == total:
                log(f"{verb} {done} of {total}")

        return progress

    # --- the run itself ---

    def _train(self, cells: Cells, parts: list[Part]) -> Card:
        for sentence in self.findings:
            self.log(sentence)
        self._preparing(0, parts)
        packed = pack_cells(cells, self.recipe.framing, cache=cache_folder(), progress=self._every(500, "packed", self.log))
        for side in ("training", "validation", "test"):
            self.log(f"{parts[0].name} {side:10} {cells.told(getattr(parts[0], side))}")
        if self.recipe.teach_epochs:
            self._teach(packed, cells, parts)
        results = []
        for done, part in enumerate(parts):
            self._preparing(done, parts)
            results.append(self._one(packed, cells, part))
        served = results[0] if len(parts) == 1 else None
        if self.recipe.refit:
            self._preparing(len(parts), parts)
            served = self._refit(packed, cells, parts)
        return self._finish(cells, parts, results, served)

    def _preparing(self, done: int, parts: list[Part]) -> None:
        """Nothing is known yet of the network that follows the `done` ones."""
        self._progress = {}
        self.progress(folds_done=done, folds_total=len(parts) + self.recipe.refit)

    def _teach(self, packed, cells: Cells, parts: list[Part]) -> None:
        """Lessons without labels, once, or what an earlier try of them left; every part then starts from `self._taught`."""
        folder = self.folder / "taught"
        folder.mkdir(exist_ok=True)
        if not (folder / "weights.npz").exists():
            rows, none = shown_unlabelled(cells, parts, self.recipe), np.zeros(0, int)
            recipe = lessons_of(self.recipe)
            self.log(f"lessons without labels on {len(rows):,} cells")
            self.progress(folds_total=1)  # no fold comes before or after them until they are over
            self._fit(packed, cells, Part(name="taught", training=rows, validation=none, test=none), recipe, folder)
            os.replace(folder / "best.npz", folder / "weights.npz")
            self._leave(folder)
        with np.load(folder / "weights.npz") as file:
            self._taught = [file[f"w{i}"] for i in range(len(file.files))]

    def _one(self, packed, cells: Cells, part: Part, recipe: Recipe | None = None) -> dict:
        """Fit one part, or read what an earlier try of it left; its held-out logits and its calibration."""
        recipe, folder = recipe or self.recipe, self.folder / part.name
        if recipe.teach_epochs:  # over: its teacher has nothing more to say
            recipe = replace(recipe, teach_epochs=0, teacher="")
        folder.mkdir(exist_ok=True)
        if not (folder / "held.npz").exists():
            network, batch_size = self._fit(packed, cells, part, recipe, folder)
            rows = np.concatenate([part.validation, part.test])
            logit = predict_logit(network, packed, rows, batch_size=batch_size, rotations=recipe.rotations, report=self)
            logits = dict(zip(("validation", "test"), np.split(logit, [len(part.validation)]), strict=True))
            write_onnx(network, folder / WEIGHTS)
            save_arrays(folder / "held.npz", logits)
            self._leave(folder)
        with np.load(folder / "held.npz") as held:
            return {"folder": folder, "validation": held["validation"], "test": held["test"]}

    def _leave(self, folder: Path) -> None:
        """Remove what only a fit that goes on needs, and what asked that one to finish."""
        for file in (folder / "last.npz", self.folder / "finish"):
            file.unlink(missing_ok=True)

    def _fit(self, packed, cells, part, recipe, folder) -> tuple[keras.Model, int]:
        """The network, and how many cells at a time the device has memory for."""
        split_batch = split_of(folder)
        while True:
            batch_size = recipe.batch_size // split_batch
            try:
                with memory_told(batch_size):
                    return self._fit_once(packed, cells, part, recipe, folder, split_batch), batch_size
            except OutOfMemory as error:
                split_batch *= 2
                smaller = recipe.batch_size // split_batch
                if not smaller or smaller % recipe.devices:
                    raise
                for file in ("last.npz", "best.npz"):
                    (folder / file).unlink(missing_ok=True)
                self._forget(part.name)
                self.log(f"{error} It starts again with {smaller} at a time, {split_batch} times a step.")

    def _fit_once(self, packed, cells, part, recipe, folder, split_batch: int):
        keras.backend.clear_session()
        keras.utils.set_random_seed(recipe.seed)
        began = time.time()
        precision = precision_of(recipe.precision) if recipe.epochs else "float32"  # what only reads is exact
        with precise(precision):
            with spread(recipe.devices):
                network = build_network(recipe)
            taught = self._taught is not None
            if taught:
                network.set_weights(self._taught)
                refresh(network.layers)
            if recipe.grow_from and not (folder / "last.npz").exists():
                self.log(f"{part.name}: growing from {Path(recipe.grow_from).name}; this takes minutes")
                told = grow(network, recipe, packed, part.training, pause=lambda: halt(self))
                alike = ", ".join(f"{stage} {r:.3f}" for stage, r in told.items())
                self.log(f"{part.name}: grown; correlation with what it grew from: {alike}")
            fit(network, recipe, packed, cells, part, folder, self, split_batch=split_batch, taught=taught, began=began)
            return network if precision == "float32" else _in_float32(network, recipe)

    def _forget(self, name: str) -> None:
        """Drop what the tables hold of a fit that begins anew."""
        for file in (self.folder / "history.csv", self.folder / "subjects.csv"):
            if file.exists():
                kept = [row for row in _read_rows(file) if row["fold"] != name]
                file.unlink()
                if kept:
                    append_rows(file, kept)

    def _refit(self, packed, cells: Cells, parts: list[Part]) -> dict:
        """The network that is served: all subjects train it, for as many epochs as the folds did best with, at the median."""
        best = [_best_epoch(self.folder, part, self.recipe) for part in parts]
        epochs = max(1, round(float(np.median(best)))) if self.recipe.epochs else 0
        self.log("refit on all subjects" + (f" for {epochs} epochs; the folds did best with {best}" if epochs else ""))
        part = Part(name="all", training=all_rows(parts), validation=np.zeros(0, int), test=np.zeros(0, int))
        return self._one(packed, cells, part, replace(self.recipe, epochs=epochs, patience=0))

    def _finish(self, cells: Cells, parts: list[Part], results: list[dict], served: dict | None) -> Card:
        """Calibrate, measure, and write the checkpoint's files, the card last: with it, the folder is a checkpoint."""
        reported = "test" if any(len(part.test) for part in parts) else "validation"
        balanced = not self.recipe.epochs
        calibrations = calibrate_parts(cells, parts, results, reported, balanced=balanced)
        rows, logit, p_all, threshold, fold = pool_parts(parts, results, calibrations, reported)
        if len(parts) == 1:
            temperature, operating_point = calibrations[0]
        else:
            temperature, operating_point = calibrate(cells, rows, logit, balanced=balanced)
        chosen = BALANCED if balanced else GIVEN if calibrations == [UNCHOSEN] else ESTIMATED
        write_predictions(self.folder / "predictions.csv", cells, rows, logit, p_all, threshold, fold)
        if served:
            trained = all_rows(parts) if self.recipe.refit else np.concatenate([parts[0].training, parts[0].validation])
            for file in served["folder"].glob("model.*"):
                shutil.copy(file, self.folder)
            (self.folder / TRAINED_ON).write_text("\n".join(sorted(set(cells.hashes[trained]))) + "\n", "ascii")
        card = self._card(cells, parts, reported, rows, p_all, threshold, temperature, operating_point, chosen, bool(served))
        card.write(self.folder / "card.json")
        auroc, low, high = card.metrics["auroc"]
        self.log(f"wrote {self.folder}: AUROC {auroc:.3f} ({low:.3f} to {high:.3f}) on {cells.told(rows)}")
        return card

    def _card(self, cells, parts, reported, rows, p_all, threshold, temperature, operating_point, chosen, served) -> Card:
        recipe, y_true, subjects = self.recipe, cells.y_true[rows], cells.subjects[rows]
        metrics = bootstrap_metrics(y_true, p_all, subjects, cells.groups[rows], threshold)
        history = _read_rows(self.folder / "history.csv")
        sentence = SENTENCES[recipe.protocol]
        if recipe.folds_by == "stain":
            sentence += " Folds are by stain, from the subjects with the darkest cells to those with the lightest."
        elif recipe.folds_by == "chance":
            sentence += " Which subjects lie in which fold was drawn by chance, as many groups of them of a class in each."
        if reported == "validation":
            sentence += " The cells that chose the epoch are the ones reported, as in the paper."
        if recipe.refit:
            unit = "cell" if recipe.protocol == "image_level" else "subject"
            sentence += (
                f" Each figure is of a network that did not see the {unit}; the one served was then trained on all of them."
            )
        epochs = [row for row in history if row["fold"] not in ("all", "taught")]
        seen = []
        if recipe.teach_epochs:
            shown = shown_unlabelled(cells, parts, recipe)
            seen = [part.name for part in parts if np.isin(getattr(part, reported), shown).any()]
        if seen:
            sentence = sentence.replace("subjects the network never saw", "subjects whose labels the network never saw", 1)
            unseen = [part.name for part in parts if part.name not in seen]
            but = f", those of {', '.join(unseen)} excepted" if unseen else ""
            sentence += f" In its lessons, which have no labels, the network had been shown pictures of these subjects{but}."
        known = sorted(
            set(cells.subjects)
            if recipe.refit
            else {s for p in parts for side in (p.training, p.validation) for s in cells.subjects[side]}
        )
        source, licence, limits = provenance(cells, self.data.name)
        return Card(
            name=self.folder.name,
            title=recipe.title,
            architecture=recipe.architecture,
            framing=recipe.framing,
            paper=recipe.paper,
            positive_class="ALL",
            summary=recipe.summary,
            data={
                "source": source,
                "fingerprint": cells.fingerprint,
                **{
                    side: cells.count(np.unique(np.concatenate([getattr(p, side) for p in parts])))
                    for side in ("training", "validation", "test")
                },
                "training_subjects": known,
                "usual": usual_ranges(cells.choose(np.isin(cells.subjects, known))),
            },
            split={
                "protocol": PROTOCOLS[recipe.protocol],
                "sentence": sentence,
                "folds": recipe.folds,
                "test_folds": [part.name for part in parts],
                "seed": recipe.seed,
                "seen_unlabelled": seen,
            },
            training={
                "epochs": recipe.epochs,
                "best_epoch": int(np.median([_best_epoch(self.folder, part, recipe) for part in parts])),
                "cells_drawn": self._cells_drawn(cells, parts, history),
                "networks": len(parts) + recipe.refit,
                "hours": round(sum(_seconds(history, name) for name in {row["fold"] for row in history}) / 3600, 4),
                "device": self._told["device"],
                "start": _start(recipe),
                "teacher": _teacher(recipe),
                "validation_auroc": _mean([float(row["validation_auroc"]) for row in epochs]) if epochs else None,
            },
            metrics=metrics,
            operating_points=operating_points(metrics, operating_point, chosen),
            temperature=temperature,
            rotations=recipe.rotations,
            subjects=subject_rows(y_true, subjects, p_all >= threshold),
            limits=limits,
            weights_sha256=hash_weights(self.folder / WEIGHTS) if served else "",
            licence=licence,
            versions=self._told["versions"],
        )

    def _cells_drawn(self, cells: Cells, parts: list[Part], history: list[dict]) -> int:
        """Over all epochs of all networks, those of a head alone too."""
        recipe, training = self.recipe, {part.name: part.training for part in parts} | {"all": all_rows(parts)}
        if recipe.teach_epochs:
            training["taught"] = shown_unlabelled(cells, parts, recipe)
        epochs = Counter(row["fold"] for row in history if row["epoch"] != "0")
        drawn = 0
        for name, count in epochs.items():
            draws = Draws(recipe, None, cells, training[name])
            drawn += (count + recipe.head_epochs * (name != "taught")) * len(draws) * draws.batch_size
        return drawn


def lessons_of(recipe: Recipe) -> Recipe:
    """The lessons alone of a recipe that begins with them."""
    no_probe = {"probe": 0.0, "probe_persons": 0.0, "probe_imaging": 0.0}
    return replace(recipe, epochs=recipe.teach_epochs, head_epochs=0, patience=0, **no_probe)


def provenance(cells: Cells, folder: str) -> tuple[str, str, list[str]]:
    """Source, licence and limits for a card: C-NMC's where cells are named as there, else what is true of any cells."""
    official = np.zeros(len(cells), bool) if cells.preliminary is None else cells.preliminary
    named = [bool(subject_of(file.name)) or listed for file, listed in zip(cells.files, official, strict=True)]
    if any(named):
        others = "" if all(named) else f", and cells of {folder}"
        return (
            f"C-NMC 2019 (Gupta & Gupta, The Cancer Imaging Archive, doi 10.7937/tcia.2019.dc64i46r, CC BY 3.0){others}",
            "weights: as the laboratory decides; data: partly CC BY 3.0"
            if others
            else "CC BY 4.0 (weights); trained on CC BY 3.0 data",
            [
                "One laboratory's stain and microscope; other laboratories were not tested. Within C-NMC, networks trained on"
                " the darker-stained half of the subjects read the lighter half markedly worse, and the other way round.",
                "Only single, segmented cells on black at C-NMC's magnification.",
                "Told apart: ALL blasts and healthy B-lymphoid precursors. Any other cell type is misread.",
                "Each subject is all ALL or all HEM, so the share of blasts in a mixed sample could not be validated.",
            ],
        )
    return (
        folder,
        "weights: as the laboratory decides; data: the laboratory's own",
        [
            "Stains and microscopes other than those of its cells were not tested.",
            "Only single, segmented cells on black at the magnification of its cells.",
            "Told apart: what was labelled ALL and HEM. Any other cell type is misread.",
        ],
    )


def _best_epoch(folder: Path, part: Part, recipe: Recipe) -> int:
    rows = [row for row in _read_rows(folder / "history.csv") if row["fold"] == part.name]
    if not len(part.validation) or not recipe.epochs:
        return int(rows[-1]["epoch"])  # fewer than the recipe's where it was told to finish
    scores = {int(row["epoch"]): float(row[f"validation_{recipe.watch}"]) for row in rows}
    scores = {epoch: score for epoch, score in scores.items() if np.isfinite(score)}  # NaN where an epoch diverged
    return (min if recipe.watch == "loss" else max)(scores, key=scores.get)


def _seconds(history: list[dict], name: str) -> float:
    return max(float(row["seconds"]) for row in history if row["fold"] == name)


def _mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 4) if np.isfinite(values).all() else None


def _teacher(recipe: Recipe) -> str:
    if not recipe.teacher:
        return ""
    what = "maps, place by place and without labels," if recipe.teach_epochs else "features"
    return f"{what} of an ImageNet network ({Path(recipe.teacher).name})"


def _start(recipe: Recipe) -> str:
    if recipe.grow_from:
        return f"grown from an ImageNet MobileNetV2 ({Path(recipe.grow_from).name})"
    return f"ImageNet ({Path(recipe.weights).name})" if recipe.weights else "random weights"


def _read_rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _in_float32(network, recipe: Recipe):
    """The network as it is served: held-out cells are read as precisely."""
    with precise("float32"), spread(1):
        same = build_network(replace(recipe, weights=""))
    same.set_weights(network.get_weights())
    refresh(same.layers)
    return same


def precision_of(name: str) -> str:
    """Keras' precision policy: "auto" is mixed precision on a GPU, float32 elsewhere."""
    if name != "auto":
        return name
    if not any("gpu" in device.lower() for device in list_devices()):
        return "float32"
    # NVIDIA's before Ampere (T4, V100) do not compute bfloat16
    return "mixed_float16" if any((gpu["capability"] or 8) < 8 for gpu in gpus()) else "mixed_bfloat16"


def _commit() -> str:
    """The git commit of this source, "" where it is no checkout or there is no git."""
    git = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
