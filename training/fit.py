"""Train one recipe, evaluate it on unseen subjects, and write a checkpoint folder."""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np

import model_zoo
from model_zoo import Card
from model_zoo._checkpoint import WEIGHTS, hash_weights
from model_zoo._onnx import fill_model, write_onnx
from training.augment import augmentation
from training.data import Cells, cell_label, index_cells, pack_cells, split_by_subject
from training.errors import DataError
from training.metrics import auroc, bootstrap_metrics, fit_temperature, youden_threshold
from training.recipe import Recipe, read_recipe


def train(recipe_file: Path, data: Path, out: Path, *, log: Callable[[str], None] = print) -> Card:
    """Run a recipe and write `out`: model.onnx, card.json, recipe.toml, history.csv, predictions.csv.

    The validation fold chooses the epoch, the temperature and the operating point; the test fold is read once,
    at the end. `out` appears whole or not at all.

    Args:
        recipe_file: a TOML recipe.
        data: folder of C-NMC cells, see `index_cells`; `weights` of the recipe is relative to it.
        out: checkpoint folder to write; its name is the checkpoint's.
    Raises:
        RecipeError, DataError: before anything is written.
    """
    recipe = read_recipe(recipe_file)
    starts = {name: str(Path(data) / getattr(recipe, name)) for name in ("weights", "teacher") if getattr(recipe, name)}
    for start in starts.values():
        if not Path(start).is_file():
            raise DataError(f"The recipe starts from {start}, which does not exist.")
    recipe = replace(recipe, **starts)
    cells = index_cells(data)
    fold_of = split_by_subject(cells, folds=recipe.folds, seed=recipe.seed)
    test, validation = fold_of == recipe.test_fold, fold_of == recipe.validation_fold
    training = ~(test | validation)
    for part, where in (("training", training), ("validation", validation), ("test", test)):
        log(f"{part:10} {cells.count(where)}")

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        card = _train_into(partial, out.name, recipe, cells, training, validation, test, log)
        shutil.copy(recipe_file, partial / "recipe.toml")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log(f"wrote {out}: AUROC {card.metrics['auroc']} on {card.data['test']}")
    return card


def _train_into(folder, name, recipe, cells, training, validation, test, log) -> Card:
    packed, problems = pack_cells(cells, recipe.framing, cache=Path("runs/cache"), progress=_every(500, "packed", log))
    for problem in problems:
        log(f"skipped: {problem}")
    if problems:
        unread = np.array([any(p.startswith(f"{cell_label(file)}: ") for p in problems) for file in cells.files])
        training, validation, test = training & ~unread, validation & ~unread, test & ~unread

    keras.utils.set_random_seed(recipe.seed)
    network = model_zoo.find_architecture(recipe.architecture).build(
        input_size=recipe.input_size, weights=recipe.weights or None
    )
    started = time.time()
    history = _fit(network, recipe, packed, cells, np.flatnonzero(training), np.flatnonzero(validation), folder, log)
    hours = (time.time() - started) / 3600

    logit_of = keras.Model(network.inputs, network.get_layer("logit").output)
    write_onnx(network, folder / WEIGHTS)  # rounds to float16 ...
    fill_model(network, folder / WEIGHTS)  # ... and measures what was written
    held = np.flatnonzero(test)
    temperature, threshold = _calibrate(logit_of, packed, cells, np.flatnonzero(validation), recipe.batch_size)
    logit = _predict(logit_of, packed, held, recipe.batch_size)
    p_all = 1 / (1 + np.exp(-logit / temperature))
    card = _write_card(name, recipe, cells, training, validation, held, p_all, temperature, threshold, history, hours, folder)
    _write_predictions(folder / "predictions.csv", cells, held, logit, p_all)
    (folder / "best.weights.h5").unlink()
    return card


