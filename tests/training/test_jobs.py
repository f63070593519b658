"""Runs as processes: they outlive the app, queue, stop, crash and resume; nothing leads out of the allowed folders."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from inference.cells import score_files
from inference.engine import Engine
from inference.sources import open_paths
from model_zoo import default_checkpoint, find_checkpoint, list_checkpoints
from training import jobs, promotion
from training.compare import read_predictions
from training.data import index_cells
from training.errors import DataError, RecipeError, RunError, Stopped
from training.recipe import read_recipe


@pytest.fixture
def first(runs, finished_run):
    """The finished run "first", copied into this test's folder of runs."""
    shutil.copytree(finished_run, runs / "first")
    return runs / "first"


def kill(run):
    os.kill(run.told["pid"], signal.SIGKILL)


def epochs(name):
    return len(jobs.read_run(name).history())


# --- whole runs of the real engine ---


def test_a_run_outlives_the_app_that_started_it(first, tiny_recipe, drawn_cells):
    run = jobs.read_run("first")  # its starter was killed, see the fixture
    assert (run.state, run.message, run.told["data"]) == ("finished", "", str(drawn_cells))
    assert read_recipe(first / "recipe.toml") == tiny_recipe()
    assert [row["epoch"] for row in run.history()] == [1, 2] and run.history()[0]["fold"] == "fold_0"
    assert {row["subject"] for row in run.subjects()} <= set(index_cells(drawn_cells).subjects)
    assert "wrote" in run.log_tail()


