"""One fit: what is drawn, what is trained how fast, what is kept, and that a killed one goes on exactly."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from model_zoo import find_architecture, load_checkpoint
from training.data import Cells, index_cells, pack_cells, verify_cells
from training.draws import Draws
from training.errors import OutOfMemory, Stopped
from training.fit import _freeze, _optimizer, _standardise, _Watch, fit, memory_told, predict_logit
from training.recipe import Recipe, read_recipe
from training.run import Run, train
from training.splits import Part

PLAIN = {"title": "", "summary": "", "crop": 1, "input_size": 1, "epochs": 1, "learning_rate": 1.0, "architecture": "allnet"}
quiet = lambda line: None  # noqa: E731


def cells_of(subjects) -> Cells:
    y_true = np.array([0 if s.startswith("H") else 1 for s in subjects])
    return Cells(files=[], y_true=y_true, subjects=subjects, groups=subjects)


def test_draws_are_balanced_by_class_and_weigh_subjects_as_asked():
    cells = cells_of(np.repeat(["1", "2", "H1", "H2"], [90, 10, 30, 30]))
    for power, share in ((1.0, 0.9), (0.0, 0.5), (0.5, 0.75)):
        recipe = Recipe(**PLAIN, batch_size=500, draws_per_epoch=4000, subject_power=power)
        draws = Draws(recipe, np.arange(160, dtype="uint8"), cells, np.arange(160))
        assert len(draws) == 8
        taken = np.concatenate([draws[i][0] for i in range(8)]).astype(int)
        assert cells.y_true[taken].mean() == pytest.approx(0.5, abs=0.03)
        assert (taken < 90).sum() / (taken < 100).sum() == pytest.approx(share, abs=0.03)
        x, y = draws[0]
        assert x.dtype == np.uint8 and (y[:, 0] == cells.y_true[x.astype(int)]).all()


def test_draws_of_cells_take_each_once_and_another_order_each_epoch():
    cells = cells_of(np.repeat(["1", "H1"], [30, 10]))
    for sampling, taken in (("cells", 40), ("undersampled", 16)):  # of 20 undersampled cells, two whole batches
        recipe = Recipe(**PLAIN, batch_size=8, sampling=sampling)
        draws = Draws(recipe, np.arange(40, dtype="uint8"), cells, np.arange(40))
        epochs = []
        for draws.epoch in (0, 1):
            epochs.append([draws[i][0].tolist() for i in range(len(draws))])
            drawn = [cell for batch in epochs[-1] for cell in batch]
            assert len(drawn) == len(set(drawn)) == taken
        assert epochs[0] != epochs[1]
    assert sum(i < 30 for i in draws.rows) == sum(i >= 30 for i in draws.rows) == 10


def test_draws_depend_on_seed_epoch_and_index_alone():
    cells = cells_of(np.array(["1", "H1"] * 10))
    recipe = Recipe(**PLAIN, batch_size=4, draws_per_epoch=12)
    one, other = (Draws(recipe, np.arange(20, dtype="uint8"), cells, np.arange(6, 14)) for _ in range(2))
    one.epoch = other.epoch = 3
    in_turn = [one[i][0].tolist() for i in range(3)]
    assert [other[i][0].tolist() for i in (2, 0, 1)] == [in_turn[i] for i in (2, 0, 1)]
    assert {c for batch in in_turn for c in batch} <= set(range(6, 14))
    other.epoch = 4
    assert other[0][0].tolist() != in_turn[0]


def test_class_weight_is_hem_over_all():
    cells = cells_of(np.repeat(["1", "H1"], [30, 10]))
    recipe = Recipe(**PLAIN, batch_size=20, sampling="cells", class_weight=True)
    _, y_true, weight = Draws(recipe, np.arange(40, dtype="uint8"), cells, np.arange(40))[0]
    assert set(weight[y_true[:, 0] == 1]) == {np.float32(10 / 30)} and set(weight[y_true[:, 0] == 0]) == {1.0}


def test_rates_freeze_and_scale_layers():
    """With plain SGD a layer at a tenth of the rate moves a tenth as far, a frozen one not at all."""
    cells = np.random.default_rng(0).integers(0, 255, (8, 40, 40, 3)).astype("float32")
    y_true = np.float32([[0], [1]] * 4)

    def moved(rates) -> dict[str, float]:
        keras.utils.set_random_seed(0)
        network = find_architecture("vanilla.2x2c1d").build(input_size=40)
        recipe = Recipe(**PLAIN | {"learning_rate": 1e-3}, batch_size=8, optimizer="sgd", schedule="constant", rates=rates)
        factors = _freeze(network, recipe)
        optimizer = _optimizer(recipe, 1, factors, network, 1)
        before = {layer.name: layer.get_weights() for layer in network.layers if layer.weights}
        network.compile(optimizer, "binary_crossentropy", run_eagerly=True)
        network.train_on_batch(cells, y_true)
        return {name: np.abs(network.get_layer(name).get_weights()[0] - old[0]).max() for name, old in before.items()}

    plain = moved({})
    conv = next(name for name in plain if "conv" in name)
    scaled = moved({conv: 0, "embedding": 0.1})
    assert scaled[conv] == 0 and plain[conv] > 0
    assert scaled["embedding"] == pytest.approx(plain["embedding"] / 10, rel=0.02)
    assert scaled["logit"] == pytest.approx(plain["logit"], rel=1e-3)


def rows(folder, name):
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def final_weights(folder) -> list[np.ndarray]:
    return load_checkpoint(folder).keras_model().get_weights()


def test_killed_run_goes_on_to_the_very_same_weights(data, write_recipe_file, tmp_path, repository):
    recipe = write_recipe_file("epochs = 6")
    train(recipe, data, tmp_path / "whole", log=quiet)
    environment = os.environ | {"PYTHONPATH": str(repository)}
    command = [sys.executable, "-m", "training", str(recipe), "--data", str(data), "--out", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    history = tmp_path / "killed" / "history.csv"
    while not (history.exists() and len(history.read_text().splitlines()) >= 3):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    told = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert told["state"] == "running" and told["seconds"] > 0  # it had no time to say more
    done = subprocess.run(
        [sys.executable, "-m", "training", "killed"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "goes on after epoch" in done.stdout
    for a, b in zip(final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed"), strict=True):
        np.testing.assert_array_equal(a, b)
    whole, killed = (rows(tmp_path / name, "history.csv") for name in ("whole", "killed"))
    assert [r["epoch"] for r in killed] == [r["epoch"] for r in whole] == list("123456")
    assert [r["validation_auroc"] for r in killed] == [r["validation_auroc"] for r in whole]
    assert rows(tmp_path / "whole", "predictions.csv") == rows(tmp_path / "killed", "predictions.csv")
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["seconds"] > told["seconds"]


def test_stopped_run_says_so_keeps_its_best_and_goes_on(data, write_recipe_file, tmp_path):
    from training.run import read_state, resume

    recipe, out = write_recipe_file("epochs = 4"), tmp_path / "run"

    def stop_in_epoch_3(line):
        if "epoch 2 of 4" in line:
            (out / "stop").touch()

    with pytest.raises(Stopped, match="epoch 3; 2 epochs are complete"):
        train(recipe, data, out, log=stop_in_epoch_3)
    told = read_state(out)
    assert told["state"] == "stopped" and "epoch 3" in told["message"] and told["ended"]
    assert (out / "fold_2" / "best.npz").exists() and not (out / "card.json").exists()
    (out / "stop").unlink()
    resume(out, log=quiet)
    assert read_state(out)["state"] == "finished" and [r["epoch"] for r in rows(out, "history.csv")] == list("1234")


def test_told_to_finish_keeps_the_best_so_far_and_the_next_fold_trains_in_full(data, write_recipe_file, tmp_path):
    recipe, out = write_recipe_file("epochs = 4", "folds = 3", "test_folds = [0, 1]"), tmp_path / "run"

    def finish_after_epoch_1(line):
        if line.startswith("fold_0 epoch 1 of"):
            (out / "finish").touch()

    card = train(recipe, data, out, log=finish_after_epoch_1)
    told = {fold: [r["epoch"] for r in rows(out, "history.csv") if r["fold"] == fold] for fold in ("fold_0", "fold_1")}
    assert told == {"fold_0": ["1"], "fold_1": ["1", "2", "3", "4"]}
    assert "finished as asked, with epoch 1" in (out / "log.txt").read_text() and not (out / "finish").exists()
    assert len(card.subjects) == len({r["subject"] for r in rows(out, "predictions.csv")})  # both folds are measured


def test_where_the_last_epoch_counts_the_card_names_the_one_it_finished_with(data, write_recipe_file, tmp_path):
    recipe, out = write_recipe_file("epochs = 4", "validation = false"), tmp_path / "run"

    def finish_after_epoch_2(line):
        if "epoch 2 of" in line:
            (out / "finish").touch()

    card = train(recipe, data, out, log=finish_after_epoch_2)
    assert (card.training["epochs"], card.training["best_epoch"]) == (4, 2)


def test_progress_never_names_the_fold_before(data, write_recipe_file, tmp_path, monkeypatch):
    told, tell = [], Run.progress

    def listen(run, **values):
        tell(run, **values)
        told.append(dict(run._progress))

    monkeypatch.setattr(Run, "progress", listen)
    train(write_recipe_file("epochs = 1", "test_folds = [0, 1]", "refit = true"), data, tmp_path / "run", log=quiet)
    begun = [(values["folds_done"], values["folds_total"]) for values in told if "fold" not in values]
    assert begun == [(0, 3), (0, 3), (1, 3), (2, 3)]  # while cells are packed, and before each network


class Report:
    """What `fit` tells."""

    untouched = None

    def __init__(self):
        self.lines, self.rows = [], []

    def log(self, line):
        self.lines.append(line)

    def history(self, row):
        self.rows.append(row)

    def progress(self, **values): ...

    def subjects(self, rows): ...

    def stopping(self):
        return False

    def finishing(self):
        return False


@pytest.fixture
def ready(data, tmp_path, write_recipe_file):
    """ready("epochs = 2", ...): (network, recipe, packed cells, cells, part), as a run hands them to `fit`."""

    def make(*lines):
        recipe = read_recipe(write_recipe_file(*lines))
        cells, _ = verify_cells(index_cells(data), cache=tmp_path / "cache")
        packed = pack_cells(cells, recipe.framing, cache=tmp_path / "cache")
        fold = np.arange(len(cells)) % 4
        part = Part(
            name="fold_0",
            training=np.flatnonzero(fold > 1),
            validation=np.flatnonzero(fold == 1),
            test=np.flatnonzero(fold == 0),
        )
        keras.utils.set_random_seed(0)
        return find_architecture(recipe.architecture).build(input_size=recipe.input_size), recipe, packed, cells, part

    return make


def test_the_time_left_is_reckoned_without_the_first_step_which_compiles(monkeypatch):
    """Three epochs of four steps: the first step takes 150 s, the others 1 s."""
    clock, told = [0.0], []
    monkeypatch.setattr(time, "time", lambda: clock[0])
    report, recipe = Report(), Recipe(**(PLAIN | {"epochs": 3}), batch_size=1)
    report.progress = lambda **values: told.append((values["batch"], values["seconds_left"]))
    part = Part(name="fold_0", training=np.zeros(1), validation=np.zeros(0), test=np.zeros(0))
    cells = cells_of(np.array(["1", "H1"] * 2))
    draws = Draws(recipe, np.zeros(4), cells, np.arange(4))
    watch = _Watch(None, None, recipe, cells, part, None, report, draws)
    watch.on_epoch_begin(0)
    for batch, seconds in enumerate((150, 1, 1, 1)):
        watch.on_train_batch_begin(batch)
        clock[0] += seconds
    assert told == [(2, 10), (3, 9)]


def test_early_stopping_keeps_the_best_epoch(ready, tmp_path):
    """At a rate of nearly nothing no epoch betters the first."""
    network, recipe, packed, cells, part = ready(
        "learning_rate = 1e-12", "epochs = 9", "patience = 2", 'watch = "loss"', "ema = 0"
    )
    report = Report()
    start = network.get_layer("logit").get_weights()[0]
    fit(network, recipe, packed, cells, part, tmp_path, report)
    assert len(report.rows) < 9 and any("stopping early" in line for line in report.lines)
    np.testing.assert_allclose(network.get_layer("logit").get_weights()[0], start, atol=1e-3)


def test_probe_is_the_logistic_regression_on_the_embeddings(ready, tmp_path):
    from sklearn.linear_model import LogisticRegression

    network, recipe, packed, cells, part = ready("probe = 0.01", "epochs = 0")
    report = Report()
    features_of = keras.Model(network.inputs, network.get_layer("embedding").output)
    features = keras.ops.convert_to_numpy(features_of.predict_on_batch(packed[:].astype("float32")))
    fit(network, recipe, packed, cells, part, tmp_path, report)
    train_on, y_true = part.training, cells.y_true[part.training]
    weight = np.where(y_true == 1, 0.5 / y_true.sum(), 0.5 / (1 - y_true).sum())
    _, index, counts = np.unique(cells.subjects[train_on], return_inverse=True, return_counts=True)
    weight = weight * counts[index] ** -0.5
    weight = np.where(y_true == 1, weight / weight[y_true == 1].sum(), weight / weight[y_true == 0].sum()) / 2
    model = LogisticRegression(C=0.01, max_iter=100).fit(features[train_on], y_true, sample_weight=weight * len(train_on))
    expected = model.decision_function(features[part.test])
    found = predict_logit(network, packed, part.test, batch_size=8)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)  # kernels are rounded to float16
    assert report.rows[0]["epoch"] == 0


@pytest.mark.parametrize("lines, standardised", [([], False), ([], True), (["head_epochs = 1"], False)])
def test_a_folds_probe_knows_nothing_of_the_fold_before(lines, standardised, ready, tmp_path):
    """Features are kept from fold to fold only while they are those of the same network."""
    _, recipe, packed, cells, part = ready("probe = 0.1", "epochs = 0", *lines)
    other = Part(name="fold_1", training=part.test, validation=part.training, test=part.validation)

    def logit(part, report):
        keras.utils.set_random_seed(0)
        cell = keras.Input(packed.shape[1:], name="cell")
        x = keras.layers.Normalization(name="standardise")(cell) if standardised else keras.layers.Rescaling(1 / 255)(cell)
        x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, activation="relu")(x))
        x = keras.layers.Dense(4, name="embedding")(x)
        network = keras.Model(cell, keras.layers.Dense(1, name="logit")(x))
        fit(network, recipe, packed, cells, part, tmp_path, report)
        return predict_logit(network, packed, np.arange(len(cells)), batch_size=8)

    report = Report()
    logit(part, report)
    kept = report.untouched
    np.testing.assert_array_equal(logit(other, report), logit(other, Report()))
    assert (report.untouched is kept) == (not standardised and not lines)


def test_kinds_of_features_are_probed_apart_and_averaged(ready, tmp_path):
    from sklearn.linear_model import LogisticRegression

    _, recipe, packed, cells, part = ready("probe = 0.1", "epochs = 0", "subject_power = 1.0")
    cell = keras.Input(packed.shape[1:], name="cell")
    kinds = [keras.layers.GlobalAveragePooling2D()(cell), keras.layers.GlobalMaxPooling2D()(cell)]
    x = keras.layers.Concatenate()(kinds)
    x = keras.layers.BatchNormalization(name="embedding", center=False, scale=False)(x)
    network = keras.Model(cell, keras.layers.Dense(1, name="logit")(x))
    fit(network, recipe, packed, cells, part, tmp_path, Report())

    pixels, y_true = packed[:].astype("float64"), cells.y_true[part.training]
    weight = np.where(y_true == 1, 0.5 / y_true.sum(), 0.5 / (1 - y_true).sum()) * len(y_true)
    expected = 0
    for features in (pixels.mean((1, 2)), pixels.max((1, 2))):
        mean, variance = features[part.training].mean(0), features[part.training].var(0)
        features = (features - mean) / np.sqrt(variance + 1e-3)
        model = LogisticRegression(C=0.1).fit(features[part.training], y_true, sample_weight=weight)
        expected = expected + model.decision_function(features[part.test]) / 2
    found = predict_logit(network, packed, part.test, batch_size=8)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)  # kernels are rounded to float16


def test_shrinking_is_the_root_of_the_inverse():
    from scipy.linalg import inv, sqrtm

    from training.probe import _shrinking

    rng = np.random.default_rng(0)
    shunned, features = rng.normal(size=(4, 7)) * [[3], [1], [0.3], [0]], rng.normal(size=(5, 7))
    expected = features @ inv(sqrtm(np.eye(7) + shunned.T @ shunned))
    np.testing.assert_allclose(_shrinking(shunned)(features), expected, atol=1e-4)
    np.testing.assert_array_equal(_shrinking(0 * shunned)(features), features)


def test_a_probe_that_shuns_imaging_answers_alike_under_another_stain(ready, tmp_path):
    """ALL cells here are larger and brighter; size is what another stain leaves as it is."""
    from training.augment import StainJitter

    changed, rng = {}, np.random.default_rng(0)
    for strength in (0, 30):
        settings = ("probe = 0.1", "epochs = 0", "stain = 0.2", "gamma = 0.3", f"probe_imaging = {strength}")
        _, recipe, packed, cells, part = ready(*settings)
        size = packed.shape[1]
        from_centre = np.abs(np.arange(size) - size / 2)
        radius = size / 4 + size / 16 * (cells.y_true + rng.normal(size=len(cells)) / 2)
        on_cell = (from_centre[:, None] < radius[:, None, None]) & (from_centre < radius[:, None, None])
        bright = 120 + 40 * cells.y_true + rng.normal(size=len(cells)) * 20
        packed = (on_cell[..., None] * bright[:, None, None, None]).clip(0, 255).repeat(3, -1).astype("uint8")
        cell = keras.Input(packed.shape[1:], name="cell")
        x = [keras.layers.GlobalMaxPooling2D()(cell), keras.layers.GlobalAveragePooling2D()(cell)]
        x = keras.layers.Activation("linear")(keras.layers.Concatenate()(x))  # one kind of features
        x = keras.layers.BatchNormalization(name="embedding", center=False, scale=False)(x)
        network = keras.Model(cell, keras.layers.Dense(1, name="logit")(x))
        fit(network, recipe, packed, cells, part, tmp_path, Report())
        restained = keras.ops.convert_to_numpy(StainJitter(0.2, 0.3, seed=9)(packed, training=True))
        plain, other = (predict_logit(network, p, np.arange(len(cells)), batch_size=8) for p in (packed, restained))
        changed[strength] = np.abs(other - plain).mean() / plain.std()
    assert changed[30] < changed[0] / 2, changed


def test_a_last_batch_that_is_not_full_reads_alike(ready):
    network, _, packed, _, part = ready()
    rows = np.concatenate([part.training, part.test])
    found = {n: predict_logit(network, packed, rows, batch_size=n) for n in (1, 7, 64)}
    assert found[1].shape == rows.shape and len(predict_logit(network, packed, rows[:0], batch_size=8)) == 0
    np.testing.assert_allclose(found[7], found[1], atol=1e-4)
    np.testing.assert_allclose(found[64], found[1], atol=1e-4)


def test_a_whole_number_is_a_learning_rate():
    for schedule in ("constant", "cosine"):
        recipe = Recipe(**PLAIN | {"learning_rate": 1}, batch_size=8, schedule=schedule)
        assert float(_optimizer(recipe, 1, {}, keras.Sequential(), 1).learning_rate) == 1


def test_no_callback_makes_keras_wait_for_the_device_after_each_batch():
    """For one of these it would: a GPU then has nothing to do until the next batch was drawn."""
    for name in ("on_batch_end", "on_train_batch_end"):
        assert getattr(_Watch, name) is getattr(keras.callbacks.Callback, name)


def test_what_predicts_the_teacher_goes_on_from_its_own_weights_not_their_average(
    ready, tmp_path, start, small_teacher, monkeypatch
):
    network, recipe, packed, cells, part = ready(f'teacher = "{start}"', "epochs = 1", "ema = 0.9")
    pairs = []

    def look(self):
        of = zip(self.model.trainable_variables, self.model.optimizer._model_variables_moving_average, strict=True)
        pairs.extend((v.path, *map(keras.ops.convert_to_numpy, (v, average))) for v, average in of if len(v.shape) > 1)

    monkeypatch.setattr(_Watch, "_save", look)
    fit(network, recipe, packed, cells, part, tmp_path, Report())
    taught = len(pairs) - len([w for w in network.trainable_variables if len(w.shape) > 1])
    assert taught == 1 and all(np.any(value != average) for _, value, average in pairs)


def test_short_memory_is_told_apart_from_other_errors(ready, tmp_path, monkeypatch):
    network, recipe, packed, cells, part = ready()
    given = Draws.__getitem__

    def greedy(self, index):
        if self.batch_size > 4:
            raise MemoryError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 8 cells")
        return given(self, index)

    monkeypatch.setattr(Draws, "__getitem__", greedy)
    with pytest.raises(OutOfMemory, match="batches of 8 cells"):
        fit(network, recipe, packed, cells, part, tmp_path, Report())
    report = Report()
    fit(network, recipe, packed, cells, part, tmp_path, report, split_batch=2)
    assert len(report.rows) == recipe.epochs


def test_short_memory_of_the_machine_is_no_matter_of_batches():
    """Or what was trained would be thrown away, and begun anew with smaller ones."""
    with pytest.raises(MemoryError), memory_told(8):
        np.empty((1 << 20, 1 << 30))


def test_split_batches_sum_to_the_whole_ones_step():
    """Two halves with summed gradients move the weights as the whole batch does."""
    cells = np.random.default_rng(0).integers(0, 255, (8, 40, 40, 3)).astype("float32")
    y_true = np.float32([[0], [1]] * 4)

    def after(split_batch):
        keras.utils.set_random_seed(0)
        network = find_architecture("vanilla.2x2c1d").build(input_size=40)
        recipe = Recipe(**PLAIN | {"learning_rate": 1e-3}, batch_size=8, optimizer="sgd", schedule="constant")
        network.compile(_optimizer(recipe, 1, {}, network, split_batch), "binary_crossentropy", run_eagerly=True)
        for part in np.split(np.arange(8), split_batch):
            network.train_on_batch(cells[part], y_true[part])
        return network.get_layer("logit").get_weights()[0]

    np.testing.assert_allclose(after(2), after(1), atol=1e-6)


def test_a_training_step_reaches_every_branch_of_allnet(draw_cell):
    network = find_architecture("allnet").build(input_size=96)
    cells = np.stack([draw_cell(i, canvas=(96, 96), axes=(60, 50)) for i in range(4)])
    _standardise(network, cells, np.arange(4))
    first_of = {"vgg": "block1_conv1", "resnet": "conv1_conv", "inception": "inception_conv2d_1", "head": "head_conv"}
    before = {branch: network.get_layer(layer).get_weights()[0] for branch, layer in first_of.items()}
    network.compile("adam", "binary_crossentropy", run_eagerly=True)  # tracing the graph takes longer than a step
    loss = network.train_on_batch(cells[:2].astype("float32"), np.float32([[0], [1]]))
    assert np.isfinite(loss)
    for branch, layer in first_of.items():
        assert (network.get_layer(layer).get_weights()[0] != before[branch]).any(), branch
    mean = keras.ops.convert_to_numpy(network.get_layer("standardise").mean).ravel()
    np.testing.assert_allclose(mean, cells.mean((0, 1, 2)), rtol=1e-5)
