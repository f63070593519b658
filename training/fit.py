"""Fit one network: cells drawn, augmented on the device, the best epoch kept; a killed fit resumes exactly."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

import model_zoo
from inference.images import rotate_cells
from model_zoo._files import whole_file
from training.augment import augmentation
from training.data import Cells
from training.devices import divided, held, spread, whole
from training.draws import Draws
from training.errors import DataError, OutOfMemory, RecipeError, Stopped, halt
from training.lessons import lesson_gap
from training.metrics import auroc, cell_metrics, sigmoid
from training.probe import fit_probe
from training.recipe import Recipe
from training.splits import Part

VALIDATED = ("validation_auroc", "validation_accuracy", "validation_weighted_f1", "validation_loss")
HISTORY = ("fold", "epoch", "loss", "learning_rate", *VALIDATED, "seconds")
# TensorFlow's own graph is quicker on a processor; JAX would run a step operation by operation, PyTorch does so anyway
XLA = keras.backend.backend() == "jax"
# of mobilenet_v2_pyramid, what a teacher teaches
_TAUGHT = re.compile(r".*_block_(6|13)_expand_relu_moments")


def build_network(recipe: Recipe):
    """The recipe's network with its initial weights.

    Raises:
        RecipeError: pictures too small for its poolings. UnknownArchitectureError, WeightsError: as they say.
    """
    architecture = model_zoo.find_architecture(recipe.architecture)
    try:
        return architecture.build(input_size=recipe.input_size, weights=recipe.weights or None)
    except ValueError as error:  # Keras' own, and long
        raise RecipeError(
            f"{architecture.title} cannot be built for pictures of {recipe.input_size} px: its convolutions and poolings leave "
            f"nothing of them. Raise input_size; its own is {architecture.input_size}."
        ) from error


def fit(
    network,
    recipe: Recipe,
    packed,
    cells: Cells,
    part: Part,
    folder: Path,
    report,
    *,
    split_batch: int = 1,
    taught: bool = False,
    began: float | None = None,
) -> None:
    """Train `network` and leave in it the weights of the best epoch (of the last one, without validation cells).

    `folder` takes `last.npz`, from which a fit that was killed goes on exactly, and `best.npz`. A recipe with
    `teach_epochs` teaches; without them it learns labels, and `taught` says that the network was taught before.

    Args:
        network: made within `training.devices.spread(recipe.devices)`.
        packed: uint8 (n, S, S, 3), the framed cells.
        report: a `training.run.Run`: log(), progress(), history(), subjects(), stopping() and finishing(); a probe keeps the
            features of a network that other folds start from too as its `untouched`.
        began: when the work on this part did, by `time.time`, if before this call.
        split_batch: a batch is taken in this many pieces whose gradients are summed, where memory is short.
    Raises:
        DataError: no epoch gave finite scores. Stopped: `report.stopping()` came true. OutOfMemory: of the device.
    """
    rows, batch_size = part.training, max(1, recipe.batch_size // split_batch)
    resumed = (folder / "last.npz").exists()
    with memory_told(batch_size):
        if not taught:
            _standardise(network, packed, rows)
        logit_of = keras.Model(network.inputs, network.get_layer("logit").output)
        with spread(recipe.devices):
            trainer, loss = _trainer(network, logit_of, recipe, packed, rows)
        draws = Draws(recipe, held(packed, recipe.devices), cells, rows, batch_size)
        watch = _Watch(network, logit_of, recipe, cells, part, folder, report, draws, split_batch)
        watch.created = began or watch.created
        if recipe.head_epochs and not resumed:
            _fit_head(network, trainer, recipe, draws, loss, report)
        if recipe.probe and not resumed:
            fit_probe(network, recipe, packed, cells, rows, report, batch_size)
        _compile(trainer, loss, network, recipe, len(draws), split_batch)
        watch.set_model(trainer)
        if resumed:
            watch.restore()
        if not recipe.epochs:
            watch.keep_only()
        elif watch.epoch < recipe.epochs and not watch.enough:
            epochs = {"initial_epoch": watch.epoch, "epochs": recipe.epochs}
            with divided(recipe.devices):
                trainer.fit(draws, **epochs, verbose=0, shuffle=False, callbacks=[watch])
    if not (folder / "best.npz").exists():
        raise DataError("The training diverged: no epoch gave finite scores. Lower the recipe's learning_rate.")
    with np.load(folder / "best.npz") as best:
        network.set_weights([best[f"w{i}"] for i in range(len(network.get_weights()))])
    round_to_half(network)


class Clock(keras.callbacks.Callback):
    """`seconds` of the last epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):  # Keras waits for the device before it
        self.seconds = time.perf_counter() - self.began
        _ = self.model  # brings the weights back on JAX, without which Keras' `fit` cannot end where it averages them


