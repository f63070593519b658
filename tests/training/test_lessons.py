"""Lessons without labels: a network learns the maps of an ImageNet MobileNetV2, then comes the regression."""

import csv
import sys

import keras
import numpy as np
import pytest

import model_zoo
from model_zoo import load_checkpoint
from training.__main__ import main
from training.data import index_cells
from training.errors import RecipeError
from training.lessons import lesson_gap
from training.recipe import make_recipe, read_recipe, write_recipe
from training.results import RECIPES
from training.run import lessons_of
from training.splits import divide, shown_unlabelled, split_by_subject

# A network with one lesson at stride 8 and one, by unpadded convolutions, that loses its rim.
STUDENT = """
import keras
from keras import layers

from model_zoo._architecture import Architecture
from model_zoo._pooling import CellMask, MaskedMoments, cell_shares, read_pooled


def build(*, input_size, weights=None):
    cell = keras.Input((input_size, input_size, 3), name="cell")
    x = layers.Normalization(name="standardise")(cell)
    x = layers.Conv2D(16, 5, strides=4, padding="same", activation="relu", name="conv1")(x)
    x = layers.Conv2D(24, 3, strides=2, padding="same", activation="relu", name="conv2")(x)
    padded = layers.Conv2D(192, 1, name="padded")(x)
    bare = layers.Conv2D(192, 3, name="bare")(x)
    inside, moments = CellMask(name="inside")(cell), []
    for maps, name in ((padded, "padded"), (bare, "bare")):
        shares = cell_shares(inside, maps, 8, name)
        on_cell = layers.Multiply(name=f"{name}_on_cell")([maps, shares])
        moments.append(MaskedMoments(name=f"{name}_moments")([on_cell, shares]))
    return read_pooled(cell, ("moments", moments), name="taught_student")


MAPS = ("fine_raw_block_6_expand_relu",)
ARCHITECTURE = Architecture(
    name="taught_student", title="Student", build=build, input_size=64, cam_layers=("padded_on_cell",), source="a test",
    lessons={"padded": (8, MAPS), "bare": (8, MAPS)},
)
"""
LESSONS = {"architecture": "taught_student", "title": "Student", "summary": "For tests.", "crop": 200, "input_size": 64}
LESSONS |= {"epochs": 0, "probe": 1e-3, "teach_epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "folds": 3, "seed": 1}
LESSONS |= {"stain": 0.1, "probe_persons": 1.0, "probe_imaging": 0.1}


@pytest.fixture(autouse=True)
def student(tmp_path_factory, monkeypatch):
    """One more file in model_zoo/ is one more architecture."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "taught_student.py").write_text(STUDENT)
    monkeypatch.setattr(model_zoo, "__path__", [*model_zoo.__path__, str(folder)])
    yield
    sys.modules.pop("model_zoo.taught_student", None)


@pytest.fixture(scope="module")
def packed(draw_cell):
    from inference.images import frame_cell

    spec = model_zoo.FrameSpec(crop=200, size=64)
    return np.stack([frame_cell(draw_cell(i, canvas=(250, 250), axes=(110 + i, 130)), spec) for i in range(24)])


def gap_of(network, start, packed):
    recipe, cells = make_recipe(LESSONS | {"teacher": str(start)}), keras.Input((64, 64, 3))
    gap = keras.Model(cells, lesson_gap(network, recipe, cells, packed, np.arange(len(packed))))
    return keras.ops.convert_to_numpy(gap(packed.astype("float32")))


def test_the_gap_is_the_mean_square_over_the_cells_places(start, small_teacher, packed):
    """Against plain NumPy: a network whose maps are 0 is as far away as its teacher's standardised maps are large."""
    network = model_zoo.find_architecture("taught_student").build(input_size=64)
    for name in ("padded", "bare"):
        layer = network.get_layer(name)
        layer.set_weights([np.zeros_like(w) for w in layer.get_weights()])
    gap = gap_of(network, start, packed)
    teacher = model_zoo.find_architecture("mobilenet_v2_pyramid").build(input_size=64, weights=str(start))
    maps = keras.Model(teacher.inputs[0], teacher.get_layer("fine_raw_block_6_expand_relu").output)(packed.astype("float32"))
    maps = keras.ops.convert_to_numpy(maps).astype("float64")
    shares = (packed.max(-1) >= 1).reshape(24, 8, 8, 8, 8).mean((2, 4))
    weight = shares / shares.sum()
    mean = (maps * weight[..., None]).sum((0, 1, 2))
    variance = ((maps - mean) ** 2 * weight[..., None]).sum((0, 1, 2))
    squares = ((maps - mean) ** 2 / (np.sqrt(variance + 0.05 * variance.mean())) ** 2).mean(-1)
    whole = (squares * shares).sum((1, 2)) / shares.sum((1, 2))
    inner = (squares * shares)[:, 1:-1, 1:-1].sum((1, 2)) / shares[:, 1:-1, 1:-1].sum((1, 2))  # without the rim
    np.testing.assert_allclose(gap[:, 0], (whole + inner) / 2, rtol=1e-3)


@pytest.mark.parametrize("size", [64, 90])  # 90: maps that have more places than its sixteenth
def test_the_teachers_maps_are_standardised_over_the_cells_places(start, small_teacher, packed, size):
    from inference.images import resize_cells
    from training.lessons import _statistics, _teacher

    cells, name = resize_cells(packed, size), "fine_raw_block_6_expand_relu"
    teacher = _teacher(make_recipe(LESSONS | {"input_size": size, "teacher": str(start)}), [name])
    mean, _ = _statistics(teacher, cells, np.arange(len(cells)), [name])[name]
    maps, inside = (keras.ops.convert_to_numpy(x).astype("float64") for x in teacher(cells.astype("float32")))
    places = maps.shape[1]
    assert (places - 1) * 8 < size <= places * 8  # each is 8 pixels
    low = (8 * places - size) // 2  # as "same" padding lays them
    padded = np.pad(inside[..., 0], ((0, 0), *[(low, 8 * places - size - low)] * 2), constant_values=np.nan)
    weight = np.nanmean(padded.reshape(len(cells), places, 8, places, 8), axis=(2, 4))[..., None]
    np.testing.assert_allclose(mean, (maps * weight).sum((0, 1, 2)) / weight.sum(), rtol=1e-3, atol=1e-5)


def test_lessons_then_a_regression(start, small_teacher, data, tmp_path):
    recipe = tmp_path / "lessons.toml"
    write_recipe(make_recipe(LESSONS | MORE | {"teacher": str(start)}), recipe)
    assert main([str(recipe), "--data", str(data)]) == 0
    folder = tmp_path / "runs" / "lessons"
    card = load_checkpoint(folder).card
    assert "without labels" in card.training["teacher"] and "start.weights.h5" in card.training["teacher"]
    assert card.training["cells_drawn"] == 2 * 16 and card.training["validation_auroc"] is None
    assert card.split["seen_unlabelled"] == ["fold_0", "fold_2"]
    assert card.split["sentence"].startswith("Measured on subjects whose labels the network never saw;")
    assert "had been shown pictures of these subjects, those of fold_1 excepted" in card.split["sentence"]
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows if row["fold"] == "taught"]
    assert len(losses) == 2 and losses[1] < losses[0]
    taught = np.load(folder / "taught" / "weights.npz")
    served = load_checkpoint(folder).keras_model()
    for i, (mine, layer) in enumerate(zip(served.get_weights(), served.weights, strict=True)):
        if "conv" in layer.path or "padded" in layer.path:  # no fold and no refit moved what was learnt
            np.testing.assert_allclose(mine, taught[f"w{i}"], atol=2e-3)
    assert "lessons without labels on" in (folder / "log.txt").read_text()


