import csv
import shutil
from pathlib import Path

import pytest

from inference.__main__ import main
from inference.cells import score_files
from inference.images import decode_image, frame_cell
from inference.sources import open_paths
from inference.table import COLUMNS, MADE_BY, app_version


@pytest.fixture
def folder(tmp_path, draw_cell, encode):
    for patient in ("P1", "P2"):
        (tmp_path / "case" / patient).mkdir(parents=True)
        for i in range(3):
            name = "=HYPERLINK(A1).png" if i == 2 else f"{i}.png"
            (tmp_path / "case" / patient / name).write_bytes(
                encode(draw_cell(i, axes=(120 + 40 * i, 150)), "PNG", compress_level=1)
            )
    return tmp_path / "case"


def run(tiny_checkpoint, *arguments):
    return main([*map(str, arguments), "--checkpoint", str(tiny_checkpoint)])


def rows(file):
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_scores_every_cell_as_the_engine_does(folder, tmp_path, tiny_checkpoint, tiny_engine):
    assert run(tiny_checkpoint, folder, "-o", tmp_path / "out.csv") == 0
    table = rows(tmp_path / "out.csv")
    assert len(table) == 6 and tuple(table[0]) == (*COLUMNS, *MADE_BY)
    card = tiny_engine.card
    made = ["tiny", card.weights_sha256[:16], "0.5", "1", app_version(), "research and education; not a medical device"]
    assert all([row[name] for name in MADE_BY] == made for row in table)
    assert app_version() in (Path(__file__).parents[2] / "CHANGELOG.md").read_text("utf-8")
    assert [row["patient"] for row in table] == ["case / P1"] * 3 + ["case / P2"] * 3
    for row in table:
        image, _ = decode_image((folder.parent / row["file"]).read_bytes(), name=row["file"])
        p_all = tiny_engine.predict(frame_cell(image, tiny_engine.card.framing)[None])[0][0]
        assert float(row["p_all"]) == pytest.approx(float(p_all), abs=1e-6)
        assert row["call"] == ("ALL" if p_all >= tiny_engine.card.threshold else "HEM") and row["note"] == ""


def test_what_trained_the_network_is_told(folder, tmp_path, tiny_checkpoint, tiny_engine, capsys):
    known = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    result = next(iter(score_files(open_paths([folder / "P1" / "0.png"]), tiny_engine)))
    (known / "trained_on.txt").write_text(result.hash)
    assert run(known, folder, "-o", tmp_path / "out.csv") == 0
    notes = {row["file"]: row["note"] for row in rows(tmp_path / "out.csv")}
    told = "this cell took part in the network's training, so its P(ALL) says nothing of new patients"
    assert notes == {name: told if name.endswith("0.png") else "" for name in notes} and len(notes) == 6
    assert "2 of these took part in its training" in capsys.readouterr().err  # P2 holds the same picture


def test_rotations_are_averaged_and_the_note_says_that_the_card_was_measured_otherwise(
    folder, tmp_path, tiny_checkpoint, tiny_engine
):
    (folder / "P1" / "notes.txt").write_text("Monday")
    assert run(tiny_checkpoint, folder, "-o", tmp_path / "out.csv", "--rotations", 8) == 1
    for row in rows(tmp_path / "out.csv"):
        if row["call"] == "refused":
            assert "rotations" not in row["note"]
            continue
        image, _ = decode_image((folder.parent / row["file"]).read_bytes(), name=row["file"])
        p_all = tiny_engine.over(8).predict(frame_cell(image, tiny_engine.card.framing)[None])[0][0]
        assert float(row["p_all"]) == pytest.approx(float(p_all), abs=1e-6)
        assert row["note"] == tiny_engine.over(8).remark != ""
    with pytest.raises(SystemExit):
        run(tiny_checkpoint, folder, "-o", tmp_path / "out.csv", "--rotations", 3)


def test_refused_files_are_rows_and_exit_status_1(folder, tmp_path, tiny_checkpoint):
    (folder / "P1" / "notes.txt").write_text("Monday")
    assert run(tiny_checkpoint, folder, "-o", tmp_path / "out.csv") == 1
    (refused,) = [row for row in rows(tmp_path / "out.csv") if row["call"] == "refused"]
    assert refused["file"] == "case/P1/notes.txt" and refused["p_all"] == "" and "not an image" in refused["note"]


def test_formulas_are_made_inert(folder, tmp_path, tiny_checkpoint):
    assert run(tiny_checkpoint, folder / "P1" / "=HYPERLINK(A1).png", "-o", tmp_path / "out.csv") == 0
    (row,) = rows(tmp_path / "out.csv")
    assert row["file"] == "'=HYPERLINK(A1).png"


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_patients_and_files_that_begin_a_formula_are_quoted(start, tmp_path, tiny_checkpoint):
    (tmp_path / f"{start}1+1").mkdir()
    (tmp_path / f"{start}1+1" / f"{start}a.png").write_bytes(b"no image")
    assert main([str(tmp_path / f"{start}1+1"), "-o", str(tmp_path / "out.csv"), "--checkpoint", str(tiny_checkpoint)]) == 2
    (row,) = rows(tmp_path / "out.csv")
    assert row["file"] == f"'{start}1+1/{start}a.png" and row["patient"] == f"'{start}1+1"


def test_a_second_run_into_the_same_folder_does_not_read_its_own_table(folder, tiny_checkpoint):
    for _ in range(2):
        assert run(tiny_checkpoint, folder, "-o", folder / "out.csv") == 0
    assert len(rows(folder / "out.csv")) == 6


def test_exit_status_2_where_nothing_could_be_done(folder, tmp_path, tiny_checkpoint, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out.csv"
    assert run(tiny_checkpoint, tmp_path / "nowhere", "-o", out) == 2 and not out.exists()
    assert run(tiny_checkpoint, tmp_path / "empty", "-o", out) == 2
    assert run(tiny_checkpoint, folder, "-o", tmp_path / "no folder" / "out.csv") == 2
    assert main([str(folder), "-o", str(out), "--checkpoint", "nonsense"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4 and "nowhere" in errors[0] and "out.csv" in errors[2] and "nonsense" in errors[3]


def test_help_names_the_exit_states(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "Exit status" in capsys.readouterr().out