def time_step(network, recipe: Recipe, packed, cells: Cells, steps: int) -> float:
    """Seconds of a training step as `fit` takes it, over `steps` of them, after as many that also compile.

    Raises:
        OutOfMemory: of the device.
    """
    rows, clock = np.arange(len(cells)), Clock()
    logit_of = keras.Model(network.inputs, network.get_layer("logit").output)
    recipe = replace(recipe, draws_per_epoch=steps * recipe.batch_size)
    draws = Draws(recipe, held(packed, recipe.devices), cells, rows)
    with memory_told(recipe.batch_size):
        with spread(recipe.devices):
            trainer, loss = _trainer(network, logit_of, recipe, packed, rows)
        _compile(trainer, loss, network, recipe, steps)
        with divided(recipe.devices):
            trainer.fit(draws, epochs=2, verbose=0, shuffle=False, callbacks=[clock])
    return clock.seconds / steps


def _trainer(network, logit_of, recipe: Recipe, packed, rows):
    """uint8 cells -> augmentation -> logit, and with a teacher the gap to it (in lessons nothing else); and the loss."""
    x = keras.Input(network.inputs[0].shape[1:], dtype="uint8")
    augmented = x
    for layer in augmentation(recipe):
        augmented = layer(augmented)
    augmented = keras.ops.cast(augmented, "float32")
    if recipe.teach_epochs:
        return keras.Model(x, lesson_gap(network, recipe, augmented, packed, rows)), "mean_absolute_error"
    loss = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing)
    if not recipe.teacher:
        return keras.Model(x, logit_of(augmented)), loss
    logit, gap = _taught(network, recipe, augmented)
    trainer = keras.Model(x, {"logit": logit, "gap": gap})
    return trainer, {"logit": loss, "gap": "mean_absolute_error"}  # the gap is a mean square already, its target is 0


def round_to_half(network) -> None:
    """Round kernels to the float16 that checkpoints store: what is measured is what is served."""
    for variable in network.weights:
        if len(variable.shape) >= 2:
            value = keras.ops.convert_to_numpy(variable)  # JAX would compile a cast of every shape
            variable.assign(value.astype("float16").astype("float32"))


def predict_logit(network, packed, rows, *, batch_size: int, rotations: int = 1, report=None) -> np.ndarray:
    """Logits of the framed cells at `rows`, float64 (n,), averaged over `rotations`.

    Raises:
        Stopped: `report.stopping()` came true. OutOfMemory: of the device.
    """
    logit_of = keras.Model(network.inputs, network.get_layer("logit").output)
    with memory_told(batch_size):
        return _predict(logit_of, packed, rows, batch_size, rotations, report)


