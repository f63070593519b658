"""What is promised of every bundled checkpoint, on real cells."""

import csv
import functools

import numpy as np
import pytest

from inference.cells import score_file
from inference.engine import Engine
from inference.gate import MEASURES, inspect_cell
from inference.images import decode_image, frame_cell
from inference.sources import Source
from model_zoo import Card, default_checkpoint, find_checkpoint, list_checkpoints
from model_zoo._checkpoint import BUNDLED, weights_files
from training.compare import read_predictions
from training.data import index_cells
from training.metrics import bootstrap_metrics, roc_points
from training.recipe import read_recipe
from training.splits import divide

CARDS = sorted(list_checkpoints(), key=lambda card: card.name)
every = pytest.mark.parametrize("name", [card.name for card in CARDS])
with_weights = pytest.mark.parametrize("name", [card.name for card in CARDS if not card.members])


@functools.cache
def loaded(name):
    return Engine(find_checkpoint(name))


def predictions(name):
    return read_predictions(find_checkpoint(name).path)


def framed(files, spec):
    return np.stack([frame_cell(decode_image(file.read_bytes(), name=file.name)[0], spec) for file in files])


def test_the_promised_networks_are_bundled_and_the_surest_opens_first():
    cards = list_checkpoints()
    promised = {"allnet_pooled", "efficientnet_b3_pooled", "mobilenet_v2", "mobilenet_v2_pyramid", "ensemble"}
    assert promised <= {card.name for card in cards}
    strict = [card for card in cards if not card.members and not card.split.get("seen_unlabelled")]
    assert default_checkpoint() == max(strict, key=lambda card: card.metrics["auroc"][1]).name


def test_every_card_says_what_cells_its_network_knows(real_cells):
    measures = np.array([inspect_cell(decode_image(f.read_bytes(), name=f.name)[0]).measures for f in real_cells(300)])
    for card in map(Card.read, BUNDLED.glob("*/card.json")):  # also those without weights
        for name, column in zip(MEASURES, measures.T, strict=True):
            (low, high), (lowest, highest) = card.data["usual"][name]["cell"], card.data["usual"][name]["person"]
            assert np.mean((column < low) | (column > high)) < 0.01, (card.name, name)
            assert low < lowest < np.median(column) < highest < high
            assert high - low < 2 * np.ptp(column)  # not so wide that nothing lies outside


@with_weights
def test_folder_is_whole_and_under_its_name(name):
    checkpoint = find_checkpoint(name)
    assert checkpoint.path.name == name == checkpoint.card.name
    weights = {file.name for file in weights_files(checkpoint.weights)}
    beside = {"card.json", "recipe.toml", "history.csv", "predictions.csv", "trained_on.txt"}
    assert {f.name for f in checkpoint.path.iterdir()} == beside | weights
    assert all(file.stat().st_size < 95e6 for file in checkpoint.path.iterdir())  # what a Git host takes
    recipe = read_recipe(checkpoint.path / "recipe.toml")
    assert (recipe.architecture, recipe.framing) == (checkpoint.card.architecture, checkpoint.card.framing)
    assert checkpoint.card.summary and checkpoint.card.limits and checkpoint.card.licence
    assert 0 < checkpoint.card.threshold < 1 and checkpoint.card.temperature > 0


@with_weights
def test_runtime_and_keras_give_one_probability(name, real_cells):
    import keras

    engine, checkpoint = loaded(name), find_checkpoint(name)
    cells = framed(real_cells(6), engine.card.framing)
    model = checkpoint.keras_model()
    logit_of = keras.Model(model.inputs[0], model.get_layer("logit").output)
    logit = keras.ops.convert_to_numpy(logit_of(cells.astype("float32"), training=False))[:, 0]
    np.testing.assert_allclose(engine.predict(cells)[0], 1 / (1 + np.exp(-logit / engine.card.temperature)), atol=1e-3)


@every
def test_real_cells_are_known_to_have_trained_it_and_drawn_ones_are_not(name, real_cells, draw_cell, encode):
    def row(file, data):
        return score_file(Source(name=file, read=lambda: data), loaded(name))

    held_out = dict(zip(predictions(name)["file"], predictions(name)["p_all"], strict=True))
    for file in real_cells(5):
        found = row("renamed.webp", file.read_bytes())
        assert found.trained and found.held_out == (held_out[file.name], held_out[file.name] >= 0.5)
    assert not row("UID_11_1_1_all.png", encode(draw_cell(), "PNG")).trained
    assert len(loaded(name).trained_on) == 5980  # of 5,981 cells two are one picture


