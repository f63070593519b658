"""Whole runs of `python -m training` on a few drawn cells: a checkpoint folder comes out, or a clear sentence."""

import csv
import json
import re
import resource
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inference.cells import score_files
from inference.engine import Engine
from inference.sources import open_paths
from model_zoo import Card, find_checkpoint, load_checkpoint
from model_zoo._checkpoint import BUNDLED
from training.__main__ import main
from training.calibration import subject_rows
from training.data import index_cells, verify_cells
from training.draws import Draws
from training.errors import Stopped
from training.estimate import _seconds
from training.metrics import bootstrap_metrics
from training.recipe import read_recipe
from training.run import provenance, read_state
from training.splits import divide, split_by_subject, thinned


def table(folder, name):
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory, recipe_text):
    """(folder of the run, lines it printed): a recipe of one held-out fold."""
    import contextlib
    import io

    here, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    (here / "tiny.toml").write_text(recipe_text)
    with contextlib.chdir(here), contextlib.redirect_stdout(printed):
        assert main(["tiny.toml", "--data", str(data), "--out", "shelf/tiny"]) == 0
    return here / "shelf" / "tiny", printed.getvalue()


def test_run_leaves_one_whole_folder(run):
    folder, printed = run
    assert {"model.onnx", "card.json", "recipe.toml", "history.csv", "predictions.csv", "run.json", "log.txt"} <= {
        f.name for f in folder.iterdir()
    }
    assert read_recipe(folder / "recipe.toml") == read_recipe(folder.parents[1] / "tiny.toml")
    assert [row["epoch"] for row in table(folder, "history.csv")] == list("123")
    assert "all/UID_99_1_1_all.png" in printed and "epoch 3 of 3" in printed and "wrote shelf/tiny" in printed
    assert find_checkpoint("tiny", folder.parent).card.title == "Tiny"
    assert {row["subject"] for row in table(folder, "subjects.csv")} and not list(folder.rglob("*.partial"))


def test_run_folder_tells_what_reproduces_it(run, data):
    told = read_state(run[0])
    assert told["state"] == "finished" and told["data"] == str(data) and told["seed"] == 1 and told["ended"] >= told["started"]
    assert set(told["versions"]) >= {"keras", "numpy"} and told["command"].startswith("python -m training")
    card = load_checkpoint(run[0]).card
    assert told["data_fingerprint"] == card.data["fingerprint"] and told["device"] == card.training["device"]


def test_card_tells_the_split_and_what_was_measured(run, data):
    folder = run[0]
    card, predictions = load_checkpoint(folder).card, table(folder, "predictions.csv")
    cells = index_cells(data)
    cells = cells.choose(np.array([f.name != "UID_99_1_1_all.png" for f in cells.files]))
    held = {f.name for f, fold in zip(cells.files, split_by_subject(cells, folds=5, seed=1), strict=True) if fold == 2}
    assert {row["file"] for row in predictions} == held and len(held) == len(predictions)
    parts = [card.data[part] for part in ("training", "validation", "test")]
    assert sum(part["all_cells"] for part in parts) == 20 and sum(part["hem_subjects"] for part in parts) == 10  # damaged: out
    assert not set(card.data["training_subjects"]) & {row["subject"] for row in predictions}
    y_true, logit, rounded = (np.array([float(row[c]) for row in predictions]) for c in ("y_true", "logit", "p_all"))
    p_all = 1 / (1 + np.exp(-logit / card.temperature))
    np.testing.assert_allclose(rounded, p_all, rtol=1e-7)
    subjects = np.array([row["subject"] for row in predictions])
    groups = np.array([row["group"] for row in predictions])
    assert {(g, *g.split("+")) for g in groups} == {(g, *sorted(set(subjects[groups == g]))) for g in groups}
    found = bootstrap_metrics(y_true.astype(int), p_all, subjects, groups, card.threshold)
    for figure, values in card.metrics.items():
        np.testing.assert_allclose(found[figure], values, atol=2e-4, err_msg=figure)
    for subject, y, n, called in card.subjects:
        mine = subjects == subject
        assert (y, n, called) == (y_true[mine][0], mine.sum(), (p_all[mine] >= card.threshold).sum())
    assert card.training["start"] == "random weights" and card.weights_sha256