def _predict(logit_of, packed, rows, batch_size: int, rotations: int = 1, report=None) -> np.ndarray:
    if not len(rows):
        return np.zeros(0)

    def logits(batch):
        halt(report)
        return keras.ops.convert_to_numpy(logit_of.predict_on_batch(batch))[:, 0]

    total = np.zeros(len(rows))
    filled = np.resize(rows, -(-len(rows) // batch_size) * batch_size)  # a last batch of another size would be compiled anew
    for turn in range(rotations):
        batches = (packed[filled[i : i + batch_size]] for i in range(0, len(filled), batch_size))
        turned = (rotate_cells(batch, turn) if turn else batch for batch in batches)
        with whole():
            found = [logits(batch) for batch in turned]
        total += np.concatenate(found)[: len(rows)].astype("float64")
    return total / rotations


def _fit_head(network, trainer, recipe: Recipe, draws, loss, report) -> None:
    backbone = network.layers[: network.layers.index(network.get_layer("embedding"))]
    for layer in backbone:
        layer.trainable = False
    with spread(recipe.devices):
        trainer.compile(keras.optimizers.AdamW(10.0 * recipe.learning_rate), loss, jit_compile=XLA)
    stopping = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs=None: halt(report))
    for draws.epoch in range(recipe.epochs, recipe.epochs + recipe.head_epochs):  # draws that the fit itself does not see
        with divided(recipe.devices):
            trainer.fit(draws, verbose=0, shuffle=False, callbacks=[stopping])
    for layer in backbone:
        layer.trainable = True
    report.log(f"head trained for {recipe.head_epochs} epochs")


def _freeze(network, recipe: Recipe) -> dict[str, float]:
    """Layer name -> factor of the learning rate, where it is not 1; layers of factor 0 stop training."""
    factors = {}
    for layer in network.layers:
        factor = next((f for pattern, f in recipe.rates.items() if re.fullmatch(pattern, layer.name)), 1)
        if factor == 0:
            layer.trainable = False
        elif factor != 1:
            factors |= {variable.path: factor for variable in layer.trainable_variables}
    return factors


def _taught(network, recipe: Recipe, cells):
    """The network's logit (N, 1) of the cells, and the gap (N, 1) to its teacher, in one pass.

    The gap is the mean square between a frozen ImageNet network's standardised features and their prediction, which is
    linear in the embedding.
    """
    teacher = model_zoo.find_architecture("mobilenet_v2_pyramid").build(input_size=recipe.input_size, weights=recipe.teacher)
    moments = [layer.output for layer in teacher.layers if _TAUGHT.fullmatch(layer.name)]
    features = keras.Model(teacher.inputs, keras.layers.Concatenate()(moments))
    features.trainable = False
    wanted = keras.layers.BatchNormalization(center=False, scale=False)(features(cells))
    embedding = network.get_layer("embedding")
    pooled = embedding.input if len(embedding.input.shape) == 2 else embedding.output
    logit, pooled = keras.Model(network.inputs, [network.get_layer("logit").output, pooled])(cells)
    found = keras.layers.Dense(wanted.shape[-1])(pooled)
    return logit, keras.ops.mean(keras.ops.square(found - wanted), axis=-1, keepdims=True)


def _compile(trainer, loss, network, recipe: Recipe, steps: int, split_batch: int = 1) -> None:
    """Make the trainer ready for `fit`: frozen layers, optimizer, layer-wise rates."""
    factors = _freeze(network, recipe)
    with spread(recipe.devices):
        optimizer = _optimizer(recipe, steps, factors, trainer, split_batch)
        optimizer.build(trainer.trainable_variables)  # else fit() traces the whole step twice
        trainer.compile(optimizer, loss, jit_compile=XLA)


def _optimizer(recipe: Recipe, steps: int, factors: dict[str, float], trainer, split_batch: int):
    rate = _schedule(recipe, steps)
    # Keras averages after each piece of a batch, also of those that move nothing
    common = {"use_ema": True, "ema_momentum": recipe.ema ** (1 / split_batch)} if recipe.ema else {}
    if split_batch > 1:
        common["gradient_accumulation_steps"] = split_batch
    kind = {
        "adamw": keras.optimizers.AdamW,
        "adam": keras.optimizers.Adam,
        "sgd": keras.optimizers.SGD,
        "rmsprop": keras.optimizers.RMSprop,
    }[recipe.optimizer]
    if recipe.optimizer == "sgd":
        common["momentum"] = recipe.momentum
    if recipe.weight_decay or recipe.optimizer == "adamw":
        common["weight_decay"] = recipe.weight_decay
    of = [factors.get(variable.path, 1.0) for variable in trainer.trainable_variables]

    class LayerWise(kind):
        """The same rule, each variable at its own share of the learning rate (paper 002)."""

        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate * of[self._get_variable_index(variable)])

    optimizer = (LayerWise if factors else kind)(rate, **common)
    if recipe.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def _schedule(recipe: Recipe, steps: int):
    schedules = keras.optimizers.schedules
    if recipe.schedule == "steps":
        return schedules.ExponentialDecay(recipe.learning_rate, recipe.step_epochs * steps, 0.1, staircase=True)
    if recipe.schedule == "constant":
        return float(recipe.learning_rate)  # Keras takes no 1
    warmup = int(recipe.warmup_epochs * steps)
    peak = {"warmup_target": recipe.learning_rate, "warmup_steps": warmup} if warmup else {}
    start = recipe.learning_rate / 25 if warmup else recipe.learning_rate
    return schedules.CosineDecay(start, decay_steps=max(1, recipe.epochs * steps - warmup), **peak)