MORE = {"draws_per_epoch": 16, "teach_without": [1], "validation": False, "refit": True, "sampling": "cells"}


def test_killed_lessons_go_on_exactly(start, small_teacher, data, tmp_path, runs, monkeypatch):
    import training.fit
    from training import jobs
    from ui.train import _progress

    recipe = tmp_path / "lessons.toml"
    write_recipe(make_recipe(LESSONS | MORE | {"teacher": str(start)}), recipe)
    assert main([str(recipe), "--data", str(data), "--out", "runs/whole"]) == 0
    save = training.fit._Watch._save

    def killed(self):
        save(self)
        raise KeyboardInterrupt  # after the first epoch was kept

    with monkeypatch.context() as patch:
        patch.setattr(training.fit._Watch, "_save", killed)
        assert main([str(recipe), "--data", str(data), "--out", "runs/killed"]) == 2
    part, text = _progress(jobs.read_run("killed"))  # what the Train page said then
    assert part == 0.5 and text.startswith("Epoch 1 of 2")
    assert main(["runs/killed"]) == 0
    whole, resumed = (np.load(tmp_path / "runs" / name / "taught" / "weights.npz") for name in ("whole", "killed"))
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole.files)


def test_pictures_of_the_left_out_folds_are_not_shown(data):
    cells, recipe = index_cells(data), make_recipe(LESSONS | MORE | {"teacher": "x"})
    shown = shown_unlabelled(cells, divide(cells, recipe), recipe)
    fold_of = split_by_subject(cells, folds=3, seed=1)
    assert set(fold_of[shown]) == {0, 2} and len(shown) == (fold_of != 1).sum()
    one = make_recipe(LESSONS | MORE | {"teacher": "x", "teach_without": [], "test_folds": [2]})
    assert set(fold_of[shown_unlabelled(cells, divide(cells, one), one)]) == {0, 1}  # a fold that nothing trains on


SHIPPED = [file for file in sorted(RECIPES.glob("*.toml")) if "teach_epochs" in file.read_text()]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_lessons_of_a_shipped_recipe_can_be_taught_alone(file):
    recipe = read_recipe(file)
    taught = lessons_of(recipe)
    assert taught.epochs == recipe.teach_epochs and not taught.probe


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher": ""}, "needs a teacher"),
        ({"teach_without": [3]}, "teach_without must lie in 0..2"),
        ({"teach_without": [1], "protocol": "image_level"}, "teach_without names folds"),
        ({"grow_from": "x"}, "grow_from sets all weights"),
    ],
)
def test_lessons_that_cannot_be_are_refused(changes, named):
    with pytest.raises(RecipeError, match=named):
        make_recipe(LESSONS | {"teacher": "x"} | changes)


def test_an_architecture_without_lessons_says_so(start, packed):
    recipe = make_recipe(LESSONS | {"teacher": str(start), "architecture": "vanilla.1c1d"})
    network = model_zoo.find_architecture("vanilla.1c1d").build(input_size=64)
    with pytest.raises(RecipeError, match="no lessons"):
        lesson_gap(network, recipe, keras.Input((64, 64, 3)), packed, np.arange(4))