@every
def test_predictions_are_the_temperature_scaled_logits(name):
    """Each fold has a temperature of its own; the only fold of a network has the card's."""
    with (find_checkpoint(name).path / "predictions.csv").open(newline="") as file:
        rounded = [float(row["p_all"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(predictions(name)["p_all"], rounded, atol=1e-6)


@pytest.mark.parametrize("folder", sorted(f.parent for f in BUNDLED.glob("*/predictions.csv")), ids=lambda f: f.name)
def test_the_area_under_the_drawn_roc_is_the_cards(folder):
    """Also of a saturated network, whose P(ALL) a few digits do not tell apart."""
    table = read_predictions(folder)
    area = np.trapezoid(*roc_points(table["y_true"], table["p_all"])[::-1])
    assert area == pytest.approx(Card.read(folder / "card.json").metrics["auroc"][0], abs=2e-3)


@every
def test_predictions_give_the_cards_figures(name):
    card, table = loaded(name).card, predictions(name)
    y_true, p_all, subjects = table["y_true"], table["p_all"], table["subject"]
    one_cell = 1.5 / min((y_true == 1).sum(), (y_true == 0).sum())  # at a threshold rounded to 4 digits, one may change sides
    found = bootstrap_metrics(y_true, p_all, subjects, table["group"], table["threshold"])
    assert found.keys() == card.metrics.keys()
    for figure, values in card.metrics.items():
        np.testing.assert_allclose(found[figure], values, atol=max(one_cell, 2e-3), err_msg=figure)
        if figure != "ece":  # resampling adds to it: a well calibrated network's may lie below its interval
            assert values[1] <= values[0] <= values[2], figure
    assert {s: n for s, _, n, _ in card.subjects} == dict(zip(*np.unique(subjects, return_counts=True), strict=True))
    assert sum(called for *_, called in card.subjects) == pytest.approx((p_all >= table["threshold"]).sum(), abs=1)
    test = card.data["test"]
    assert (test["all_cells"], test["hem_cells"]) == ((y_true == 1).sum(), (y_true == 0).sum())
    point = card.operating_points["default"]
    assert (point["sensitivity"], point["specificity"]) == (card.metrics["sensitivity"], card.metrics["specificity"])
    assert card.metrics["auroc"][1] > 0.5  # it learnt something that holds for unseen subjects


@every
def test_what_is_served_reads_as_what_was_measured(name, data_root):
    """The only network of a run reads the same; one that then learnt from all subjects reads alike, not the same.

    One that is fed otherwise than its folds were (unstandardised, say) looks whole and reads every cell as .65.
    """
    engine, table = loaded(name), predictions(name)
    where = {file.name: file for file in (data_root / "cnmc").rglob("UID_*")}
    chosen = np.linspace(0, len(table["file"]) - 1, 40).astype(int)
    p_all, _ = engine.predict(framed([where[table["file"][i]] for i in chosen], engine.card.framing))
    held_out = table["p_all"][chosen]
    if engine.card.training["networks"] == 1:
        np.testing.assert_allclose(p_all, held_out, atol=2e-3)
    assert np.corrcoef(p_all, held_out)[0, 1] > 0.75
    assert np.abs(p_all - held_out).mean() < 0.2


@every
def test_held_out_cells_are_those_of_the_recipes_split(name, data_root):
    card, table = loaded(name).card, predictions(name)
    recipe = read_recipe(find_checkpoint(name).networks[0].path / "recipe.toml")  # an ensemble's members are divided alike
    cells = index_cells(data_root)
    held_of = {part.name: {cells.files[row].name for row in part.test} for part in divide(cells, recipe)}
    assert {fold: set(table["file"][table["fold"] == fold]) for fold in set(table["fold"])} == held_of
    assert card.data["fingerprint"] == cells.fingerprint
    if card.training["networks"] == 1:
        assert not set(card.data["training_subjects"]) & set(table["subject"])
    else:
        assert "then trained on all of them" in card.split["sentence"]