class _Watch(keras.callbacks.Callback):
    """Progress after each batch; after each epoch the validation figures, the best weights, and all that a resume needs."""

    def __init__(self, network, logit_of, recipe, cells, part, folder, report, draws, split_batch=1):
        super().__init__()
        self.split_batch = split_batch
        self.network, self.logit_of, self.recipe, self.cells = network, logit_of, recipe, cells
        self.part, self.folder, self.report, self.draws = part, folder, report, draws
        self.epoch, self.best, self.best_epoch, self.seconds, self.bar = 0, None, 0, 0.0, None
        self.created = time.time()

    @property
    def enough(self) -> str:
        """Why no further epoch is needed, "" while one is."""
        patience = self.recipe.patience
        if patience and self.epoch - self.best_epoch >= patience:
            return f"no better {self.recipe.watch} for {patience} epochs, stopping early"
        if self.best is not None and self.report.finishing():
            return f"finished as asked, with epoch {self.best_epoch}"
        return ""

    def on_epoch_begin(self, epoch, logs=None):
        self.draws.epoch, self.began = epoch, time.time()
        # disable=None: no bar where the output is no terminal
        self.bar = tqdm(total=len(self.draws), desc=f"{self.part.name} epoch {epoch + 1}/{self.recipe.epochs}", disable=None)

    def on_train_batch_begin(self, batch, logs=None):
        """Not `..._end`: for that, Keras waits until a GPU has done the batch, and the GPU then for the next one."""
        if batch == 1:
            self.first = time.time()  # the first step of all also compiles, for minutes: no measure of those to come
        if batch > 1:
            self._tell(batch)
        if self.report.stopping():
            self.bar.close()
            complete = "1 epoch is" if self.epoch == 1 else f"{self.epoch} epochs are"
            raise Stopped(f"Stopped in epoch {self.epoch + 1}; {complete} complete.")

    def _tell(self, done: int) -> None:
        self.bar.update(done - self.bar.n)
        since, steps = (self.first, done - 1) if done > 1 else (self.began, 1)
        spent = (time.time() - since) / steps
        left = (self.recipe.epochs - self.epoch) * len(self.draws) - done
        self.report.progress(
            fold=self.part.name,
            epoch=self.epoch + 1,
            epochs=self.recipe.epochs,
            batch=done,
            batches=len(self.draws),
            seconds_per_batch=round(spent, 4),
            seconds_left=round(spent * left),
            best=None
            if self.best is None or not len(self.part.validation)
            else {self.recipe.watch: round(self.best, 4), "epoch": self.best_epoch},
        )

    def on_epoch_end(self, epoch, logs=None):
        self._tell(len(self.draws))
        self.bar.close()
        self.epoch = epoch + 1
        trainer = self.model  # on JAX, asking for it brings the weights back from the device: before they are read
        rate = float(keras.ops.convert_to_numpy(trainer.optimizer.learning_rate))
        if self.recipe.ema:
            raw = [w.copy() for w in trainer.get_weights()]  # of the head that predicts a teacher as well
            trainer.optimizer.finalize_variable_values(trainer.trainable_variables)
            # copies: JAX would let network and average share one array, and the next step deletes it
            self.network.set_weights([w.copy() for w in self.network.get_weights()])
        figures = self._validate()
        score = figures[f"validation_{self.recipe.watch}"] if len(self.part.validation) else float(self.epoch)
        gain = self._gain(score)
        finite = all(np.isfinite(w).all() for w in self.network.get_weights())
        if finite and np.isfinite(gain) and (self.best is None or gain > self._gain(self.best)):
            self.best, self.best_epoch = score, self.epoch
            save_arrays(self.folder / "best.npz", {f"w{i}": w for i, w in enumerate(self.network.get_weights())})
        if self.recipe.ema:
            trainer.set_weights(raw)
        self.seconds += time.time() - self.began
        row = {
            "fold": self.part.name,
            "epoch": self.epoch,
            "loss": round(float(logs["loss"]), 4),
            "learning_rate": f"{rate:.3g}",
        }
        row |= {k: round(v, 4) for k, v in figures.items()} | {"seconds": round(self.seconds)}
        self._save()
        self.report.history(row)
        told = f", validation AUROC {figures['validation_auroc']:.3f}" if len(self.part.validation) else ""
        minutes = f"{self.seconds / 60:.1f} min"
        self.report.log(f"{self.part.name} epoch {self.epoch} of {self.recipe.epochs}: loss {row['loss']}{told}, {minutes}")
        if enough := self.enough:
            self.report.log(f"{self.part.name}: {enough}")
            self.model.stop_training = True

    def keep_only(self) -> None:
        """Without epochs, what the network is now is what is kept."""
        figures = {k: round(v, 4) for k, v in self._validate().items()}
        save_arrays(self.folder / "best.npz", {f"w{i}": w for i, w in enumerate(self.network.get_weights())})
        row = dict.fromkeys(HISTORY, "") | {"fold": self.part.name, "epoch": 0, "seconds": round(time.time() - self.created)}
        self.report.history(row | figures)

    def _gain(self, score: float) -> float:
        return -score if self.recipe.watch == "loss" and len(self.part.validation) else score

    def _validate(self) -> dict[str, float]:
        rows = self.part.validation
        if not len(rows):
            return dict.fromkeys(VALIDATED, float("nan"))
        y_true = self.cells.y_true[rows]
        # not stopped in the midst: the epoch that it measures would be lost
        logit = _predict(self.logit_of, self.draws.packed, rows, self.draws.batch_size)
        if not np.isfinite(logit).all():
            return dict.fromkeys(VALIDATED, float("nan"))
        p_all, subjects = sigmoid(logit), self.cells.subjects[rows]
        self.report.subjects(
            [
                {
                    "fold": self.part.name,
                    "epoch": self.epoch,
                    "subject": s,
                    "y_true": int(y_true[subjects == s][0]),
                    "n": int((subjects == s).sum()),
                    "mean_p_all": round(float(p_all[subjects == s].mean()), 4),
                }
                for s in sorted(set(subjects))
            ]
        )
        figures = cell_metrics(y_true, p_all, 0.5)
        return {
            "validation_auroc": auroc(y_true, logit),
            "validation_accuracy": figures["accuracy"],
            "validation_weighted_f1": figures["weighted_f1"],
            "validation_loss": float(np.mean(np.logaddexp(0, logit) - y_true * logit)),
        }

    def _save(self) -> None:
        state = {f"v{i}": np.asarray(keras.ops.convert_to_numpy(v)) for i, v in enumerate(self._variables())}
        told = {name: getattr(self, name) for name in ("epoch", "best", "best_epoch", "seconds", "split_batch")}
        save_arrays(self.folder / "last.npz", state | {"told": np.array(json.dumps(told))})

    def restore(self) -> None:
        with np.load(self.folder / "last.npz") as state:
            for i, variable in enumerate(self._variables()):
                variable.assign(state[f"v{i}"])
            for name, value in json.loads(str(state["told"])).items():
                setattr(self, name, value)
        self.report.log(f"{self.part.name}: goes on after epoch {self.epoch}")

    def _variables(self) -> list:
        """Weights, statistics, the seeds of augmentation and dropout, and the optimizer's own."""
        return [*self.model.variables, *self.model.optimizer.variables]