def test_the_engine_serves_what_was_measured(run, data):
    folder = run[0]
    expected = {row["file"]: float(row["p_all"]) for row in table(folder, "predictions.csv")}
    rows = {r.file.rpartition("/")[2]: r.p_all for r in score_files(open_paths([data]), Engine(load_checkpoint(folder)))}
    for file, p_all in expected.items():
        assert rows[file] == pytest.approx(p_all, abs=1e-3)
    assert rows["UID_99_1_1_all.png"] is None


def test_a_regression_has_its_own_operating_point(data, write_recipe_file, tmp_path):
    """Its classes weigh alike: logit 0, whatever the temperature, and whatever other cells would suggest."""
    lines = ["probe = 0.01", "epochs = 0", "test_folds = []", "folds = 3", "validation = false", "refit = true"]
    assert main([str(write_recipe_file(*lines)), "--data", str(data)]) == 0
    card, rows = load_checkpoint(tmp_path / "runs" / "r").card, table(tmp_path / "runs" / "r", "predictions.csv")
    assert card.threshold == 0.5 and "nothing was estimated" in card.operating_points["default"]["chosen"]
    assert {row["threshold"] for row in rows} == {"0.5"} and card.temperature != 1
    right = [(float(row["logit"]) >= 0) == (row["y_true"] == "1") for row in rows]
    assert card.metrics["accuracy"][0] == pytest.approx(np.mean(right), abs=1e-4)


def test_folds_by_stain_test_on_stains_that_were_not_trained_on(data, write_recipe_file, tmp_path):
    lines = ["probe = 0.01", "epochs = 0", "test_folds = []", "folds = 2", 'folds_by = "stain"', "validation = false"]
    assert main([str(write_recipe_file(*lines)), "--data", str(data)]) == 0
    cells, _ = verify_cells(index_cells(data), cache=tmp_path / "cache")
    tested = {row["subject"]: row["fold"] for row in table(tmp_path / "runs" / "r", "predictions.csv")}
    assert set(tested) == set(cells.subjects)
    for value in (0, 1):
        groups = {g: cells.groups == g for g in cells.groups[cells.y_true == value]}
        folds = {g: {tested[s] for s in cells.subjects[of]} for g, of in groups.items()}
        dark, light = ([cells.darkness[groups[g]].mean() for g in groups if folds[g] == {k}] for k in ("fold_0", "fold_1"))
        assert len(dark) + len(light) == len(groups) and 0 <= len(dark) - len(light) <= 1 and min(dark) >= max(light)
    assert "Folds are by stain" in Card.read(tmp_path / "runs" / "r" / "card.json").split["sentence"]


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_what_was_trained_in_mixed_precision_is_measured_as_it_is_served(precision, data, write_recipe_file, tmp_path):
    assert main([str(write_recipe_file(f'precision = "{precision}"', "epochs = 1")), "--data", str(data)]) == 0
    checkpoint = load_checkpoint(tmp_path / "runs" / "r")
    rows = {r.file.rpartition("/")[2]: r.p_all for r in score_files(open_paths([data]), Engine(checkpoint))}
    for row in table(tmp_path / "runs" / "r", "predictions.csv"):
        assert rows[row["file"]] == pytest.approx(float(row["p_all"]), abs=1e-5)  # bfloat16 has three digits


