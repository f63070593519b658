"""Whole runs of `python -m training` on a few drawn cells: a checkpoint folder comes out, or nothing."""

import contextlib
import csv
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

from inference.cells import score_files
from inference.engine import Engine
from inference.sources import open_paths
from model_zoo import find_architecture, find_checkpoint, load_checkpoint
from training.__main__ import main
from training.data import Cells, index_cells, split_by_subject
from training.errors import DataError
from training.fit import Draws, _standardise, train
from training.metrics import bootstrap_metrics
from training.recipe import Recipe, read_recipe

RECIPE = """
architecture = "mobilenet_v2"
title = "Tiny"
summary = "A run for tests."
crop = 200
input_size = 96
epochs = 1
draws_per_epoch = 16
batch_size = 8
learning_rate = 1e-3
ema = 0.9
shift = 0.05
stain = 0.2
gamma = 0.3
seed = 1
"""
PLAIN = {"title": "", "summary": "", "crop": 1, "input_size": 1, "epochs": 1, "learning_rate": 1.0, "architecture": "allnet"}


@pytest.fixture(scope="module")
def data(tmp_path_factory, draw_cell, encode):
    """Ten ALL subjects with large cells, ten HEM subjects with small ones, two cells each, and one damaged file."""
    root = tmp_path_factory.mktemp("cells")
    for label in ("all", "hem"):
        (root / label).mkdir()
        for subject in range(20, 30):
            for cell in (1, 2):
                side = (150 if label == "all" else 100) + subject + cell
                name = f"UID_{'H' if label == 'hem' else ''}{subject}_1_{cell}_{label}.png"
                image = draw_cell(subject * cell, canvas=(250, 250), axes=(side, side))
                (root / label / name).write_bytes(encode(image, "PNG", compress_level=1))
    (root / "all" / "UID_99_1_1_all.png").write_bytes(b"damaged")
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory, repository):
    """(folder of the run, lines it printed): `python -m training`, in its own process as a user starts it."""
    here = tmp_path_factory.mktemp("run")
    (here / "tiny.toml").write_text(RECIPE)
    (here / "shelf" / "tiny").mkdir(parents=True)
    (here / "shelf" / "tiny" / "old.txt").write_text("of an earlier run")
    command = [sys.executable, "-m", "training", "tiny.toml", "--data", str(data), "--out", "shelf/tiny"]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return here, done.stdout


def table(folder, name):
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_run_leaves_one_whole_folder(run):
    here, printed = run
    folder = here / "shelf" / "tiny"
    assert [f.name for f in (here / "shelf").iterdir()] == ["tiny"]
    assert {f.name for f in folder.iterdir()} == {"model.onnx", "card.json", "recipe.toml", "history.csv", "predictions.csv"}
    assert read_recipe(folder / "recipe.toml") == read_recipe(here / "tiny.toml")
    assert [set(row) for row in table(folder, "history.csv")] == [{"epoch", "loss", "validation_auroc", "seconds"}]
    assert "skipped: all/UID_99_1_1_all.png" in printed and "epoch 1 of 1" in printed and "wrote shelf/tiny" in printed
    assert find_checkpoint("tiny", here / "shelf").card.title == "Tiny"


def test_card_tells_the_split_and_what_was_measured(run, data):
    folder = run[0] / "shelf" / "tiny"
    card, predictions = load_checkpoint(folder).card, table(folder, "predictions.csv")
    cells = index_cells(data)
    fold_of = split_by_subject(cells, folds=5, seed=1)
    held = {f.name for f, fold in zip(cells.files, fold_of, strict=True) if fold == 2} - {"UID_99_1_1_all.png"}
    assert {row["file"] for row in predictions} == held and len(held) == len(predictions)
    parts = [card.data[part] for part in ("training", "validation", "test")]
    assert sum(part["all_cells"] for part in parts) == 20 and sum(part["hem_subjects"] for part in parts) == 10  # damaged: out
    y_true, logit, rounded = (np.array([float(row[c]) for row in predictions]) for c in ("y_true", "logit", "p_all"))
    p_all = 1 / (1 + np.exp(-logit / card.temperature))
    np.testing.assert_allclose(rounded, p_all, atol=1e-6)
    subjects = np.array([row["subject"] for row in predictions])
    found = bootstrap_metrics(y_true.astype(int), p_all, subjects, card.threshold)
    for figure, values in card.metrics.items():
        np.testing.assert_allclose(found[figure], values, atol=2e-4, err_msg=figure)
    assert [s for s, *_ in card.subjects] == sorted(set(subjects))
    for subject, y, n, called in card.subjects:
        mine = subjects == subject
        assert (y, n, called) == (y_true[mine][0], mine.sum(), (p_all[mine] >= card.threshold).sum())
    assert card.training["start"] == "random weights" and card.weights_sha256


def test_the_engine_serves_what_was_measured(run, data):
    folder = run[0] / "shelf" / "tiny"
    expected = {row["file"]: float(row["p_all"]) for row in table(folder, "predictions.csv")}
    rows = {r.file.rpartition("/")[2]: r.p_all for r in score_files(open_paths([data]), Engine(load_checkpoint(folder)))}
    for file, p_all in expected.items():
        assert rows[file] == pytest.approx(p_all, abs=1e-3)
    assert rows["UID_99_1_1_all.png"] is None


