"""Checkpoints on other cells, and runs beside each other."""

import csv
import shutil

import numpy as np
import pytest

from inference.gate import MEASURES
from model_zoo import Card, load_checkpoint
from training.__main__ import main
from training.compare import compare, evaluate, read_predictions, shared_cells
from training.data import index_cells, verify_cells
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
            writer.writerow(["file", "subject", "y_true", "logit", "p_all", "threshold", "fold"])
            for f, p, y in zip(files, np.asarray(p_all), y_true, strict=True):
                writer.writerow([f, f.split("_")[1], y, card.temperature * np.log(p / (1 - p)), p, 0.5, "fold_0"])
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
    assert "carry a note" not in said and "Passed over" not in said
    littered = shutil.copytree(data, tmp_path / "littered")
    (littered / "stray.png").write_bytes(b"")
    assert "Passed over: 1 image without a label" in evaluate(shelf("again", ["20", "H21"]), littered)
    known = {name: {"cell": [0, 1e-9], "person": [0, 1e-9]} for name in MEASURES}
    assert "carry a note: 34 of 34 cells; first: all/UID_22_1_1_all.png: diameter" in evaluate(
        shelf("strict", ["20", "H21"], usual=known), data
    )


def test_evaluate_refuses_where_nothing_is_unseen(shelf, data, tiny_checkpoint):
    everyone = [f"{h}{i}" for h in ("", "H") for i in range(20, 30)] + ["99"]
    with pytest.raises(DataError, match="has the id of one that trained"):
        evaluate(shelf("all", everyone), data)
    with pytest.raises(DataError, match="does not say which subjects"):
        evaluate(tiny_checkpoint, data)


def test_evaluate_leaves_out_whoever_shares_pictures_even_if_that_subject_is_elsewhere(shelf, data, tmp_path):
    for file in data.rglob("UID_*_1_1_*.png"):
        if "UID_20_" not in file.name:
            (tmp_path / "cells" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "cells" / file.parent.name)
    said = evaluate(shelf("net", ["20"]), tmp_path / "cells")
    assert "of 1 subjects with the id of one that trained it, or that shares pictures with such: 21. " in said


def test_nobody_is_left_out_by_name_where_the_subjects_are_said_to_be_other_people(shelf, data, capsys):
    everyone = [f"{h}{i}" for h in ("", "H") for i in range(20, 30)] + ["99"]
    folder = shelf("net", everyone)
    assert main(["evaluate", str(folder), "--data", str(data), "--other-people"]) == 0
    said = capsys.readouterr().out
    assert "on 20 ALL cells of 10, 20 HEM cells of 10 subjects" in said and "left out" not in said
    assert said.startswith("said to be other people than those that trained it, though they have their ids: 20, 21")