def test_every_fold_gives_out_of_fold_predictions_and_a_refit_is_served(data, write_recipe_file, tmp_path):
    recipe = write_recipe_file("test_folds = []", "folds = 3", "epochs = 1", "refit = true")
    assert main([str(recipe), "--data", str(data)]) == 0
    card, predictions = load_checkpoint(tmp_path / "runs" / "r").card, table(tmp_path / "runs" / "r", "predictions.csv")
    assert len(predictions) == 40 and {row["fold"] for row in predictions} == {"fold_0", "fold_1", "fold_2"}
    assert len({row["subject"] for row in predictions}) == len(card.subjects) == len(card.data["training_subjects"]) == 20
    assert card.training["networks"] == 4 and "then trained on all" in card.split["sentence"]
    y_true, p_all, threshold = (np.array([float(row[c]) for row in predictions]) for c in ("y_true", "p_all", "threshold"))
    accuracy = ((p_all >= threshold) == (y_true == 1)).mean()
    assert card.metrics["accuracy"][0] == pytest.approx(accuracy, abs=1e-4)
    held_out = {row["cell_hash"]: (p, p >= t) for row, p, t in zip(predictions, p_all, threshold, strict=True)}
    assert load_checkpoint(tmp_path / "runs" / "r").trained_on == held_out and len(held_out) == 40


def test_a_run_keeps_which_cells_trained_its_network(run, data, tmp_path):
    """Of one fold those that trained it or chose its epoch; what it held out is not among them, and has its hash, too."""
    folder, cells = run[0], verify_cells(index_cells(data), cache=tmp_path)[0]
    (part,) = divide(cells, read_recipe(folder / "recipe.toml"))
    trained = load_checkpoint(folder).trained_on
    chose = np.concatenate([part.training, part.validation])
    assert trained.keys() == set(cells.hashes[chose]) and set(trained.values()) == {None} and len(part.validation)
    assert [row["cell_hash"] for row in table(folder, "predictions.csv")] == cells.hashes[part.test].tolist()


def test_a_card_claims_c_nmc_only_of_its_own_cells(run, data, write_recipe_file, tmp_path):
    """Its source, licence and limits: a laboratory's cells have others."""
    rows = ["file,subject"]
    for i, file in enumerate(sorted(data.glob("*/UID_*_[12]_*.png"))):
        (tmp_path / "Ward 5" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "Ward 5" / file.parent.name / f"{i}.png")
        rows.append(f"{i}.png,LAB-{file.name.split('_')[1]}")
    (tmp_path / "Ward 5" / "subjects.csv").write_text("\n".join(rows))
    assert main([str(write_recipe_file("epochs = 0", "probe = 1.0")), "--data", str(tmp_path / "Ward 5")]) == 0
    own, official = (Card.read(folder / "card.json") for folder in (tmp_path / "runs" / "r", run[0]))
    bundled = Card.read(BUNDLED / "mobilenet_v2" / "card.json")
    assert (official.data["source"], official.licence) == (bundled.data["source"], bundled.licence)
    assert official.limits == bundled.limits
    assert own.data["source"] == "Ward 5" and own.licence.endswith("the laboratory's own") and own.limits
    assert not re.search("C-NMC|CC BY|B-lymphoid|all ALL or all HEM", f"{own.data} {own.licence} {own.limits}")
    cells = index_cells(data)
    mixed = provenance(replace(cells, files=[Path("1.png"), *cells.files[1:]]), "Ward 5")
    assert mixed[0] == f"{bundled.data['source']}, and cells of Ward 5" and "CC BY 3.0" in mixed[1]
    assert mixed[2] == bundled.limits


def test_folds_without_a_refit_leave_figures_without_weights(data, write_recipe_file, tmp_path):
    recipe = write_recipe_file("test_folds = [0, 1]", "epochs = 1", "validation = false")
    assert main([str(recipe), "--data", str(data)]) == 0
    folder = tmp_path / "runs" / "r"
    assert not (folder / "model.onnx").exists() and Card.read(folder / "card.json").weights_sha256 == ""
    assert {row["fold"] for row in table(folder, "predictions.csv")} == {"fold_0", "fold_1"}