def split_of(folder: Path) -> int:
    """The `split_batch` of the fit that goes on from `folder`; 1 where one begins. With another, its optimizer holds other
    variables."""
    if not (folder / "last.npz").exists():
        return 1
    with np.load(folder / "last.npz") as state:
        return json.loads(str(state["told"])).get("split_batch", 1)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz that appears whole or not at all."""
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


def append_rows(path: Path, rows: list[dict]) -> None:
    """Append to a CSV, with a header if it is new."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def _standardise(network, packed, rows) -> None:
    """In-graph standardisation with the training cells' mean and variance (paper 003), of whatever the layer is fed."""
    sample = packed[np.sort(np.random.default_rng(0).choice(rows, min(500, len(rows)), replace=False))].astype("float32")
    for layer in network.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.name.startswith("standardise"):
            fed = keras.Model(network.inputs[0], layer.input)
            seen = np.concatenate([keras.ops.convert_to_numpy(fed(sample[i : i + 50])) for i in range(0, len(sample), 50)])
            seen = seen.astype("float64")
            layer.adapt_mean.assign(seen.mean((0, 1, 2)))
            layer.adapt_variance.assign(seen.var((0, 1, 2)))
            layer.finalize_state()


@contextlib.contextmanager
def memory_told(batch_size: int):
    """Inside, a device's lack of memory is OutOfMemory. Each backend has its own error class; all of them say so in words.

    Not the machine's own: smaller batches would not help there, and what was trained is kept.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        said = f"{type(error).__name__} {error}".lower()
        if any(word in said for word in ("resourceexhausted", "resource_exhausted", "out of memory", "outofmemory")):
            raise OutOfMemory(f"The device has too little memory for batches of {batch_size} cells.") from error
        raise