def test_subjects_whose_pictures_trained_it_are_left_out_whatever_they_are_called(shelf, data, tmp_path):
    """Also where they are said to be other people: the very pictures cannot be theirs."""
    cells, _ = verify_cells(index_cells(data), cache=tmp_path)
    hashes = {file.name: found for file, found in zip(cells.files, cells.hashes, strict=True)}
    folder = shelf("net", ["X1"])
    (folder / "trained_on.txt").write_text(f"{hashes['UID_22_1_1_all.png']}\n")
    for other_people in (False, True):
        said = evaluate(folder, data, out=tmp_path / "out.csv", other_people=other_people)
        assert "left out: 2 cells of subjects whose pictures took part in its training: 22" in said
        with (tmp_path / "out.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 38 and "22" not in {row["subject"] for row in rows}
    (folder / "trained_on.txt").write_text("\n".join(hashes.values()))
    with pytest.raises(DataError, match=r"Pictures of every subject of .* took part"):
        evaluate(folder, data)


def test_two_ids_of_one_picture_are_one_group_and_said(shelf, data, tmp_path):
    """Intervals are those of the persons there are: of subjects copied under second ids, as of the subjects."""
    for file in data.glob("*/UID_*_1_[12]_*.png"):
        for folder in (tmp_path / "once", tmp_path / "twice"):
            (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.parent.name)
        shutil.copy(file, tmp_path / "twice" / file.parent.name / file.name.replace("UID_", "UID_7").replace("7H", "H7"))
    once, twice = (evaluate(shelf(f"net {name}", ["X1"]), tmp_path / name) for name in ("once", "twice"))
    assert "share" in twice and "they are one group" in twice
    auroc = [next(line for line in said.splitlines() if line.startswith("  auroc")) for said in (once, twice)]
    assert auroc[0] == auroc[1]


def test_of_one_class_alone_only_that_is_measured(shelf, data):
    said = evaluate(shelf("net", [str(i) for i in range(20, 30)] + ["99"]), data)  # the ALL subjects
    assert "on 0 ALL cells of 0, 20 HEM cells of 10 subjects" in said and "cells of one class alone" in said
    assert "  accuracy " in said and "nan" not in said and "f1" not in said


def test_figures_that_cannot_be_kept_are_not_measured(shelf, data, tmp_path, capsys):
    gone = tmp_path / "missing" / "x.csv"
    assert main(["evaluate", str(shelf("net")), "--data", str(data), "--out", str(gone)]) == 2
    assert f"{gone.parent} is no folder" in capsys.readouterr().err


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
    shared, subjects = shared_cells(a, b)
    assert len(shared["y_true"]) == 11 and subjects == 6
    assert shared["groups"].tolist() == [f.split("_")[1] for f in files[:-1]]  # a file of before has no groups
    np.testing.assert_allclose(shared["p_b"], np.where(shared["y_true"] == 1, 0.9, 0.1))
    said = compare([a, b])
    assert "b minus a on 11 shared held-out cells" in said and "auroc                +0.500 (+0.500 to +0.500)" in said
    c = shelf("c", files=["UID_9_1_1_all.bmp"], p_all=[0.5], y_true=[1])
    assert "share no held-out cells" in compare([a, c])


def test_a_difference_is_of_groups_drawn_again(shelf):
    """With H1 and H2 one group, H3 and H4 another like it, and ALL subjects alike, every draw measures the same."""
    files = [f"UID_{s}_1_1_{'hem' if 'H' in s else 'all'}.bmp" for s in ("1", "2", "H1", "H2", "H3", "H4")]
    y_true = [1, 1, 0, 0, 0, 0]
    a = shelf("a", files=files, p_all=[0.6, 0.6, 0.7, 0.1, 0.7, 0.1], y_true=y_true)
    b = shelf("b", files=files, p_all=[0.9, 0.9, 0.1, 0.2, 0.1, 0.2], y_true=y_true)
    apart = compare([a, b])
    table = (a / "predictions.csv").read_text().splitlines()
    columns = [row.split(",") for row in table]
    groups = ("group", "1", "2", "H1+H2", "H1+H2", "H3+H4", "H3+H4")
    grouped = [[row[0], row[1], group, *row[2:]] for row, group in zip(columns, groups, strict=True)]
    (a / "predictions.csv").write_text("\n".join(map(",".join, grouped)) + "\n")
    assert "auroc                +0.500 (+0.000 to +1.000)" in apart
    assert "auroc                +0.500 (+0.500 to +0.500)" in compare([a, b])
    assert "auroc                -0.500 (-0.500 to -0.500)" in compare([b, a])  # whichever knows of it


def test_cells_of_one_name_in_two_folders_are_two(shelf):
    files = ["day1/UID_1_1_1_all.bmp", "day2/UID_1_1_1_all.bmp", "UID_H1_1_1_hem.bmp"]
    a = shelf("a", files=files, p_all=[0.1, 0.2, 0.3], y_true=[1, 1, 0])
    b = shelf("b", files=[f.replace(".bmp", ".png") for f in files[::-1]], p_all=[0.3, 0.2, 0.1], y_true=[0, 1, 1])
    shared, _ = shared_cells(a, b)
    assert sorted(shared["p_a"]) == pytest.approx([0.1, 0.2, 0.3]) and (shared["p_a"] == shared["p_b"]).all()


def test_folder_without_predictions_is_told(tmp_path, tiny_checkpoint, capsys):
    with pytest.raises(RunError, match="no held-out predictions"):
        read_predictions(tmp_path)
    assert main(["compare", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_run_that_has_not_finished_is_not_compared(shelf, capsys):
    begun = shelf("begun")
    (begun / "card.json").rename(begun / "run.json")
    assert main(["compare", str(shelf("net")), str(begun)]) == 2
    assert f"The run in {begun} has not finished" in capsys.readouterr().err


def test_evaluate_command(shelf, data, capsys):
    folder = shelf("net", ["20"])
    assert main(["evaluate", str(folder), "--data", str(data), "--rotations", "8"]) == 0
    assert "8 rotation(s)" in capsys.readouterr().out
    assert load_checkpoint(folder).card.rotations == 1