def test_both_ways_stores_both_and_says_what_the_image_level_split_is(data, write_recipe_file, tmp_path, capsys):
    recipe = write_recipe_file("epochs = 1", "shares = [0.7, 0.3, 0.0]", 'folds_by = "chance"')
    assert main([str(recipe), "--data", str(data), "--both-ways"]) == 0
    by_subject, by_image = (Card.read(tmp_path / "runs" / f"r_{p}" / "card.json") for p in ("by_subject", "image_level"))
    assert by_subject.split["protocol"] == "by subject" and by_image.split["protocol"] == "image-level"
    assert "drawn by chance" in by_subject.split["sentence"] and "drawn by chance" not in by_image.split["sentence"]
    assert "cells of a patient on both sides" in by_image.split["sentence"]
    assert "chose the epoch are the ones reported" in by_image.split["sentence"]  # there was no test share
    assert len(table(tmp_path / "runs" / "r_image_level", "predictions.csv")) == 12
    assert read_recipe(tmp_path / "runs" / "r_image_level" / "recipe.toml").protocol == "image_level"
    printed = capsys.readouterr().out
    assert "| r_by_subject | by subject |" in printed and "| r_image_level | image-level |" in printed
    # again: nothing is missing, so nothing runs; with other settings it is refused
    began = read_state(tmp_path / "runs" / "r_by_subject")["started"]
    assert main([str(recipe), "--data", str(data), "--both-ways"]) == 0
    assert read_state(tmp_path / "runs" / "r_by_subject")["started"] == began
    assert main([str(recipe), "--data", str(data), "--both-ways", "--set", "epochs=2"]) == 2
    assert "was begun with other settings" in capsys.readouterr().err


def test_both_ways_hand_on_every_kind_of_setting(data, write_recipe_file, tmp_path):
    given = ["rates.logit=0.5", 'rates."dense.*é"=1', 'title="é"', "ema=0.5", "shares=[0.5, 0.5, 0.0]", "class_weight=true"]
    settings = [word for setting in (*given, "epochs=0", "probe=1.0", "stain=0.0") for word in ("--set", setting)]
    assert main([str(write_recipe_file()), "--data", str(data), "--both-ways", *settings]) == 0
    for way in ("by_subject", "image_level"):
        recipe = read_recipe(tmp_path / "runs" / f"r_{way}" / "recipe.toml")
        assert recipe.rates == {"logit": 0.5, "dense.*é": 1} and (recipe.title, recipe.ema) == ("é", 0.5)
        assert recipe.shares == [0.5, 0.5, 0.0] and recipe.class_weight and recipe.protocol == way


def test_few_cells_are_of_both_classes_of_a_subject_that_has_both(data):
    cells = index_cells(data)
    one = replace(cells, subjects=np.array(["1"] * len(cells)))
    assert thinned(one).count() == {"all_subjects": 1, "all_cells": 2, "hem_subjects": 1, "hem_cells": 2}
    assert len(thinned(cells, each=1)) == 21  # the damaged one is a subject's only


@pytest.mark.parametrize(
    "lines, looked, drawn",
    [
        (["epochs = 0", "probe = 1.0"], 40 + 40, 0),  # features once, and what is held out
        (["epochs = 0", "probe = 1.0", 'grow_from = "x"'], 5 * 40 + 40, 0),  # of each network
        (["epochs = 0", "probe = 1.0", "probe_imaging = 1.0"], 40 + 40 + 4 * 30 + 40, 0),
        (["epochs = 3", "draws_per_epoch = 0"], 40, 3 * (4 * 30 + 40)),
        (["epochs = 3", "validation = true", "rotations = 8", "refit = false"], 3 * 40 + 8 * 80, 3 * 4 * 16),
    ],
)
def test_the_time_a_run_takes_is_reckoned_as_it_is_computed(lines, looked, drawn, data, write_recipe_file):
    fours = {"folds": 4, "test_folds": [], "refit": True, "validation": False, "batch_size": 2}
    recipe = read_recipe(write_recipe_file(*lines), fours | tomllib.loads("\n".join(lines)))
    cells = index_cells(data)
    cells = cells.choose(cells.subjects != "99")
    assert _seconds(recipe, cells, divide(cells, recipe), 0.0, 1.0) == looked
    assert _seconds(recipe, cells, divide(cells, recipe), 2.0, 0.0) == pytest.approx(drawn, abs=8)  # whole batches