def test_a_full_disk_and_a_kill_are_told_and_survived(runs, drawn_cells, tiny_recipe, wait_for):
    run = jobs.start_run(tiny_recipe(epochs=25, draws_per_epoch=48), drawn_cells, "Unlucky run!")
    assert (run.name, run.alive) == ("unlucky-run", True)
    resource.prlimit(run.told["pid"], resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # no file grows beyond 1 MB
    wait_for(lambda: not jobs.read_run(run.name).alive)
    run = jobs.read_run(run.name)
    assert run.state == "failed" and "File too large" in run.message
    assert [f.name for f in run.folder.rglob("*.partial")] == []

    jobs.resume_run(run.name)
    wait_for(lambda: epochs(run.name) >= 2)
    kill(jobs.read_run(run.name))
    wait_for(lambda: not jobs.is_alive(run.folder))
    run = jobs.read_run(run.name)
    assert (run.state, run.message, run.resumable) == ("crashed", jobs.WITHOUT_A_WORD, True)
    done = epochs(run.name)

    assert jobs.resume_run(run.name).alive
    wait_for(lambda: not jobs.read_run(run.name).alive)
    assert (jobs.read_run(run.name).state, jobs.read_run(run.name).message) == ("finished", "")
    assert [row["epoch"] for row in jobs.read_run(run.name).history()] == list(range(1, 26)) and done < 25
    with pytest.raises(RunError, match="finished"):
        jobs.resume_run(run.name)


def test_two_people_start_at_once_and_queue(runs, drawn_cells, tiny_recipe, wait_for):
    with ThreadPoolExecutor(2) as people:
        starts = [people.submit(jobs.start_run, tiny_recipe(epochs=5000), drawn_cells, "same") for _ in range(2)]
    assert {start.result().name for start in starts} == {"same", "same-2"}
    wait_for(lambda: any(run.state == "running" for run in jobs.list_runs()))
    runs_now = jobs.list_runs()
    assert sorted(run.waiting for run in runs_now) == [False, True]
    waiting, running = sorted(runs_now, key=lambda run: run.state)
    for run in runs_now:
        with pytest.raises(RunError, match="Stop it first"):
            jobs.delete_run(run.name)
        with pytest.raises(RunError, match="only one that was stopped"):
            jobs.resume_run(run.name)

    jobs.stop_run(waiting.name)
    wait_for(lambda: jobs.read_run(waiting.name).state == "stopped")
    assert "while it waited" in jobs.read_run(waiting.name).message
    wait_for(lambda: epochs(running.name) >= 1)
    jobs.stop_run(running.name)
    wait_for(lambda: jobs.read_run(running.name).state == "stopped")
    stopped = jobs.read_run(running.name)
    assert {"best.npz", "last.npz"} <= {file.name for file in (stopped.folder / "fold_0").iterdir()}

    jobs.resume_run(waiting.name)  # it never began, and begins now
    wait_for(lambda: jobs.read_run(waiting.name).progress.get("batch"))
    kill(jobs.read_run(waiting.name))
    wait_for(lambda: not jobs.is_alive(waiting.folder))
    for run in runs_now:
        jobs.delete_run(run.name)
    assert jobs.list_runs() == []


def test_a_recipe_is_tried_before_it_runs(runs, drawn_cells, tiny_recipe, tmp_path, monkeypatch):
    from io import BytesIO

    from PIL import Image

    told = jobs.try_recipe(tiny_recipe(folds=3, test_folds=[], refit=True, patience=1), drawn_cells)
    assert told["seconds"] > 0 and "4 networks, 2 epochs each" in told["sentence"] and "Early stopping" in told["sentence"]
    picture = np.asarray(Image.open(BytesIO(told["picture"])))
    cells = picture[:96, 106:].reshape(96, -1, 3)[:, :496].reshape(96, -1, 3)
    versions = [cells[:, 100 * i : 100 * i + 96] for i in range(5)]
    assert all(version.max() > 50 for version in versions)
    assert all((versions[0] != version).any() for version in versions[1:])
    with jobs.free_device() as device:  # as a run holds it
        assert device
        assert jobs.try_recipe(tiny_recipe(), drawn_cells)["seconds"] is None
        for file in drawn_cells.rglob("UID_*92[0-2]_1_1_*.png"):  # six cells, of which two train
            (tmp_path / "few" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "few" / file.parent.name)
        monkeypatch.setenv("BLASTOSCOPE_DATA_ROOTS", str(tmp_path))
        assert Image.open(BytesIO(jobs.try_recipe(tiny_recipe(folds=3), tmp_path / "few")["picture"])).height > 96


# --- the queue and the lock, without a training ---


def test_the_run_that_asked_first_goes_first(runs):
    order, held = [], threading.Event()
    release = {name: threading.Event() for name in "abc"}

    def one(name):
        with jobs.hold_device(runs / name, resume=False, data=""):
            order.append(name)
            held.set()
            release[name].wait(60)

    threads = []
    for name in "abc":
        threads.append(threading.Thread(target=one, args=name))
        threads[-1].start()
        while not (runs / name / "run.json").exists():
            pass
        if name == "a":
            held.wait(60)
    assert [run.waiting for run in sorted(jobs.list_runs(), key=lambda run: run.name)] == [False, True, True]
    for name in "abc":
        release[name].set()
    for thread in threads:
        thread.join(60)
    assert order == ["a", "b", "c"]


def test_a_run_folder_has_one_process_and_one_run(runs):
    with jobs.hold_device(runs / "one", resume=False, data="here"):
        assert jobs.read_run("one").alive
        with pytest.raises(RunError, match="another process"), jobs.hold_device(runs / "one", resume=True):
            pass
    assert jobs.read_run("one").state == "crashed"  # it left without a word
    with pytest.raises(RunError, match="already holds a run"), jobs.hold_device(runs / "one", resume=False):
        pass
    with pytest.raises(RunError, match="holds no run"), jobs.hold_device(runs / "none", resume=True):
        pass
    assert not (runs / "none").exists()


def test_a_run_that_fails_before_it_began_says_why_and_leaves_no_folder_of_its_own(runs):
    (runs / "given").mkdir(parents=True)
    for name in ("given", "new"):
        with pytest.raises(DataError), jobs.hold_device(runs / name, resume=False):
            raise DataError("no cells")
    assert (jobs.read_run("given").state, jobs.read_run("given").message) == ("failed", "no cells")
    assert not (runs / "new").exists()


def test_a_run_that_waits_says_so_once_and_can_be_stopped(runs):
    (runs / "waits").mkdir(parents=True)
    said = []
    with jobs.hold_device(runs / "holds", resume=False, log=said.append):
        assert not said  # the device was free
        threading.Timer(1.2, (runs / "waits" / "stop").touch).start()
        with pytest.raises(Stopped), jobs.hold_device(runs / "waits", resume=False, log=said.append):
            pass
    assert len(said) == 1 and "Waiting" in said[0]
    assert jobs.read_run("waits").state == "stopped"


def test_more_gpus_than_there_are_are_refused(runs, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RunError, match="asks for 2 GPUs"), jobs.hold_device(runs / "wide", resume=False, devices=2):
        pass


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    """As an H200 and a card that keeps its figures to itself answer."""
    rows = "0, GPU-aa, NVIDIA H200, 143771, 1024, 37, 9.0\\n1, GPU-bb, Odd Card, [N/A], [N/A], [N/A], 7.5"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{rows}\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [(g["name"], g["memory_mb"], g["busy_percent"], g["capability"]) for g in jobs.gpus()] == [
        ("NVIDIA H200", 143771, 37, 9.0),
        ("Odd Card", None, None, 7.5),
    ]
    assert jobs.describe_device() == "NVIDIA H200, 140 GB and 1 more"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb")
    assert [gpu["index"] for gpu in jobs.gpus()] == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert jobs.gpus() == [] and jobs.describe_device().startswith("CPU")


def test_a_table_being_written_is_read_up_to_its_last_whole_row(first):
    with (first / "history.csv").open("a") as file:
        file.write("fold_0,3,0.1")
    assert [row["epoch"] for row in jobs.read_run("first").history()] == [1, 2]


# --- names and folders ---


@pytest.mark.parametrize("name", ["../first", "first/../first", "/etc", "..", ".", "", "promoted", "link", "a\0b", "nowhere"])
def test_names_that_lead_elsewhere_are_refused(name, first, tmp_path):
    shutil.copytree(first, tmp_path / "first")
    (first.parent / "link").symlink_to(tmp_path / "first")
    for action in (jobs.read_run, jobs.stop_run, jobs.delete_run, jobs.resume_run, promotion.promote):
        with pytest.raises(RunError):
            action(name)
    assert (tmp_path / "first" / "run.json").exists()
    assert [run.name for run in jobs.list_runs()] == ["first"]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a\\b", "…", "promoted", "Cache"])
def test_runs_cannot_be_started_under_such_names(name, runs, drawn_cells, tiny_recipe):
    with pytest.raises(RunError, match=r"is a path|cannot be the name"):
        jobs.start_run(tiny_recipe(), drawn_cells, name)
    assert jobs.list_runs() == [] and not (runs.parent / "evil").exists()


def test_only_allowed_folders_are_read(runs, drawn_cells, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(drawn_cells, home / "other_user" / "cells")
    root = drawn_cells.parent
    for outside in (home, "/", "/etc", root / ".." / ".." / "home", f"{root}/../{root.name}-not", "cells", ""):
        with pytest.raises(DataError, match="outside the data folders"):
            jobs.allowed_folder(outside)
    with pytest.raises(DataError, match="is no folder"):
        jobs.allowed_folder(root / "nowhere")
    assert jobs.allowed_folder(f"{root}/./cells/../cells") == drawn_cells.resolve()

    mine = tmp_path / "mine"
    (mine / "all").mkdir(parents=True)
    monkeypatch.setenv("BLASTOSCOPE_DATA_ROOTS", f"{mine}{os.pathsep}{tmp_path / 'second'}")
    (mine / "to the data").symlink_to(drawn_cells)
    assert jobs.allowed_folder(mine) == mine  # a link from one allowed root into another
    assert jobs.allowed_folder(mine / "to the data") == drawn_cells.resolve()
    (mine / "all" / "cell.png").symlink_to(home / "other_user" / "cells" / "all" / "UID_920_1_1_all.png")
    with pytest.raises(DataError, match="leads out"):
        jobs.allowed_folder(mine)
    (tmp_path / "second").symlink_to(home)  # a root may be a link: whoever set it meant what it points to
    assert home in jobs.allowed_roots()
    for name in ("BLASTOSCOPE_DATA", "BLASTOSCOPE_DATA_ROOTS"):
        monkeypatch.delenv(name)
    with pytest.raises(DataError, match="No data folder is set"):
        jobs.allowed_folder(drawn_cells)


def test_what_cannot_start_leaves_nothing(runs, drawn_cells, tiny_recipe, monkeypatch):
    with pytest.raises(DataError, match=r"nowhere\.weights\.h5"):
        jobs.start_run(tiny_recipe(weights="nowhere.weights.h5"), drawn_cells, "start")
    with pytest.raises(DataError, match="outside"):
        jobs.start_run(tiny_recipe(), runs.parent.parent, "start")
    assert not runs.exists() or list(runs.iterdir()) == []
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RunError, match="could not start"):
        jobs.start_run(tiny_recipe(), drawn_cells, "start")
    assert list(runs.iterdir()) == []


def test_with_too_few_subjects_no_run_starts(runs, drawn_cells, tiny_recipe):
    with pytest.raises(RunError, match="11 folds need"):
        jobs.start_run(tiny_recipe(folds=11), drawn_cells, "many-folds")
    assert not (runs / "many-folds").exists()


def test_the_split_is_named(drawn_cells, tiny_recipe):
    cells = index_cells(drawn_cells)
    assert "fold 0 is held out. Figures will be of 7 subjects" in jobs.describe_split(tiny_recipe(), cells)
    assert "held out in turn" in jobs.describe_split(tiny_recipe(test_folds=[]), cells)
    by_stain, by_chance = (jobs.describe_split(tiny_recipe(folds_by=by), cells) for by in ("stain", "chance"))
    assert "folds from the darkest stained to the lightest; fold 0 is held out" in by_stain and "drawn by chance" in by_chance
    assert "both sides" in jobs.describe_split(tiny_recipe(protocol="image_level", test_folds=[]), cells)
    with pytest.raises(DataError, match="11 folds need"):
        jobs.describe_split(tiny_recipe(folds=11), cells)


def test_every_shipped_recipe_is_offered_and_keras_stays_out(repository):
    script = "import sys; from training import jobs; print(len(jobs.shipped_recipes()), 'keras' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(list((repository / "training" / "recipes").glob("*.toml")))), "False"]
    for name, recipe in jobs.shipped_recipes().items():
        assert read_recipe(repository / "training" / "recipes" / f"{name}.toml") == recipe


def test_a_damaged_recipe_is_told_by_its_file(runs, first):
    (first / "recipe.toml").write_text("epochs = ")
    assert jobs.read_run("first").recipe is None
    with pytest.raises(RecipeError, match=r"recipe\.toml"):
        read_recipe(first / "recipe.toml", variants=False)


# --- promotion ---


def test_promotion_serves_the_run_by_default_and_can_be_taken_back(first):
    before = default_checkpoint()
    name = promotion.promote("first")
    assert name.startswith("first-") and default_checkpoint() == name
    card = find_checkpoint(name).card
    assert (card.name, card.title) == (name, "Tiny (run first)") and name in [c.name for c in list_checkpoints()]
    assert promotion.last_promotion()["run"] == "first"
    with pytest.raises(RunError, match="promoted already"):
        promotion.promote("first")
    jobs.delete_run("first")
    assert find_checkpoint(name).card == card  # the copy is on its own
    assert promotion.undo_promotion() == before == default_checkpoint()
    assert name not in [c.name for c in list_checkpoints()]
    with pytest.raises(RunError, match="nothing to take back"):
        promotion.undo_promotion()


def test_undo_goes_back_one_promotion_at_a_time(first, runs):
    shutil.copytree(first, runs / "second")
    one, two = promotion.promote("first"), promotion.promote("second")
    assert default_checkpoint() == two
    assert promotion.undo_promotion() == one == default_checkpoint()
    shutil.rmtree(runs / "promoted" / one)  # by hand
    assert default_checkpoint() not in (one, two)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"split": {"protocol": "image-level", "sentence": ""}}, "split by image"),
        ({"subjects": []}, "held-out subjects"),
        ({"subjects": [["1", 1, 5, 5], ["2", 1, 5, 5]]}, "held-out subjects of both classes"),
        ({"weights_sha256": ""}, "kept none to serve"),
    ],
)
def test_what_says_nothing_of_unseen_persons_is_not_promoted(change, told, first):
    card = json.loads((first / "card.json").read_text()) | change
    (first / "card.json").write_text(json.dumps(card))
    with pytest.raises(RunError, match=told):
        promotion.promote("first")


