"""Checkpoints on other cells, and runs beside each other."""

import csv
import shutil

import numpy as np
import pytest

from inference.gate import MEASURES
from model_zoo import Card, load_checkpoint
from training.__main__ import main
from training.compare import compare, evaluate, read_predictions, shared_cells
from training.errors import DataError, RunError


@pytest.fixture
def shelf(tiny_checkpoint, tmp_path):
    """shelf(name, subjects, **predictions): a copy of the tiny checkpoint, trained on `subjects`, with held-out predictions."""

    def make(name, subjects=("20",), *, files=(), p_all=(), y_true=(), **known):
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint, folder)
        card = Card.read(folder / "card.json")
        fields = card.__dict__ | {"name": name, "data": card.data | {"training_subjects": list(subjects)} | known}
        Card(**fields).write(folder / "card.json")
        with (folder / "predictions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "subject", "y_true", "logit", "p_all"])
            writer.writerows([f, f.split("_")[1], y, 0.0, p] for f, p, y in zip(files, p_all, y_true, strict=True))
        return folder

    return make


def test_evaluate_leaves_out_subjects_that_trained_it(shelf, data, tmp_path):
    said = evaluate(shelf("net", ["20", "H21"]), data, out=tmp_path / "out.csv")
    assert "left out: 6 cells of 3 subjects" in said and "20, 21, H21" in said and "auroc" in said
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    # 21 shares pictures with 20, which trained the network
    assert len(rows) == 34 and not {"20", "21", "H21"} & {row["subject"] for row in rows}
    assert "UID_99_1_1_all.png" in said  # the damaged one is named
    assert "carry a note" not in said
    known = {name: {"cell": [0, 1e-9], "person": [0, 1e-9]} for name in MEASURES}
    assert "carry a note: 34 of 34 cells; first: all/UID_22_1_1_all.png: diameter" in evaluate(
        shelf("strict", ["20", "H21"], usual=known), data
    )


def test_evaluate_refuses_where_nothing_is_unseen(shelf, data, tiny_checkpoint):
    everyone = [f"{h}{i}" for h in ("", "H") for i in range(20, 30)] + ["99"]
    with pytest.raises(DataError, match="trained on every subject"):
        evaluate(shelf("all", everyone), data)
    with pytest.raises(DataError, match="does not say which subjects"):
        evaluate(tiny_checkpoint, data)


def test_evaluate_leaves_out_whoever_shares_pictures_even_if_that_subject_is_elsewhere(shelf, data, tmp_path):
    for file in data.rglob("UID_*_1_1_*.png"):
        if "UID_20_" not in file.name:
            (tmp_path / "cells" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "cells" / file.parent.name)
    assert "subjects that trained it, or share pictures with one that did: 21\n" in evaluate(
        shelf("net", ["20"]), tmp_path / "cells"
    )


def test_evaluate_says_that_nothing_could_be_read(shelf, tmp_path):
    for label, subject in (("all", "1"), ("hem", "H1")):
        (tmp_path / label).mkdir()
        (tmp_path / label / f"UID_{subject}_1_1_{label}.bmp").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"None of the 2 cells could be read. First: all/UID_1_1_1_all\.bmp: "):
        evaluate(shelf("net", ["99"]), tmp_path)


def test_compare_measures_the_difference_on_shared_cells(shelf):
    files = [
        f"UID_{s}_1_{i}_{'hem' if s.startswith('H') else 'all'}.bmp" for s in ("1", "2", "3", "H1", "H2", "H3") for i in (1, 2)
    ]
    y_true = np.array([0 if "hem" in f else 1 for f in files])
    good, bad = np.where(y_true == 1, 0.9, 0.1), np.full(len(files), 0.5)
    a = shelf("a", files=files[:-1], p_all=bad[:-1], y_true=y_true[:-1])
    b = shelf("b", files=files[::-1], p_all=good[::-1], y_true=y_true[::-1])
    shared = shared_cells(a, b)
    assert len(shared["y_true"]) == 11 and (shared["p_b"] == np.where(shared["y_true"] == 1, 0.9, 0.1)).all()
    said = compare([a, b])
    assert "b minus a on 11 shared held-out cells" in said and "auroc                +0.500 (+0.500 to +0.500)" in said
    c = shelf("c", files=["UID_9_1_1_all.bmp"], p_all=[0.5], y_true=[1])
    assert "share no held-out cells" in compare([a, c])


def test_cells_of_one_name_in_two_folders_are_two(shelf):
    files = ["day1/UID_1_1_1_all.bmp", "day2/UID_1_1_1_all.bmp", "UID_H1_1_1_hem.bmp"]
    a = shelf("a", files=files, p_all=[0.1, 0.2, 0.3], y_true=[1, 1, 0])
    b = shelf("b", files=[f.replace(".bmp", ".png") for f in files[::-1]], p_all=[0.3, 0.2, 0.1], y_true=[0, 1, 1])
    shared = shared_cells(a, b)
    assert sorted(shared["p_a"]) == [0.1, 0.2, 0.3] and (shared["p_a"] == shared["p_b"]).all()


def test_folder_without_predictions_is_told(tmp_path, tiny_checkpoint, capsys):
    with pytest.raises(RunError, match="no held-out predictions"):
        read_predictions(tmp_path)
    assert main(["compare", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_evaluate_command(shelf, data, capsys):
    folder = shelf("net", ["20"])
    assert main(["evaluate", str(folder), "--data", str(data), "--rotations", "8"]) == 0
    assert "8 rotation(s)" in capsys.readouterr().out
    assert load_checkpoint(folder).card.rotations == 1