def test_parts_share_no_group_and_image_level_parts_share_no_cell(data, write_recipe_file):
    cells = index_cells(data)
    for part in divide(cells, read_recipe(write_recipe_file("test_folds = []"))):
        sides = [set(cells.groups[rows]) for rows in (part.training, part.validation, part.test)]
        assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
        assert len(np.concatenate([part.training, part.validation, part.test])) == len(cells)
    (part,) = divide(cells, read_recipe(write_recipe_file('protocol = "image_level"')))
    assert len(set(np.concatenate([part.training, part.validation, part.test]))) == len(cells)


def test_official_protocol_tests_on_the_preliminary_set(data, write_recipe_file, tmp_path):
    root = tmp_path / "official"
    shutil.copytree(data, root / "C-NMC_training_data" / "fold_0")
    preliminary = root / "C-NMC_test_prelim_phase_data"
    preliminary.mkdir()
    names = []
    for i, label in enumerate(("all", "hem", "all", "hem"), 1):
        source = sorted((data / label).glob(f"UID_*2{i}_1_1_{label}.png"))[0]
        shutil.copy(source, preliminary / f"{i}.png")
        names.append(f"UID_{'H' if label == 'hem' else ''}7{i}_1_1_{label}.bmp,{i}.png,{int(label == 'all')}")
    (root / "C-NMC_test_prelim_phase_data_labels.csv").write_text("Patient_ID,new_names,labels\n" + "\n".join(names) + "\n")
    (part,) = divide(index_cells(root), read_recipe(write_recipe_file('protocol = "official"')))
    assert len(part.test) == 4 and not set(part.test) & set(np.concatenate([part.training, part.validation]))


@pytest.mark.parametrize(
    "lines, told",
    [
        (['weights = "nowhere.weights.h5"'], "nowhere.weights.h5"),
        (['teacher = "nowhere.weights.h5"'], "nowhere.weights.h5"),
        (["folds = 11"], "11 folds need"),
        (["epoch = 2"], "Did you mean 'epochs'"),
        (['architecture = "vanilla.2x2c1"'], "Did you mean 'vanilla.2x2c1d'"),
        (['protocol = "official"'], "preliminary test set"),
    ],
)
def test_what_cannot_run_is_told_before_anything_is_written(lines, told, data, write_recipe_file, tmp_path, capsys):
    assert main([str(write_recipe_file(*lines)), "--data", str(data), "--out", "shelf/tiny"]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "shelf" / "tiny").exists()


def test_pictures_too_small_for_a_network_are_told(data, write_recipe_file, tmp_path, capsys):
    recipe = write_recipe_file('architecture = "vgg16"', "input_size = 24", "epochs = 1")
    assert main([str(recipe), "--data", str(data), "--out", "shelf/small"]) == 2
    assert "VGG16 cannot be built for pictures of 24 px" in capsys.readouterr().err
    assert read_state(tmp_path / "shelf" / "small")["state"] == "failed"