def test_a_tiny_run_is_not_promoted(first):
    (first / "run.json").write_text(json.dumps(json.loads((first / "run.json").read_text()) | {"tiny": True}))
    with pytest.raises(RunError, match="was a tiny run"):
        promotion.promote("first")


def test_unfinished_and_altered_runs_are_not_promoted(first):
    with (first / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(Exception, match="was altered"):
        promotion.promote("first")
    (first / "run.json").write_text(json.dumps(json.loads((first / "run.json").read_text()) | {"state": "stopped"}))
    with pytest.raises(RunError, match="Only a finished run"):
        promotion.promote("first")
    assert promotion.last_promotion() is None


def test_the_default_reads_a_runs_held_out_cells_of_subjects_new_to_it(first, drawn_cells, tmp_path):
    """What both then reach is counted cell by cell; 920 is called 20 here, whom the default was trained on."""
    cells = tmp_path / "cells"
    for file in drawn_cells.rglob("*.png"):
        (cells / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, cells / file.parent.name / file.name.replace("UID_920_", "UID_20_"))
    table, state = first / "predictions.csv", json.loads((first / "run.json").read_text())
    table.write_text(table.read_text().replace("UID_920_", "UID_20_").replace(",920,", ",20,").replace(",920,", ",20,"))
    (first / "run.json").write_text(json.dumps(state | {"data": str(cells)}))
    with table.open(newline="") as file:
        held = [row for row in csv.DictReader(file) if row["subject"] != "20"]
    told = []
    promotion.read_with_default("first", lambda *done: told.append(done))
    found, engine = promotion.compare_with_default("first"), Engine(find_checkpoint(default_checkpoint()))
    assert (found.cells, found.subjects, found.as_served) == (12, 6, True) and len(held) == 12 and told[-1] == (12, 12)
    files = [cells / ("hem" if "_hem" in row["file"] else "all") / row["file"] for row in held]
    right = [result.call.lower() in result.file for result in score_files(open_paths(files), engine)]
    assert found.figures["accuracy"][0] == pytest.approx(np.mean(right))
    right = [(float(row["p_all"]) >= float(row["threshold"])) == (row["y_true"] == "1") for row in held]
    assert found.figures["accuracy"][1] == pytest.approx(np.mean(right))


def test_the_default_is_not_compared_on_pictures_that_trained_it(first, runs, drawn_cells, tmp_path):
    """The second run holds every cell out, under other names: of these the default, the first one, trained on two folds."""
    shutil.copytree(first, runs / "second")
    promotion.promote("first")
    held = read_predictions(first)["file"]
    rows = ["file,subject,y_true,logit,p_all,threshold,fold"]
    for file in sorted(drawn_cells.rglob("*.png")):
        name = file.name.replace("UID_", "UID_7").replace("UID_7H", "UID_H7")
        (tmp_path / "lab" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "lab" / file.parent.name / name)
        rows.append(f"{name},{name.split('_')[1]},{int('_all' in name)},0,0.5,0.5,fold_0")
    (runs / "second" / "predictions.csv").write_text("\n".join(rows))
    state = json.loads((runs / "second" / "run.json").read_text())
    (runs / "second" / "run.json").write_text(json.dumps(state | {"data": str(tmp_path / "lab")}))
    promotion.read_with_default("second")
    trained = find_checkpoint(default_checkpoint()).trained_on
    found = read_predictions(promotion._read_by(find_checkpoint(default_checkpoint()).card, runs / "second"))
    assert not trained.keys() & set(found["cell_hash"]) and set(read_predictions(first)["cell_hash"]) <= set(found["cell_hash"])
    assert len(held) <= len(found["file"]) < 40 and promotion.compare_with_default("second").cells == len(found["file"])


def test_the_default_reads_what_the_run_calls_so_whatever_lies_beside_it(first, drawn_cells, tmp_path):
    """Cells of one name in several folders are called by these, as far as they can be read: by the run, and so here."""
    rows, kept = ["file,subject,cell_hash,y_true,logit,p_all,threshold,fold"], {}
    for file in sorted(drawn_cells.rglob("*.png")):
        _, subject, _, cell, label = file.stem.split("_")
        day = 1 if int(subject[-1]) < 5 else 2
        place = Path(f"day{day}/{label}/LAB-{subject}/slide{cell}/001.png")
        (tmp_path / "lab" / place).parent.mkdir(parents=True)
        shutil.copy(file, tmp_path / "lab" / place)
        if day == 1:
            kept[place.as_posix()] = f"LAB-{subject}", label
    for place in [place for place in kept if "3/slide2" in place]:  # then the other one of this subject has a name of its own
        (tmp_path / "lab" / place).write_bytes(b"damaged")
        kept.pop(place)
        subject, label = kept.pop(place.replace("slide2", "slide1"))
        rows.append(f"001.png,{subject},,{int(label == 'all')},0,0.5,0.5,fold_0")
    rows += [f"{place},{subject},,{int(label == 'all')},0,0.5,0.5,fold_0" for place, (subject, label) in kept.items()]
    (first / "predictions.csv").write_text("\n".join(rows))
    state = json.loads((first / "run.json").read_text())
    (first / "run.json").write_text(json.dumps(state | {"data": str(tmp_path / "lab")}))
    promotion.read_with_default("first")
    assert promotion.compare_with_default("first").cells == len(rows) - 1 == 18


def test_what_is_gone_or_of_one_class_is_not_compared(first, drawn_cells, tmp_path):
    state = json.loads((first / "run.json").read_text())
    held = set(read_predictions(first)["file"])
    for file in drawn_cells.rglob("*.png"):
        if (file.name in held) == (file.parent.name == "all"):  # of the held-out cells the ALL cells alone are left
            (tmp_path / "few" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "few" / file.parent.name)
    for data, error, said in (
        (tmp_path / "few", RunError, "the rest is not of both classes"),
        (tmp_path / "moved", DataError, "is no folder"),
    ):
        (first / "run.json").write_text(json.dumps(state | {"data": str(data)}))
        with pytest.raises(error, match=said):
            promotion.read_with_default("first")
    assert promotion.compare_with_default("first").figures == {} and not (first / "read_by").exists()


def test_networks_are_compared_on_the_cells_both_held_out(first, runs):
    assert promotion.compare_with_default("first").figures == {}  # the bundled ones never saw drawn cells
    shutil.copytree(first, runs / "second")
    promotion.promote("first")
    with (runs / "second" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:  # the second knows every cell
        row["logit"] = "9" if row["y_true"] == "1" else "-9"
    with (runs / "second" / "predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[1:])
    found = promotion.compare_with_default("second")
    assert (found.cells, found.subjects) == (len(rows) - 1, len({row["subject"] for row in rows[1:]}))
    for old, new, (gap, low, high) in found.figures.values():
        assert new == 1 and gap == pytest.approx(1 - old, abs=1e-4) and low <= gap <= high