class Draws(keras.utils.PyDataset):
    """Batches drawn at random, half ALL and half HEM, subjects weighed as the recipe says."""

    def __init__(self, recipe: Recipe, packed: np.ndarray, cells: Cells, rows: np.ndarray):
        super().__init__()
        self.recipe, self.packed, self.y, self.rows = recipe, packed, cells.y_true, rows
        self.rng = np.random.default_rng(recipe.seed)
        _, index, counts = np.unique(cells.subjects[rows], return_inverse=True, return_counts=True)
        weight = counts[index].astype(float) ** (recipe.subject_power - 1)
        self.chance = np.zeros(len(rows))
        for value in (0, 1):
            of_class = self.y[rows] == value
            self.chance[of_class] = weight[of_class] / weight[of_class].sum() / 2

    def __len__(self) -> int:
        return max(1, self.recipe.draws_per_epoch // self.recipe.batch_size)

    def __getitem__(self, index: int):
        rows = np.sort(self.rng.choice(self.rows, self.recipe.batch_size, p=self.chance))
        y_true = self.y[rows, None].astype("float32")
        target = {"logit": y_true, "gap": np.zeros_like(y_true)} if self.recipe.teacher else y_true
        return self.packed[rows].astype("float32"), target


def _fit(network, recipe, packed, cells, rows, validation_rows, folder, log) -> list[dict]:
    """Train, and leave in `network` the weights of the epoch with the best AUROC on the validation subjects."""
    for layer in network.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.name == "standardise":
            _standardise(layer, packed, rows)
    x = keras.Input(network.inputs[0].shape[1:])
    augmented = x
    for layer in augmentation(recipe):
        augmented = layer(augmented)
    logit_of = keras.Model(network.inputs, network.get_layer("logit").output)
    trainer = keras.Model(x, logit_of(augmented))
    loss = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing)
    if recipe.teacher:
        trainer = keras.Model(x, {"logit": trainer.output, "gap": _teacher_gap(network, recipe, augmented)})
        loss = {"logit": loss, "gap": "mean_absolute_error"}  # the gap is a mean square already, its target is 0
    draws = Draws(recipe, packed, cells, rows)
    if recipe.head_epochs:
        backbone = network.layers[: network.layers.index(network.get_layer("embedding"))]
        for layer in backbone:
            layer.trainable = False
        trainer.compile(keras.optimizers.AdamW(10 * recipe.learning_rate), loss, jit_compile=False)
        trainer.fit(draws, epochs=recipe.head_epochs, verbose=0, shuffle=False)
        for layer in backbone:
            layer.trainable = True
        log(f"head trained for {recipe.head_epochs} epochs")
    optimizer = _optimizer(recipe, len(draws))
    optimizer.build(trainer.trainable_variables)  # else fit() traces the whole step twice
    trainer.compile(optimizer, loss, jit_compile=False)
    watch = _KeepBest(network, logit_of, recipe, packed, cells, validation_rows, folder, log)
    trainer.fit(draws, epochs=recipe.epochs, verbose=0, shuffle=False, callbacks=[watch])
    if watch.best < 0:
        raise DataError("The training diverged: no epoch gave finite scores. Lower the recipe's learning_rate.")
    network.load_weights(folder / "best.weights.h5")
    return watch.history


def _teacher_gap(network, recipe: Recipe, cells):
    """Mean square (N, 1) between the standardised pooled features of a frozen MobileNetV2 and their prediction."""
    teacher = model_zoo.find_architecture("mobilenet_v2").build(input_size=recipe.input_size, weights=recipe.teacher)
    features = keras.Model(teacher.inputs, teacher.get_layer("embedding").output)
    features.trainable = False
    wanted = keras.layers.BatchNormalization(center=False, scale=False)(features(cells))
    pooled = keras.Model(network.inputs, network.get_layer("embedding").input)
    found = keras.layers.Dense(wanted.shape[-1])(pooled(cells))
    return keras.ops.mean(keras.ops.square(found - wanted), axis=-1, keepdims=True)


def _optimizer(recipe: Recipe, steps: int):
    warmup = int(recipe.warmup_epochs * steps)
    rate = keras.optimizers.schedules.CosineDecay(
        recipe.learning_rate / 25,
        decay_steps=max(1, recipe.epochs * steps - warmup),
        warmup_target=recipe.learning_rate,
        warmup_steps=warmup,
    )
    average = {"use_ema": True, "ema_momentum": recipe.ema} if recipe.ema else {}
    optimizer = keras.optimizers.AdamW(rate, weight_decay=recipe.weight_decay, **average)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