def test_what_cannot_run_is_told_before_it_waits_for_a_device(data, write_recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.__main__.hold_device", None)
    for settings, said in ((["folds=40"], "40"), (["weights='none.weights.h5'"], "none.weights.h5")):
        for more in ([], ["--both-ways"]):
            asked = [f"--set={line}" for line in settings]
            assert main([str(write_recipe_file()), "--data", str(data), *asked, *more]) == 2
            assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_command_that_is_none_is_told(capsys):
    assert main(["evalute", "runs/a"]) == 2
    assert "'evalute' is no recipe, no run folder, and none of evaluate, compare" in capsys.readouterr().err


def test_a_subject_with_cells_of_both_classes_counts_with_each():
    rows = subject_rows(np.array([1, 1, 0, 0]), np.array(["7", "7", "7", "H1"]), np.array([True, False, True, False]))
    assert rows == [["7", 0, 1, 1], ["7", 1, 2, 1], ["H1", 0, 1, 0]]


def test_a_head_that_no_regression_can_set_is_told(data, write_recipe_file, capsys):
    recipe = write_recipe_file('architecture = "resnet50"', "input_size = 32", "epochs = 0", "probe = 1e-3")
    assert main([str(recipe), "--data", str(data)]) == 2
    assert "resnet50 ends in two units" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["start.keras", "start.weights.h5", "start.npz"])
def test_weights_that_are_none_are_told(data, write_recipe_file, tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"no weights")
    recipe = write_recipe_file('architecture = "mobilenet_v2"', f'weights = "{tmp_path / name}"', "input_size = 32")
    assert main([str(recipe), "--data", str(data)]) == 2
    assert f"{name} does not hold the weights of mobilenet_v2's backbone alone" in capsys.readouterr().err


def test_divergence_is_told_and_leaves_no_checkpoint(data, write_recipe_file, tmp_path, capsys):
    recipe = write_recipe_file("learning_rate = 1e30", "ema = 0", 'schedule = "constant"')
    assert main([str(recipe), "--data", str(data)]) == 2
    assert "diverged" in capsys.readouterr().err
    folder = tmp_path / "runs" / "r"
    assert read_state(folder)["state"] == "failed" and "diverged" in read_state(folder)["message"]
    assert not (folder / "card.json").exists()


def test_no_data_folder_is_told(write_recipe_file, tmp_path, capsys):
    assert main([str(write_recipe_file()), "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_is_never_overwritten(run, data, write_recipe_file, capsys):
    assert main([str(write_recipe_file()), "--data", str(data), "--out", str(run[0])]) == 2
    assert "already holds a finished run" in capsys.readouterr().err
    assert main([str(run[0])]) == 2
    assert "is finished" in capsys.readouterr().err


def test_other_cells_than_it_began_with_are_refused(run, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "all" / "UID_20_1_1_all.png").unlink()
    shutil.copytree(run[0], tmp_path / "run")
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(told | {"state": "stopped", "data": str(tmp_path / "data")}))
    assert main([str(tmp_path / "run")]) == 2
    assert "no longer holds the cells" in capsys.readouterr().err


def test_a_run_whose_cells_were_moved_goes_on_where_they_are_now(data, write_recipe_file, tmp_path, capsys, monkeypatch):
    shutil.copytree(data, tmp_path / "old")
    assert main([str(write_recipe_file("epochs = 1")), "--data", str(tmp_path / "old")]) == 0
    folder, other = tmp_path / "runs" / "r", tmp_path / "other"
    told = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(told | {"state": "stopped"}))
    moved = (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.setenv("BLASTOSCOPE_DATA", str(moved))  # is for new runs: this one may be of other cells
    assert main([str(folder)]) == 2 and "old is no folder" in capsys.readouterr().err
    shutil.copytree(moved, other)
    (other / "all" / "UID_20_1_1_all.png").unlink()
    assert main([str(folder), "--data", str(other)]) == 2
    assert f"{other} no longer holds the cells that {folder} began with" in capsys.readouterr().err
    assert main([str(folder), "--data", str(moved)]) == 0
    assert read_state(folder)["state"] == "finished" and read_state(folder)["data"] == str(moved)


def test_a_machine_without_enough_memory_is_told(data, write_recipe_file, capsys, monkeypatch):
    def too_large(*shape, **how):
        raise MemoryError("Unable to allocate 90 GiB")

    monkeypatch.setattr("training.run.pack_cells", too_large)
    assert main([str(write_recipe_file()), "--data", str(data)]) == 2
    assert "error: this machine has too little memory. Unable to allocate 90 GiB" in capsys.readouterr().err


def test_tiny_and_set_shrink_any_recipe(data, repository, tmp_path):
    recipe = repository / "training" / "recipes" / "vanilla_3c1d_by_subject.toml"
    assert main([str(recipe), "--data", str(data), "--tiny", "--set", "stain=0.0"]) == 0
    folder = tmp_path / "runs" / "vanilla_3c1d_by_subject_tiny"
    ran = read_recipe(folder / "recipe.toml")
    assert ran.input_size <= 96 and ran.epochs <= 2 and ran.stain == 0 and "(tiny)" in load_checkpoint(folder).card.title


def test_short_memory_halves_the_batch_and_says_so(data, write_recipe_file, tmp_path, capsys, monkeypatch):
    given = Draws.__getitem__

    def greedy(self, index):
        if self.batch_size > 4:
            raise MemoryError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 8 cells")
        return given(self, index)

    monkeypatch.setattr(Draws, "__getitem__", greedy)
    assert main([str(write_recipe_file("epochs = 1")), "--data", str(data)]) == 0
    assert "It starts again with 4 at a time, 2 times a step." in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "runs" / "r").card.training["best_epoch"] == 1