@pytest.mark.parametrize(
    "recipe, told",
    [
        (RECIPE + 'weights = "nowhere.weights.h5"', "nowhere.weights.h5"),
        (RECIPE + "folds = 11", "11 folds need"),
        (RECIPE.replace("epochs", "epoch"), "Did you mean 'epochs'"),
        (RECIPE.replace("1e-3", "1e30").replace("ema = 0.9", "ema = 0"), "diverged"),
    ],
)
def test_failing_run_tells_why_and_leaves_nothing(recipe, told, run, data, tmp_path, capsys):
    shutil.copytree(run[0] / "runs", tmp_path / "runs")
    (tmp_path / "r.toml").write_text(recipe)
    with contextlib.chdir(tmp_path):
        assert main(["r.toml", "--data", str(data), "--out", "shelf/tiny"]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "shelf").exists() or list((tmp_path / "shelf").iterdir()) == []


def test_no_data_folder_is_told(tmp_path, capsys):
    (tmp_path / "r.toml").write_text(RECIPE)
    assert main([str(tmp_path / "r.toml"), "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_draws_are_balanced_by_class_and_weigh_subjects_as_asked():
    subjects = np.repeat(["1", "2", "H1", "H2"], [90, 10, 30, 30])
    y_true = np.array([0 if s.startswith("H") else 1 for s in subjects])
    cells = Cells(files=[], y_true=y_true, subjects=subjects, groups=subjects)
    for power, share in ((1.0, 0.9), (0.0, 0.5), (0.5, 0.75)):
        recipe = Recipe(**PLAIN, batch_size=500, draws_per_epoch=4000, subject_power=power)
        draws = Draws(recipe, np.arange(160, dtype="uint8"), cells, np.arange(160))
        assert len(draws) == 8
        taken = np.concatenate([draws[i][0] for i in range(8)]).astype(int)
        assert y_true[taken].mean() == pytest.approx(0.5, abs=0.03)
        assert (taken < 90).sum() / (taken < 100).sum() == pytest.approx(share, abs=0.03)
        x, y = draws[0]
        assert x.dtype == y.dtype == np.float32 and (y[:, 0] == y_true[x.astype(int)]).all()


def test_draws_stay_within_their_rows():
    subjects = np.array(["1", "H1"] * 10)
    cells = Cells(files=[], y_true=np.array([1, 0] * 10), subjects=subjects, groups=subjects)
    recipe = Recipe(**PLAIN, batch_size=200, draws_per_epoch=200)
    rows = np.arange(6, 14)
    assert set(Draws(recipe, np.arange(20, dtype="uint8"), cells, rows)[0][0].astype(int)) == set(rows.tolist())


def test_a_training_step_reaches_every_branch_of_allnet(draw_cell):
    network = find_architecture("allnet").build(input_size=96)
    cells = np.stack([draw_cell(i, canvas=(96, 96), axes=(60, 50)) for i in range(4)])
    _standardise(network.get_layer("standardise"), cells, np.arange(4))
    first_of = {"vgg": "block1_conv1", "resnet": "conv1_conv", "inception": "inception_conv2d_1", "head": "head_conv"}
    before = {branch: network.get_layer(layer).get_weights()[0] for branch, layer in first_of.items()}
    network.compile("adam", "binary_crossentropy", run_eagerly=True)  # tracing the graph takes longer than a step
    loss = network.train_on_batch(cells[:2].astype("float32"), np.float32([[0], [1]]))
    assert np.isfinite(loss)
    for branch, layer in first_of.items():
        assert (network.get_layer(layer).get_weights()[0] != before[branch]).any(), branch
    mean = keras.ops.convert_to_numpy(network.get_layer("standardise").mean).ravel()
    np.testing.assert_allclose(mean, cells.mean((0, 1, 2)), rtol=1e-5)


def test_a_pretrained_start_a_head_phase_and_a_teacher(data, tmp_path):
    """All three together: the head trains first, the backbone then, and the teacher stays as it was."""
    start = tmp_path / "start.weights.h5"
    keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(224, 224, 3)).save_weights(start)
    shutil.copytree(data, tmp_path / "data")
    shutil.copy(start, tmp_path / "data" / "start.weights.h5")
    recipe = tmp_path / "taught.toml"
    recipe.write_text(f'{RECIPE}\nweights = "start.weights.h5"\nteacher = "start.weights.h5"\nhead_epochs = 1\n')
    lines = []
    card = train(recipe, tmp_path / "data", tmp_path / "taught", log=lines.append)
    assert "head trained for 1 epochs" in lines
    assert "start.weights.h5" in card.training["start"] and "start.weights.h5" in card.training["teacher"]
    trained = load_checkpoint(tmp_path / "taught").keras_model()
    fresh = find_architecture("mobilenet_v2").build(input_size=96, weights=str(start))
    changed = [not np.allclose(a, b, atol=2e-3) for a, b in zip(trained.get_weights(), fresh.get_weights(), strict=True)]
    assert any(changed[:20])  # the first layers of the backbone moved too


def test_a_missing_teacher_is_named_before_anything_is_written(data, tmp_path):
    recipe = tmp_path / "taught.toml"
    recipe.write_text(f'{RECIPE}\nteacher = "nowhere.weights.h5"\n')
    with pytest.raises(DataError, match=r"nowhere\.weights\.h5"):
        train(recipe, data, tmp_path / "taught", log=lambda line: None)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "taught").exists()