class _KeepBest(keras.callbacks.Callback):
    """After each epoch: evaluate the weight average on the validation subjects, keep the best, go on from the raw weights."""

    def __init__(self, network, logit_of, recipe, packed, cells, rows, folder, log):
        super().__init__()
        self.network, self.logit_of, self.recipe, self.packed = network, logit_of, recipe, packed
        self.cells, self.rows, self.folder, self.log = cells, rows, folder, log
        self.history, self.best, self.started = [], -1.0, time.time()

    def on_epoch_end(self, epoch, logs=None):
        raw = self.network.get_weights()
        if self.recipe.ema:
            self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
        score = auroc(self.cells.y_true[self.rows], _predict(self.logit_of, self.packed, self.rows, self.recipe.batch_size))
        if score > self.best:
            self.best = score
            self.network.save_weights(self.folder / "best.weights.h5")
        self.network.set_weights(raw)
        row = {
            "epoch": epoch + 1,
            "loss": round(float(logs["loss"]), 4),
            "validation_auroc": round(score, 4),
            "seconds": round(time.time() - self.started),
        }
        self.history.append(row)
        with (self.folder / "history.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(self.history)
        self.log(f"epoch {epoch + 1} of {self.recipe.epochs}: {row}")


def _standardise(layer, packed, rows) -> None:
    """In-graph standardisation with the training cells' mean and variance (paper 003)."""
    sample = packed[np.sort(np.random.default_rng(0).choice(rows, min(500, len(rows)), replace=False))].astype("float64")
    layer.adapt_mean.assign(sample.mean((0, 1, 2)))
    layer.adapt_variance.assign(sample.var((0, 1, 2)))
    layer.finalize_state()


def _predict(logit_of, packed, rows, batch_size: int) -> np.ndarray:
    batches = [packed[rows[i : i + batch_size]].astype("float32") for i in range(0, len(rows), batch_size)]
    return np.concatenate([keras.ops.convert_to_numpy(logit_of.predict_on_batch(b))[:, 0] for b in batches]).astype("float64")


def _calibrate(logit_of, packed, cells, rows, batch_size) -> tuple[float, float]:
    """Temperature and threshold, rounded as the card gives them: figures are measured with what is served."""
    logit, y_true = _predict(logit_of, packed, rows, batch_size), cells.y_true[rows]
    temperature = round(fit_temperature(y_true, logit), 4)
    return temperature, round(youden_threshold(y_true, 1 / (1 + np.exp(-logit / temperature)), cells.subjects[rows]), 4)


def _write_card(name, recipe, cells, training, validation, held, p_all, temperature, threshold, history, hours, folder) -> Card:
    y_true, subjects = cells.y_true[held], cells.subjects[held]
    metrics = bootstrap_metrics(y_true, p_all, subjects, threshold)
    per_subject = [
        [s, int(y_true[subjects == s][0]), int((subjects == s).sum()), int((p_all[subjects == s] >= threshold).sum())]
        for s in sorted(set(subjects))
    ]
    best = max(history, key=lambda row: row["validation_auroc"])
    drawn = recipe.draws_per_epoch * recipe.epochs
    card = Card(
        name=name,
        title=recipe.title,
        architecture=recipe.architecture,
        framing=recipe.framing,
        positive_class="ALL",
        summary=recipe.summary,
        data={
            "source": "C-NMC 2019 (Gupta & Gupta, The Cancer Imaging Archive, doi 10.7937/tcia.2019.dc64i46r, CC BY 3.0)",
            "fingerprint": cells.fingerprint,
            "training": cells.count(training),
            "validation": cells.count(validation),
            "test": cells.count(held),
        },
        split={
            "protocol": "by subject",
            "sentence": "Measured on subjects the network never saw; subjects that share a picture stay on one side.",
            "folds": recipe.folds,
            "test_fold": recipe.test_fold,
            "validation_fold": recipe.validation_fold,
            "seed": recipe.seed,
        },
        training={
            "epochs": recipe.epochs,
            "best_epoch": best["epoch"],
            "cells_drawn": drawn,
            "hours": round(hours, 2),
            "device": keras.distribution.list_devices()[0],
            "start": f"ImageNet ({Path(recipe.weights).name})" if recipe.weights else "random weights",
            "teacher": f"features of an ImageNet network ({Path(recipe.teacher).name})" if recipe.teacher else "",
            "validation_auroc": best["validation_auroc"],
        },
        metrics=metrics,
        operating_points={
            "default": {
                "threshold": threshold,
                "chosen": "largest sensitivity + specificity on the validation subjects, every subject weighing the same",
                "sensitivity": metrics["sensitivity"],
                "specificity": metrics["specificity"],
            }
        },
        temperature=temperature,
        subjects=per_subject,
        limits=[
            "One laboratory's stain and microscope; other laboratories were not tested.",
            "Only single, segmented cells on black at C-NMC's magnification.",
            "Told apart: ALL blasts and healthy B-lymphoid precursors. Any other cell type is misread.",
            "Each subject is all ALL or all HEM, so the share of blasts in a mixed sample could not be validated.",
        ],
        weights_sha256=hash_weights(folder / WEIGHTS),
        licence="CC BY 4.0 (weights); trained on CC BY 3.0 data",
        versions={p: version(p) for p in ("keras", keras.backend.backend(), "numpy")},
    )
    card.write(folder / "card.json")
    return card


def _write_predictions(path: Path, cells: Cells, rows, logit, p_all) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "subject", "y_true", "logit", "p_all"])
        for row, z, p in zip(rows, logit, p_all, strict=True):
            writer.writerow([cells.files[row].name, cells.subjects[row], int(cells.y_true[row]), f"{z:.9g}", f"{p:.6f}"])


def _every(step: int, verb: str, log) -> Callable[[int, int], None]:
    return lambda done, total: log(f"{verb} {done} of {total}") if done % step == 0 or done == total else None