def test_a_run_in_smaller_pieces_goes_on_in_them_and_its_tables_hold_each_epoch_once(
    data, write_recipe_file, tmp_path, capsys, monkeypatch
):
    """Memory runs short in the second epoch; then the run is stopped after two of three."""
    given, folder, tried, resumed = Draws.__getitem__, tmp_path / "runs" / "r", [], []

    def greedy(self, index):
        tried.append(self.batch_size)
        if self.batch_size > 4 and self.epoch == 1:
            raise MemoryError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 8 cells")
        if self.epoch == 2 and not resumed:
            (folder / "stop").touch()
        return given(self, index)

    monkeypatch.setattr(Draws, "__getitem__", greedy)
    assert main([str(write_recipe_file("ema = 0.9")), "--data", str(data)]) == 2
    assert read_state(folder)["state"] == "stopped" and "4 at a time" in capsys.readouterr().out
    tried.clear()
    resumed.append(True)
    assert main([str(folder)]) == 0
    assert set(tried) == {4}  # not begun anew in one piece
    assert [row["epoch"] for row in table(folder, "history.csv")] == list("123")
    subjects = [(row["epoch"], row["subject"]) for row in table(folder, "subjects.csv")]
    assert len(set(subjects)) == len(subjects)


def test_short_memory_halves_the_batch_of_a_regression_too(data, write_recipe_file, tmp_path, capsys, monkeypatch):
    import keras

    given, tried = keras.Model.predict_on_batch, []

    def greedy(self, cells):
        tried.append(len(cells))
        if len(cells) > 4:
            raise MemoryError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 8 cells")
        return given(self, cells)

    monkeypatch.setattr(keras.Model, "predict_on_batch", greedy)
    assert main([str(write_recipe_file("epochs = 0", "probe = 1.0")), "--data", str(data)]) == 0
    assert tried[0] == 8 and max(tried[1:]) == 4 and "It starts again with 4" in capsys.readouterr().out


def test_a_run_without_training_steps_stops_when_told(data, write_recipe_file, tmp_path, monkeypatch):
    import keras

    given, folder, read = keras.Model.predict_on_batch, tmp_path / "runs" / "r", []

    def stopping(self, cells):
        read.append(len(cells))
        if len(read) == 2:
            (folder / "stop").touch()
        return given(self, cells)

    monkeypatch.setattr(keras.Model, "predict_on_batch", stopping)
    assert main([str(write_recipe_file("epochs = 0", "probe = 1.0")), "--data", str(data)]) == 2
    assert len(read) == 2 and read_state(folder)["state"] == "stopped"
    assert main([str(folder)]) == 0 and read_state(folder)["state"] == "finished"


