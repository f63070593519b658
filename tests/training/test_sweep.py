"""Sweeps: what is planned, one run after the other and on Ray, killed in the middle, and the table of them all."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training import jobs
from training.__main__ import main
from training.compare import read_predictions
from training.errors import DataError, RecipeError, RunError
from training.metrics import cell_metrics
from training.recipe import read_recipe
from training.results import RECIPES
from training.sweep import Planned, _folder_name, describe, list_sweeps, plan, summarize, sweep

EPOCHS = "epochs = 8"  # of a blink each: long enough to be killed in
RUNS = ("tiny_seed_0_fold_2", "tiny_seed_1_fold_2")


def table(folder, name) -> list[dict]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, recipe_text):
    """A recipe of one held-out fold."""
    file = tmp_path_factory.mktemp("sweeps") / "tiny.toml"
    file.write_text(recipe_text.replace("epochs = 3", EPOCHS))
    return file


@pytest.fixture(scope="module")
def serial(tiny, data):
    """(folder of a sweep of two seeds, when its first run began, what the second command printed): begun with one seed."""
    out, printed = tiny.parent / "serial", io.StringIO()
    with contextlib.chdir(tiny.parent):
        assert main(["sweep", str(tiny), "--data", str(data), "--seeds", "0", "--out", str(out)]) == 0
        began = json.loads((out / RUNS[0] / "run.json").read_text())["started"]
        with contextlib.redirect_stdout(printed):
            assert main(["sweep", str(tiny), "--data", str(data), "--seeds", "0,1", "--out", str(out)]) == 0
    return out, began, printed.getvalue()


def test_a_sweep_goes_on_with_what_is_missing(serial):
    out, began, printed = serial
    assert sorted(folder.name for folder in out.iterdir() if folder.is_dir()) == sorted(RUNS)
    assert "2 runs, 1 of them to do" in printed
    told = [json.loads((out / name / "run.json").read_text()) for name in RUNS]
    assert [t["state"] for t in told] == ["finished"] * 2 and [t["seed"] for t in told] == [0, 1]
    assert told[0]["started"] == began and told[0]["pid"] != told[1]["pid"]


def test_the_table_is_of_what_the_runs_held_out(serial):
    out, _, printed = serial
    (row,) = table(out, "table.csv")
    held = [read_predictions(out / name) for name in RUNS]
    scores = [cell_metrics(t["y_true"], t["p_all"], t["threshold"])["auroc"] for t in held]
    found = [float(row[name]) for name in ("auroc", "auroc_min", "auroc_max")]
    np.testing.assert_allclose(found, [np.mean(scores), min(scores), max(scores)], atol=1e-4)
    assert (row["recipe"], row["protocol"], row["seeds"], row["runs"], row["against"]) == ("tiny", "by subject", "2", "2", "")
    assert f"{float(row['auroc']):.3f} ({float(row['auroc_min']):.3f}..{float(row['auroc_max']):.3f})" in printed


def test_ray_gives_what_the_serial_sweep_gives_and_runs_a_killed_worker_again(tiny, data, serial, repository, wait_for):
    out = tiny.parent / "ray"
    arguments = ["sweep", str(tiny), "--data", str(data), "--seeds", "0,1", "--out", str(out), "--ray", "--cpus", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "training", *arguments],
        cwd=tiny.parent,
        env=os.environ | {"PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    history = out / RUNS[1] / "history.csv"
    wait_for(lambda: process.poll() is not None or (history.exists() and len(history.read_text().splitlines()) >= 3))
    assert process.poll() is None, process.stdout.read()
    killed = json.loads((out / RUNS[1] / "run.json").read_text())
    os.kill(killed["pid"], signal.SIGKILL)
    assert killed["state"] == "running" and killed["pid"] != process.pid
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert "goes on after epoch" in (out / RUNS[1] / "log.txt").read_text()
    assert json.loads((out / RUNS[1] / "run.json").read_text())["pid"] != killed["pid"]
    for name in RUNS:
        assert (out / name / "predictions.csv").read_text() == (serial[0] / name / "predictions.csv").read_text()
    assert (out / "table.csv").read_text() == (serial[0] / "table.csv").read_text()


def test_without_ray_there_is_a_sentence(tiny, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    assert main(["sweep", str(tiny), "--data", str(data), "--seeds", "0", "--out", str(tmp_path / "out"), "--ray"]) == 2
    assert "pip install -r requirements-ray.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there_is_a_sentence(tiny, data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # nobody listens there
        with pytest.raises(RunError, match=f"no Ray cluster at {address}"):
            sweep([tiny], data, [0], tmp_path / "out", ray=address)


def test_runs_on_a_cluster_share_the_processor(runs, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(jobs.SHARED_CPU, "1")
    with jobs.hold_device(runs / "one", resume=False) as first, jobs.hold_device(runs / "two", resume=False) as second:
        assert first == second == ["cpu"]
    monkeypatch.delenv(jobs.SHARED_CPU)
    with jobs.hold_device(runs / "three", resume=False), jobs.free_device() as free:
        assert free is None


def test_folds_are_runs_where_validation_cells_choose_the_operating_point(write_recipe_file, tmp_path):
    all_folds = write_recipe_file("test_folds = []", "folds = 4", "refit = true", name="a.toml")
    no_validation = write_recipe_file("test_folds = []", "validation = false", name="b.toml")
    by_image = write_recipe_file('protocol = "image_level"', name="c.toml")
    planned = plan([all_folds, no_validation, by_image], [5, 7], tmp_path, {"epochs": 1})
    names = [run.folder.name for run in planned]
    assert names[:5] == [*(f"a_seed_5_fold_{k}" for k in range(4)), "a_seed_7_fold_0"]
    assert names[8:] == ["b_seed_5", "b_seed_7", "c_seed_5_fold_2", "c_seed_7_fold_2"]
    assert {(run.recipe.epochs, run.recipe.refit) for run in planned} == {(1, False)}
    assert planned[1].recipe.test_folds == [1] and planned[8].recipe.test_folds == [] and planned[9].recipe.seed == 7


def test_the_recipe_of_a_run_or_checkpoint_is_repeated_under_its_name(write_recipe_file, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_recipe_file().rename(tmp_path / name / "recipe.toml")
    planned = plan([tmp_path / "one" / "recipe.toml", tmp_path / "two" / "recipe.toml"], [3], tmp_path)
    assert [(run.name, run.folder.name) for run in planned] == [(name, f"{name}_seed_3_fold_2") for name in ("one", "two")]
    monkeypatch.chdir(tmp_path / "one")
    assert plan([Path("recipe.toml")], [3], tmp_path)[0].name == "one"


def test_what_cannot_be_swept_is_refused_before_anything_is_written(write_recipe_file, data, tmp_path, capsys):
    recipe, out = write_recipe_file(), tmp_path / "out"
    with pytest.raises(RecipeError, match="one name"):
        sweep([recipe, recipe], data, [0], out)
    with pytest.raises(RecipeError, match="--seeds"):
        sweep([recipe], data, [0], out, changes={"seed": 3})
    with pytest.raises(RecipeError, match="Did you mean 'epochs'"):
        sweep([recipe], data, [0], out, changes={"epoch": 3})
    with pytest.raises(SystemExit):
        main(["sweep", str(recipe), "--data", str(data), "--seeds", "0;1"])
    assert "--seeds takes whole numbers" in capsys.readouterr().err and not out.exists()


def test_another_sweep_is_not_mixed_in(serial, tiny, data, tmp_path):
    with pytest.raises(RunError, match="other settings or other cells"):
        sweep([tiny], data, [0], serial[0], changes={"epochs": 1})
    with pytest.raises(RunError, match="other settings or other cells"):
        sweep([tiny], shutil.copytree(data, tmp_path / "other"), [0], serial[0])


def test_runs_that_fail_are_named_and_the_others_go_on(data, write_recipe_file, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no labelled cells"):
        sweep([write_recipe_file("epochs = 1")], tmp_path / "empty", [0, 1], tmp_path / "out")
    with pytest.raises(DataError, match="need at least"):
        sweep([write_recipe_file("epochs = 1", "folds = 40")], data, [0, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    diverging = write_recipe_file("epochs = 1", "learning_rate = 1e30", "ema = 0", 'schedule = "constant"')
    with pytest.raises(RunError, match=r"2 of 2 runs did not finish.*diverged.*same command goes on"):
        sweep([diverging], data, [0, 1], tmp_path / "out")


# --- the table, on runs that are written down ---


@pytest.fixture
def put(tiny, tmp_path, make_card):
    """put(name, seed, fold, p_all, called=): a finished run that held out four cells of four subjects, two of them ALL."""

    def put(name: str, seed: int, fold: int, p_all, *, threshold=0.5, state="finished") -> Planned:
        folder = tmp_path / f"{name}_{seed}_{fold}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"state": state}))
        make_card(temperature=1.0).write(folder / "card.json")
        rows = ["file,subject,y_true,logit,p_all,threshold,fold"]
        for i, p in enumerate(p_all):
            rows.append(f"UID_{fold}{i}.png,{fold}{i},{int(i < 2)},{np.log(p / (1 - p))},{p},{threshold},fold_{fold}")
        (folder / "predictions.csv").write_text("\n".join(rows) + "\n")
        return Planned(name=name, recipe=read_recipe(tiny).__class__(**vars(read_recipe(tiny)) | {"seed": seed}), folder=folder)

    return put


def test_figures_are_of_a_seeds_folds_together(put):
    perfect, upside_down = [0.9, 0.8, 0.2, 0.1], [0.1, 0.2, 0.8, 0.9]
    planned = [put("a", 0, 0, perfect), put("a", 0, 1, perfect), put("a", 1, 0, perfect), put("a", 1, 1, upside_down)]
    planned += [put("a", 2, 0, perfect), put("a", 2, 1, perfect, state="stopped")]
    (row,) = summarize(planned)
    assert (row["seeds"], row["runs"], row["cells"]) == (2, 4, 8)  # the third seed is not complete
    assert [row[f"accuracy{end}"] for end in ("", "_min", "_max")] == [0.75, 0.5, 1.0]
    assert (row["auroc_min"], row["auroc_max"]) == (0.5, 1.0)  # of eight cells, not of two times four


def test_differences_are_of_shared_cells_averaged_over_seeds(put):
    planned = [put("a", seed, 0, p) for seed, p in ((0, [0.9, 0.2, 0.1, 0.1]), (1, [0.9, 0.6, 0.1, 0.1]))]
    planned += [put("b", seed, 0, [0.9, 0.9, 0.1, 0.1], threshold=0.3) for seed in (0, 1, 2)]
    planned += [put("c", 7, 0, [0.9, 0.9, 0.1, 0.1])]
    first, second, third = summarize(planned)
    assert (first["against"], first["auroc_gap"]) == ("", None)
    # a's cell of subject 1 has a mean of .4, below .5: it is one of four that a calls wrong
    assert (second["against"], second["shared_cells"], second["accuracy_gap"]) == ("a", 4, 0.25)
    assert second["accuracy_gap_low"] <= 0.25 <= second["accuracy_gap_high"] and second["auroc_gap"] == 0
    assert third["against"] == ""  # no seed in common
    told = describe([first, second, third])
    assert "b minus a on 4 shared cells" in told and "accuracy             +0.250" in told and "c minus" not in told


def test_no_finished_run_gives_no_row(put):
    assert summarize([put("a", 0, 0, [0.9, 0.8, 0.2, 0.1], state="failed")]) == []


def test_many_recipes_make_no_name_that_is_too_long_for_a_folder():
    recipes = sorted(RECIPES.glob("vanilla_*_by_subject.toml"))
    names = {_folder_name(recipes), _folder_name(recipes[:-1]), _folder_name(recipes[:1])}
    assert len(recipes) > 10 and len(names) == 3 and max(map(len, names)) <= 100 and recipes[0].stem in names


def test_sweeps_are_listed_by_their_tables(runs, put):
    from training.sweep import write_table

    rows = summarize([put("a", 0, 0, [0.9, 0.2, 0.6, 0.1]), put("b", 0, 0, [0.9, 0.8, 0.2, 0.1])])
    (runs / "sweeps" / "two").mkdir(parents=True)
    assert list_sweeps() == {}
    write_table(runs / "sweeps" / "two" / "table.csv", rows)
    assert list_sweeps() == {"two": rows}
