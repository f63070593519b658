"""What is promised of every bundled checkpoint, on real cells."""

import csv
import functools

import numpy as np
import pytest

from inference.engine import Engine
from inference.images import decode_image, frame_cell
from model_zoo import find_checkpoint, list_checkpoints
from training.data import index_cells, split_by_subject
from training.metrics import bootstrap_metrics, cell_metrics
from training.recipe import read_recipe

every = pytest.mark.parametrize("name", sorted(card.name for card in list_checkpoints()))


@functools.cache
def loaded(name):
    return Engine(find_checkpoint(name))


def predictions(name):
    with (find_checkpoint(name).path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {"y_true": int, "logit": float, "p_all": float}
    return {key: np.array([columns.get(key, str)(row[key]) for row in rows]) for key in rows[0]}


def framed(files, spec):
    return np.stack([frame_cell(decode_image(file.read_bytes(), name=file.name)[0], spec) for file in files])


def test_the_two_networks_of_the_first_screen_are_bundled():
    assert {"efficientnet_b3", "mobilenet_v2"} <= {card.name for card in list_checkpoints()}


@every
def test_folder_is_whole_and_under_its_name(name):
    checkpoint = find_checkpoint(name)
    assert checkpoint.path.name == name == checkpoint.card.name
    assert {f.name for f in checkpoint.path.iterdir()} == {
        "model.onnx",
        "card.json",
        "recipe.toml",
        "history.csv",
        "predictions.csv",
    }
    recipe = read_recipe(checkpoint.path / "recipe.toml")
    assert (recipe.architecture, recipe.framing) == (checkpoint.card.architecture, checkpoint.card.framing)
    assert checkpoint.card.summary and checkpoint.card.limits and checkpoint.card.licence
    assert 0 < checkpoint.card.threshold < 1 and checkpoint.card.temperature > 0


@every
def test_runtime_and_keras_give_one_probability(name, real_cells):
    import keras

    engine, checkpoint = loaded(name), find_checkpoint(name)
    cells = framed(real_cells(6), engine.card.framing)
    model = checkpoint.keras_model()
    logit_of = keras.Model(model.inputs[0], model.get_layer("logit").output)
    logit = keras.ops.convert_to_numpy(logit_of(cells.astype("float32"), training=False))[:, 0]
    np.testing.assert_allclose(engine.predict(cells)[0], 1 / (1 + np.exp(-logit / engine.card.temperature)), atol=1e-3)


@every
def test_predictions_are_the_temperature_scaled_logits(name):
    table = predictions(name)
    expected = 1 / (1 + np.exp(-table["logit"] / loaded(name).card.temperature))
    np.testing.assert_allclose(table["p_all"], expected, atol=1e-4)


@every
def test_predictions_give_the_cards_figures(name):
    card, table = loaded(name).card, predictions(name)
    y_true, p_all, subjects = table["y_true"], table["p_all"], table["subject"]
    one_cell = 1.5 / min((y_true == 1).sum(), (y_true == 0).sum())  # at a threshold rounded to 4 digits, one may change sides
    found = bootstrap_metrics(y_true, p_all, subjects, card.threshold)
    assert found.keys() == card.metrics.keys()
    for figure, values in card.metrics.items():
        np.testing.assert_allclose(found[figure], values, atol=max(one_cell, 2e-3), err_msg=figure)
        assert values[1] <= values[0] <= values[2], figure
    assert {s: n for s, _, n, _ in card.subjects} == dict(zip(*np.unique(subjects, return_counts=True), strict=True))
    assert sum(called for *_, called in card.subjects) == pytest.approx((p_all >= card.threshold).sum(), abs=1)
    test = card.data["test"]
    assert (test["all_cells"], test["hem_cells"]) == ((y_true == 1).sum(), (y_true == 0).sum())
    point = card.operating_points["default"]
    assert (point["sensitivity"], point["specificity"]) == (card.metrics["sensitivity"], card.metrics["specificity"])
    assert cell_metrics(y_true, p_all, card.threshold)["auroc"] > 0.6  # it learnt something that holds for unseen subjects


@every
def test_engine_reproduces_the_held_out_predictions(name, data_root):
    engine, table = loaded(name), predictions(name)
    where = {file.name: file for file in (data_root / "cnmc").rglob("UID_*")}
    chosen = np.linspace(0, len(table["file"]) - 1, 20).astype(int)
    p_all, _ = engine.predict(framed([where[table["file"][i]] for i in chosen], engine.card.framing))
    np.testing.assert_allclose(p_all, table["p_all"][chosen], atol=2e-3)


@every
def test_held_out_cells_are_those_of_the_recipes_split(name, data_root):
    card, table = loaded(name).card, predictions(name)
    recipe, cells = read_recipe(find_checkpoint(name).path / "recipe.toml"), index_cells(data_root)
    fold_of = split_by_subject(cells, folds=recipe.folds, seed=recipe.seed)
    held = fold_of == recipe.test_fold
    assert set(table["file"]) == {file.name for file, taken in zip(cells.files, held, strict=True) if taken}
    assert not set(cells.groups[held]) & set(cells.groups[~held])
    assert card.data["fingerprint"] == cells.fingerprint