def test_cells_drawn_are_those_that_were_left_after_undersampling_and_nothing_is_chosen_on_what_is_reported(
    data, write_recipe_file, tmp_path
):
    shutil.copytree(data, tmp_path / "cells", dirs_exist_ok=True)
    for file in (tmp_path / "cells" / "hem").glob("UID_H2[5-9]_*"):
        file.unlink()
    lines = ['protocol = "image_level"', "shares = [0.8, 0.2, 0.0]", 'sampling = "undersampled"', "draws_per_epoch = 0"]
    recipe = write_recipe_file(*lines, "batch_size = 4", "epochs = 2", "head_epochs = 1", "test_folds = []")
    assert main([str(recipe), "--data", str(tmp_path / "cells")]) == 0
    card = Card.read(tmp_path / "runs" / "r" / "card.json")
    assert card.data["training"]["hem_cells"] == 8 and card.training["cells_drawn"] == 3 * 16
    assert (card.threshold, card.temperature) == (0.5, 1.0)
    assert card.operating_points["default"]["chosen"].startswith("P(ALL) .5")


def test_full_disk_is_told_and_the_run_goes_on_once_there_is_room(data, write_recipe_file, tmp_path, capsys):
    """A limit on the size of a file stands in for the disk: the cells still fit, the weights do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        assert main([str(write_recipe_file("epochs = 1")), "--data", str(data)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = tmp_path / "runs" / "r"
    assert "error:" in capsys.readouterr().err and read_state(folder)["state"] == "failed"
    assert not list(folder.rglob("*.partial")) and not (folder / "card.json").exists()
    assert main([str(folder)]) == 0 and read_state(folder)["state"] == "finished"


@pytest.fixture
def data_with_start(data, tmp_path):
    """The cells, and beside them the weights of a MobileNetV2."""
    import keras

    shutil.copytree(data, tmp_path / "data")
    start = tmp_path / "data" / "start.weights.h5"
    keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(224, 224, 3)).save_weights(start)
    return tmp_path / "data"


def test_a_pretrained_start_and_a_head_phase(data_with_start, write_recipe_file, tmp_path, capsys):
    """The head trains first, the backbone then."""
    from model_zoo import find_architecture

    named = ['architecture = "mobilenet_v2"', 'weights = "start.weights.h5"', "input_size = 64"]
    recipe = write_recipe_file(*named, "head_epochs = 1", "epochs = 1", "draws_per_epoch = 8")
    assert main([str(recipe), "--data", str(data_with_start)]) == 0
    assert "head trained for 1 epochs" in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "runs" / "r")
    assert "start.weights.h5" in checkpoint.card.training["start"]
    start = str(data_with_start / "start.weights.h5")
    fresh = find_architecture("mobilenet_v2").build(input_size=64, weights=start)
    pairs = zip(checkpoint.keras_model().get_weights(), fresh.get_weights(), strict=True)
    assert any([not np.allclose(a, b, atol=2e-3) for a, b in pairs][:20])  # the first layers of the backbone moved too


def test_growing_is_said_before_it_begins(data, write_recipe_file, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise Stopped("Now.")

    monkeypatch.setattr("training.run.grow", stop)
    (tmp_path / "start.weights.h5").touch()
    assert main([str(write_recipe_file(f'grow_from = "{tmp_path}/start.weights.h5"')), "--data", str(data)]) == 2
    assert "fold_2: growing from start.weights.h5; this takes minutes" in capsys.readouterr().out


def test_a_teacher_is_named_on_the_card_and_not_served(data_with_start, small_teacher, write_recipe_file, tmp_path):
    lines = ['teacher = "start.weights.h5"', "epochs = 1", "draws_per_epoch = 8", "batch_size = 4"]
    assert main([str(write_recipe_file(*lines)), "--data", str(data_with_start)]) == 0
    checkpoint = load_checkpoint(tmp_path / "runs" / "r")
    assert "start.weights.h5" in checkpoint.card.training["teacher"] and checkpoint.card.training["start"] == "random weights"
    checkpoint.keras_model()  # fills: no weight of the teacher is in the file
