"""Every page, run by Streamlit's own test harness on real cells and on bad ones."""

import copy
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from inference.cells import CellResult
from inference.images import LOSSY
from inference.patients import summarize_patient
from inference.sources import open_files
from model_zoo import default_checkpoint, find_checkpoint
from ui import components, resources, state

APP = str(Path(__file__).parents[2] / "app.py")
PAGES = ("case", "explain", "layers", "models")


@pytest.fixture
def app():
    return AppTest.from_file(APP, default_timeout=300).run()


@pytest.fixture
def cells(data_root):
    """(name, bytes, mime) of 22 real cells of an ALL subject and 22 of a HEM subject."""
    fold = data_root / "cnmc" / "fold_0"
    files = sorted(fold.glob("all/UID_11_*"))[:22] + sorted(fold.glob("hem/UID_H12_*"))[:22]
    return [(f.name, f.read_bytes(), "image/webp") for f in files]


def words(app) -> str:
    return "\n".join(str(e.value) for kind in (app.markdown, app.caption, app.info) for e in kind)


def box(elements, label):
    return next(e for e in elements if e.label.startswith(label))


def described(app) -> list[str]:
    """The alternative text of every picture."""
    return [picture.alt for image in app.get("image") for picture in image.proto.imgs]


def upload(app, files):
    app.file_uploader[0].set_value(files).run()
    assert not app.exception
    return app


@pytest.mark.parametrize("page", PAGES)
def test_every_page_survives_an_empty_case(app, page):
    assert "not a medical device" in words(app)  # of app.py; AppTest runs a page without it
    app.switch_page(f"pages/{page}.py").run()
    assert not app.exception
    if page in ("explain", "layers"):
        assert "Drop cells on the Case page" in words(app)


def test_case_shows_a_patient_card_a_table_and_refusals(app, cells):
    bad = [("broken.png", b"\x89PNG\r\n\x1a\n garbage", "image/png"), ("empty.bmp", b"", "image/bmp")]
    upload(app, [*cells, *bad])
    refused, table = (d.value for d in app.dataframe)
    assert set(refused["file"]) == {"broken.png", "empty.bmp"}
    assert "0 bytes" in " ".join(refused["reason"])
    titles = [line for line in words(app).splitlines() if line.startswith("#####")]
    assert titles == [f"##### Patient: {name}" for name in ("11", "H12")]
    assert "No cell could be read of: unnamed patient." in words(app)
    assert len(table) == 44
    assert table["P(ALL)"].between(0, 1).all()
    assert table["P(ALL)"].is_monotonic_decreasing
    assert "of 22 cells called ALL" in words(app)
    assert "not a marrow differential" in words(app)


def test_cells_that_trained_the_network_are_told_with_what_they_read_when_held_out(app, cells, draw_cell, encode):
    """Whatever they are called: of the patient's 23 cells one is new to it."""
    drawn = ("new/cell.png", encode(draw_cell(canvas=(250, 250)), "PNG"), "image/png")
    upload(app, [*((f"new/{i}.webp", data, mime) for i, (_, data, mime) in enumerate(cells[:22])), drawn])
    folder = find_checkpoint(default_checkpoint()).path  # its folds have one operating point
    unseen, names = resources.held_out(folder), [name for name, *_ in cells[:22]]
    found = summarize_patient(unseen["p_all"][[list(unseen["file"]).index(name) for name in names]], resources.cards()[0])
    told = "**22 of 23 cells took part in this network's training**, so this says less of new patients. Held out of it: "
    assert f"{told}{found.called} of 22 called ALL." in words(app)
    table = app.dataframe[0].value
    known = table["in training"].str.fullmatch(r"yes; held out [<>]?[01]\.\d{3}")
    assert known.sum() == 22 and not table["note"][known].any()
    app.switch_page("pages/explain.py").run()
    assert ("**Not new to it:** this cell took part in" in words(app)) == ("cell.png" not in words(app))


def test_many_patients_stand_in_a_table(app, cells):
    upload(app, [(f"{'ABCDE'[i // 2]}/{i}.webp", data, mime) for i, (_, data, mime) in enumerate(cells[:10])])
    patients = app.dataframe[0].value
    assert list(patients["patient"]) == list("ABCDE")
    assert list(patients["cells"]) == list(patients["in training"]) == [2] * 5
    assert set(patients["answer"]) == {"indeterminate"}
    assert patients["why"].str.len().min() > 20 and "In training: cells that" in words(app)
    for caveat in ("not a marrow differential. Flow cytometry decides", "allows for how much persons differ"):
        assert caveat in words(app)
    next(s for s in app.selectbox if s.label == "Patient").set_value("D").run()
    assert "##### Patient: D" in words(app) and "##### Patient: A" not in words(app)
    assert "too few to answer" in words(app)


def test_sorting_and_filtering_change_what_is_shown(app, cells):
    upload(app, cells)
    next(s for s in app.selectbox if s.label == "Sort").set_value("P(ALL), low first").run()
    assert app.dataframe[-1].value["P(ALL)"].is_monotonic_increasing
    next(g for g in app.segmented_control if g.label == "Show").set_value("Called HEM").run()
    assert not app.exception
    assert set(app.dataframe[-1].value["call"]) <= {"HEM"}
    next(s for s in app.selectbox if s.label == "Patient").set_value("H12").run()
    assert set(app.dataframe[-1].value["patient"]) <= {"H12"}


def test_another_network_scores_the_same_cells_again(app, cells):
    upload(app, cells[:6])
    before = app.dataframe[-1].value.set_index("file")["P(ALL)"]
    network = next(s for s in app.selectbox if s.label == "Network")
    first = network.value
    network.set_value(next(name for name in ("mobilenet_v2", "efficientnet_b3_pooled") if name != first)).run()
    assert not app.exception
    after = app.dataframe[-1].value.set_index("file")["P(ALL)"]
    assert set(after.index) == set(before.index)
    assert (after != before[after.index]).all()
    next(s for s in app.selectbox if s.label == "Network").set_value(first).run()
    again = app.dataframe[-1].value.set_index("file")["P(ALL)"]
    assert again[before.index].to_list() == before.to_list()  # from the kept windows: to the last bit


def test_averaging_over_rotations_scores_again_and_says_that_the_card_was_measured_otherwise(app, cells):
    upload(app, cells[:4])
    before = app.dataframe[-1].value.set_index("file")["P(ALL)"]
    box = next(c for c in app.checkbox if c.label.startswith("Average over 8 rotations"))
    assert not box.value and "rotations" not in words(app)
    box.check().run()
    assert not app.exception
    assert "averaged over 8 rotations; the figures on the network's card were measured without" in words(app)
    after = app.dataframe[-1].value.set_index("file")["P(ALL)"]
    assert set(after.index) == set(before.index) and (after != before[after.index]).all()
    app.switch_page("pages/explain.py").run()
    assert not app.exception and "averaged over 8 rotations" in words(app)
    app.switch_page("pages/case.py").run()
    box = next(c for c in app.checkbox if c.label.startswith("Average over 8 rotations"))
    assert box.value
    box.uncheck().run()
    again = app.dataframe[-1].value.set_index("file")["P(ALL)"]
    assert again[before.index].to_list() == before.to_list() and "rotations" not in words(app)


def test_csv_says_over_how_many_rotations(tiny_engine):
    import csv

    cells = [
        CellResult(file="a.png", patient="P", p_all=0.7, call="ALL", note="odd"),
        CellResult(file="b.png", patient="P", p_all=None, call="refused", note="no cell"),
    ]
    for engine, notes in (
        (tiny_engine, ["odd", "no cell"]),
        (tiny_engine.over(8), [f"odd; {tiny_engine.over(8).remark}", "no cell"]),
    ):
        rows = list(csv.DictReader(io.StringIO(components.to_csv(cells, engine).decode("utf-8-sig"))))
        assert [row["note"] for row in rows] == notes
        assert {row["rotations"] for row in rows} == {str(engine.rotations)} and rows[0]["checkpoint"] == "tiny"
        assert rows[0]["app_version"] and rows[0]["use"] == "research and education; not a medical device"


def test_explain_shows_a_map_and_its_resolution(app, cells):
    upload(app, cells[:3])
    app.switch_page("pages/explain.py").run()
    assert not app.exception
    assert "P(ALL)" in words(app)
    assert "Grad-CAM" in words(app)
    assert "values, enlarged" in words(app)
    assert "of the map lies on the cell" in words(app) or "The map is empty" in words(app)
    assert len(app.get("image")) == 4
    assert all(described(app))
    for label in ("ALL", "HEM"):
        box(app.segmented_control, "Show what speaks for").set_value(label).run()
        assert f"left: nothing that speaks for {label} ·" in words(app)


def test_layers_walks_and_tells_shares(app, cells):
    upload(app, cells[:1])
    app.switch_page("pages/layers.py").run()
    assert not app.exception
    layer = next(s for s in app.selectbox if s.label.startswith("Layer"))
    first = layer.value
    next(b for b in app.button if b.label == "Next layer").click().run()
    assert next(s for s in app.selectbox if s.label.startswith("Layer")).value != first
    assert "exactly zero" in words(app)
    assert len(described(app)) == 3 and all(described(app))
    table = app.dataframe[-1].value
    assert {"layer", "type", "output", "parameters", "from"} == set(table.columns)
    assert "logit" in set(table["layer"])


def test_demo_patients_are_scored_and_labelled_synthetic(app):
    next(b for b in app.button if b.label == "Try the demo patients").click().run()
    assert not app.exception
    assert "synthetic" in words(app)
    assert len(app.dataframe[-1].value) >= 100
    assert all("synthetic" in p for p in app.dataframe[-1].value["patient"])


def test_new_case_forgets_the_cells(app, cells):
    upload(app, cells[:2])
    next(b for b in app.button if b.label == "New case").click().run()
    assert not app.exception
    assert not app.dataframe
    app.switch_page("pages/explain.py").run()
    assert "Drop cells on the Case page" in words(app)


def test_a_zip_gives_its_cells_by_folder(app, cells):
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, (_, data, _) in enumerate(cells[:4]):
            archive.writestr(f"Anna/cell {i}.webp", data)
        archive.writestr("../evil.webp", cells[0][1])
    upload(app, [("ward.zip", buffer.getvalue(), "application/zip")])
    assert list(app.dataframe[-1].value["patient"]) == ["ward / Anna"] * 4
    assert "outside the ZIP" in app.dataframe[0].value["reason"][0]


def test_only_bad_files_leave_a_page_that_says_so(app):
    buffer = io.BytesIO()
    Image.new("RGB", (450, 450)).save(buffer, "PNG")
    upload(app, [("black.png", buffer.getvalue(), "image/png")])
    assert "no cell" in app.dataframe[0].value["reason"][0] and "**No cell could be read**" in words(app)


def test_a_patient_whose_every_file_was_refused_stays_in_the_table(app, cells):
    files = [(f"{'ABCD'[i // 2]}/{i}.webp", data, mime) for i, (_, data, mime) in enumerate(cells[:8])]
    upload(app, [*files, ("E/broken.png", b"broken", "image/png"), ("A/broken.png", b"broken", "image/png")])
    table = app.dataframe[1].value.set_index("patient")
    assert dict(table["cells"]) == {"A": 2, "B": 2, "C": 2, "D": 2, "E": 0}
    assert dict(table["files refused"]) == {"A": 1, "B": 0, "C": 0, "D": 0, "E": 1}
    assert table["answer"]["E"] == "no cell could be read"
    box(app.selectbox, "Patient").set_value("E").run()
    assert not app.exception
    assert "##### Patient: E" in words(app) and "**No cell could be read**" in words(app)


def test_stray_files_are_no_patients_for_whom_the_cards_would_give_way(app, cells):
    files = [(f"{'ABC'[i // 2]}/{i}.webp", data, mime) for i, (_, data, mime) in enumerate(cells[:6])]
    upload(app, [*files, ("ward/notes.txt", b"notes", "text/plain"), ("results.xlsx", b"PK", "")])
    headings = [line for line in words(app).splitlines() if line.startswith("##### Patient")]
    assert headings == ["##### Patient: A", "##### Patient: B", "##### Patient: C"]
    assert "No cell could be read of: ward, unnamed patient." in words(app)


def test_notes_stand_on_the_card_and_most_of_them_leave_no_answer(app, cells):
    def cut(data: bytes) -> bytes:
        """A cell that the picture's edge cuts off."""
        buffer = io.BytesIO()
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        left, _, right, _ = picture.getbbox()
        picture.crop((0, 0, right - (right - left) // 6, picture.height)).save(buffer, "PNG")
        return buffer.getvalue()

    noted = [(f"A/{i}.png", cut(data), "image/png") for i, (_, data, _) in enumerate(cells[:12])]
    upload(app, [*noted, *((f"A/{i}.webp", data, mime) for i, (_, data, mime) in enumerate(cells[12:22]))])
    assert "12 of 22 cells carry a note." in words(app)
    assert "**Indeterminate**" in words(app) and "More than half of the cells carry a note" in words(app)


def test_a_note_on_lossy_compression_is_counted_but_leaves_the_answer(make_card):
    def patient(note):
        row = {"file": "a.png", "patient": "A", "p_all": 0.99, "call": "ALL", "measures": (200.0, 0.67, 0.283, 0.252)}
        return state.Patient(cells=[CellResult(**row, note=note) for _ in range(40)], refused=1)

    answers = {note: components.summarize(patient(note), make_card()).verdict for note in ("", LOSSY, f"{LOSSY}; cut off")}
    assert list(answers.values()) == ["consistent with ALL", "consistent with ALL", "indeterminate"]
    assert components.remarks_on(patient(LOSSY)) == "40 of 40 cells carry a note; 1 file refused."
    assert components.remarks_on(state.Patient(cells=patient("").cells)) == ""


def test_a_patients_cells_at_another_magnification_are_said_on_the_card(make_card, usual):
    row = {"file": "a.png", "patient": "A", "p_all": 0.01, "call": "HEM", "note": "", "measures": (115, 0.67, 0.283, 0.252)}
    summary = components.summarize(state.Patient(cells=[CellResult(**row)] * 40), make_card(data={"usual": usual}))
    assert summary.verdict == "indeterminate" and "unusually small (median diameter 115 px)" in summary.reason


def test_cells_held_out_are_counted_as_they_were_called_then_and_once_all_are_read(make_card):
    """A fold's operating point is not the served network's: .4 was called ALL."""
    cell = CellResult(file="1", patient="P", p_all=0.1, call="HEM", note="", trained=True, measures=(150.0, 0.3, 0.3, 0.3))
    cells = [replace(cell, held_out=(0.4, i < 20)) for i in range(25)]
    told = components.trained_by(state.Patient(cells=cells), make_card())
    assert "**All 25 cells took part" in told and "nothing of new patients. Held out of it: 20 of 25 called ALL: " in told
    assert told.endswith("consistent with ALL.")
    allnet = make_card(split=make_card().split | {"seen_unlabelled": ["fold_0"]})
    assert "Held out of it (their labels alone): 20 of 25" in components.trained_by(state.Patient(cells=cells), allnet)
    assert components.trained_by(state.Patient(cells=cells[:1]), make_card()).startswith("**The cell took part")
    assert components.trained_by(state.Patient(cells=cells, waiting=3), make_card()) == ""
    assert components.held_out(state.Patient(cells=cells, waiting=3), make_card()) == "20 of 25 called ALL"
    assert components.trained_by(state.Patient(cells=[replace(cells[0], trained=False)]), make_card()) == ""


def test_there_is_no_answer_before_all_of_a_patients_cells_are_read(make_card):
    row = {"file": "a.png", "patient": "A", "p_all": 0.99, "call": "ALL", "note": "", "measures": (200, 0.67, 0.283, 0.252)}
    cells = [CellResult(**row)] * 40
    read, reading = state.Patient(cells=cells), state.Patient(cells=cells, waiting=1)
    summary = components.summarize(read, make_card())
    assert components.answer(read, summary) == "consistent with ALL" and components.answer(reading, summary) == "reading…"
    assert components.answer(state.Patient(waiting=2), None) == "reading…"


@pytest.fixture
def case(tiny_checkpoint, tiny_engine, monkeypatch):
    """A case outside any session, read by the tiny checkpoint."""
    monkeypatch.setattr(resources, "engine", lambda name, rotations: tiny_engine)
    made = state.Case(checkpoint="tiny")
    yield made
    made.close()


@pytest.fixture
def drop(draw_cell, encode):
    """drop(case, "A/1.png", ...): add drawn cells; the number in a name tells which."""

    def drop(case, *names):
        read = {name: encode(draw_cell(int(re.search(r"\d+", name)[0])), "PNG") for name in names}
        case._enqueue(open_files((name, lambda d=data: d) for name, data in read.items()))

    return drop


def test_the_same_picture_counts_once_and_the_second_says_so(case, drop):
    drop(case, "A/1.png", "A/2.png", "B/1.png", "A/3.png")
    drop(case, "A/2.png")
    while case.waiting:
        case.advance()
    assert [(r.file, r.kept.number) for r in case.scored] == [("A/1.png", 0), ("A/2.png", 1), ("A/3.png", 2)]
    assert [(r.file, r.note) for r in case.refused] == [
        ("B/1.png", "The same picture as A/1.png: counted once."),
        ("A/2.png", "The same picture as A/2.png: counted once."),
    ]
    assert sorted(Path(case.folder.name).iterdir()) == sorted(r.kept.file for r in case.scored)
    assert {name: (len(p.cells), p.refused) for name, p in case.by_patient().items()} == {"A": (3, 1), "B": (0, 1)}


def test_the_same_picture_in_another_format_counts_once(case, draw_cell, encode):
    files = [(f"A/1.{kind}", encode(draw_cell(1), kind)) for kind in ("PNG", "BMP", "TIFF")]
    case._enqueue(open_files((name, lambda d=data: d) for name, data in files))
    case.advance()
    assert [row.file for row in case.scored] == ["A/1.PNG"] and len(case.refused) == 2


def test_the_open_cell_is_read_first_however_often_the_network_changes(case, drop):
    drop(case, *(f"A/{i}.png" for i in range(6)))
    case.advance()
    case.switch("tiny", None)
    case.results.append(case.rescoring.popleft())  # as when a second change comes before all are read again
    case.switch("tiny", 8)
    case.advance(first=4)
    assert [row.kept.number for row in case.results] == [4, 0, 1, 2, 3, 5]


def test_what_cannot_be_read_again_is_a_refused_row_and_the_rest_goes_on(case, drop):
    drop(case, *(f"A/{i}.png" for i in range(6)))
    case.advance()
    case.scored[2].kept.file.unlink()
    case.switch("tiny", None)
    case.advance()
    assert len(case.scored) == 5 and case.by_patient()["A"].refused == 1
    assert [(row.file, row.note) for row in case.refused] == [
        ("A/2.png", "it could not be read again (FileNotFoundError). Add it once more.")
    ]
    drop(case, "A/2.png")
    case.advance()
    assert sorted(row.kept.number for row in case.scored) == [0, 1, 3, 4, 5, 6]


def test_notes_are_those_of_the_network_that_reads_the_cells(case, drop, tiny_engine, make_card, usual):
    drop(case, "A/1.png", "A/2.png")
    case.advance()
    assert [row.note for row in case.scored] == ["", ""]
    known = copy.copy(tiny_engine)
    far = {name: {of: [1e6, 2e6] for of in ranges} for name, ranges in usual.items()}
    known.card = replace(tiny_engine.card, data=tiny_engine.card.data | {"usual": far})
    for engine, note in ((known, "smaller than the training cells"), (tiny_engine, "")):
        resources.engine = lambda name, rotations, engine=engine: engine  # as the fixture does, which takes it back
        case.switch("tiny", None)
        case.advance()
        assert all((note in row.note) if note else not row.note for row in case.scored)


@pytest.fixture
def add(case, draw_cell, encode):
    """add("A/1.png", ...): upload drawn cells and read them; the number tells which. Returns the uploads."""

    class Upload(io.BytesIO):
        def __init__(self, name, file_id):
            super().__init__(encode(draw_cell(int(re.search(r"\d+", name)[0])), "PNG"))
            self.name, self.file_id = name, file_id

    def add(*names, read=True):
        uploads = [Upload(name, f"{len(case.batches)} {name}") for name in names]
        case.add_uploads(uploads)
        while read and case.waiting:
            case.advance()
        return uploads

    return add


def test_what_an_upload_brought_can_be_taken_out_again(case, add):
    _, second, _, copy = add("A/1.png", "A/2.png", "A/3.png", "B/2.png")
    case.switch("tiny", None)
    case.advance()
    _, fifth = add("A/4.png", "A/5.png", read=False)
    case.take_out({second.file_id, fifth.file_id})
    case.add_uploads([second])  # a run that began before still has the old list
    case.advance()
    # the copy that was refused takes the place of the one that is gone
    assert [row.file for row in case.scored] == ["A/1.png", "B/2.png", "A/3.png", "A/4.png"] and case.waiting == 0
    assert case.scored[1].patient == "B" and not case.refused and len(list(Path(case.folder.name).iterdir())) == 4
    case.take_out({copy.file_id})
    assert [row.file for row in case.scored] == ["A/1.png", "A/3.png", "A/4.png"]
    add("B/2.png")
    assert case.scored[-1].file == "B/2.png" and not case.refused


def test_of_two_copies_either_may_be_taken_out(case, add):
    first, second, third = add("A/1.png", "B/1.png", "C/1.png")
    case.take_out({second.file_id})
    assert [row.file for row in case.scored] == ["A/1.png"]
    add("B/1.png")
    case.take_out({first.file_id})
    assert [(row.file, row.patient) for row in case.scored] == [("C/1.png", "C")]
    assert [row.note for row in case.refused] == ["The same picture as C/1.png: counted once."]
    case.switch("tiny", None)
    case.take_out({third.file_id})
    case.advance()
    assert [row.file for row in case.scored] == ["B/1.png"] and not case.refused


def test_what_is_read_or_forgotten_holds_no_bytes(case, add):
    (read,), (waiting,) = add("A/1.png"), add("A/2.png", read=False)
    assert not read.getvalue() and waiting.getvalue()
    case.close()
    assert not waiting.getvalue()


def test_cells_that_join_a_patient_who_was_there_are_told(case, add):
    add("A/1.png", "B/2.png")
    add("C/3.png", read=False)
    add("C/4.png")  # of the same folder, still arriving
    add("B/1.png")  # a copy joins nobody
    assert case.joined == []
    (late,) = add("A/5.png")
    assert case.joined == ["A"]
    case.take_out({late.file_id})
    assert case.joined == []


def test_cells_that_cannot_be_kept_are_refused_rows(case, drop):
    drop(case, "A/1.png")
    case.advance()
    Path(case.folder.name).rename(f"{case.folder.name} is full")
    drop(case, "A/2.png", "A/3.png")
    case.advance()
    Path(f"{case.folder.name} is full").rename(case.folder.name)
    assert case.waiting == 0 and len(case.scored) == 1
    assert all(row.note.startswith("it could not be kept (No such file or directory). Make room") for row in case.refused)
    drop(case, "A/2.png")  # was not counted, so may come again
    case.advance()
    assert [row.file for row in case.scored] == ["A/1.png", "A/2.png"]


def test_cells_and_patients_keep_their_order_when_another_network_reads_them(case, drop):
    names = [f"{patient}/{i}.png" for i, patient in enumerate("CABCAB")]
    drop(case, *names)
    assert [(name, p.waiting) for name, p in case.by_patient().items()] == [("C", 2), ("A", 2), ("B", 2)]
    case.advance()
    case.switch("tiny", 8)
    assert [(name, len(p.cells), p.waiting) for name, p in case.by_patient().items()] == [(n, 0, 2) for n in "CAB"]
    while case.waiting:
        case.advance(first=4)
    assert [row.file for row in case.results] != names and [row.file for row in case.scored] == names
    assert list(case.by_patient()) == ["C", "A", "B"] and case.rotations == 8


def test_windows_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path):
    script = (
        "import time; from pathlib import Path; from ui import state\n"
        f"print(state._hold_folder(Path({str(tmp_path)!r})), flush=True); time.sleep(600)"
    )
    apps = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, living = (Path(app.stdout.readline().strip()) for app in apps)
    strange = tmp_path / "blastoscope-else"
    strange.mkdir()
    (killed / "0.png").write_bytes(b"a window")
    apps[0].send_signal(signal.SIGKILL)
    apps[0].wait()
    for folder in (killed, living, strange):
        os.utime(folder, (time.time() - 60,) * 2)
    mine = state._hold_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living, strange, mine])
    apps[1].kill()
    apps[1].wait()


def test_every_choice_of_a_network_and_of_rotations_counts(app, cells):
    averaged = [box(app.checkbox, "Average").set_value(value).run().checkbox[0].value for value in (True, False, True, False)]
    assert averaged == [True, False, True, False]
    upload(app, cells[:3])
    app.switch_page("pages/explain.py").run()
    for name in ("mobilenet_v2", "mobilenet_v2_pyramid") * 2:
        box(app.selectbox, "Network").set_value(name).run()
        assert not app.exception
        assert box(app.selectbox, "Network").value == name == app.session_state["case"].checkpoint
        called = app.session_state["case"].scored[0].call
        assert box(app.segmented_control, "Show what").value == called and f"Called **{called}**" in words(app)


def test_a_patient_may_have_any_name(app, cells):
    names = ["All patients", "=1+1"]
    upload(app, [(f"{names[i // 2]}/{i}.webp", data, mime) for i, (_, data, mime) in enumerate(cells[:4])])
    assert set(app.dataframe[-1].value["patient"]) == {"All patients", "'=1+1"}
    app.run()
    assert box(app.selectbox, "Patient").value == "" and len(app.dataframe[-1].value) == 4
    box(app.selectbox, "Patient").set_value("All patients").run()
    assert set(app.dataframe[-1].value["patient"]) == {"All patients"}
    assert [line for line in words(app).splitlines() if line.startswith("#####")] == ["##### Patient: All patients"]


def test_cells_go_when_their_tab_has_been_closed_for_long(case, drop, monkeypatch):
    monkeypatch.setattr(state, "_open", {"here": case})
    drop(case, "A/1.png")
    case.advance()
    since = {}
    for active, now in ((True, 0), (False, 100), (False, 240), (True, 300), (False, 400), (False, 540)):
        state._close_gone(lambda session, active=active: active, since, now)
        assert case.scored and Path(case.folder.name).exists()
    state._close_gone(lambda session: False, since, 560)
    assert not case.total and not Path(case.folder.name).exists() and not state._open


def test_choices_survive_another_page(app, cells):
    upload(app, cells[20:24])
    box(app.selectbox, "Sort").set_value("P(ALL), low first").run()
    box(app.segmented_control, "Show").set_value("Called HEM").run()
    box(app.selectbox, "Patient").set_value("H12").run()
    app.switch_page("pages/models.py").run()
    app.switch_page("pages/case.py").run()
    assert not app.exception
    assert box(app.selectbox, "Sort").value == "P(ALL), low first"
    assert box(app.segmented_control, "Show").value == "Called HEM"
    assert box(app.selectbox, "Patient").value == "H12"
    app.switch_page("pages/layers.py").run()
    box(app.button, "Next layer").click().run()
    layer = box(app.selectbox, "Layer").value
    app.switch_page("pages/case.py").run()
    app.switch_page("pages/layers.py").run()
    assert not app.exception and box(app.selectbox, "Layer").value == layer


def test_another_network_keeps_the_rotations(app, cells):
    upload(app, cells[:2])
    box(app.checkbox, "Average").check().run()
    network = box(app.selectbox, "Network")
    network.set_value(next(name for name in ("mobilenet_v2", "efficientnet_b3_pooled") if name != network.value)).run()
    assert not app.exception and box(app.checkbox, "Average").value and app.session_state["case"].rotations == 8


def test_a_cell_chosen_while_others_still_wait_is_shown(app, cells):
    upload(app, cells[:3])
    app.switch_page("pages/explain.py").run()
    reading = app.session_state["case"]
    reading._enqueue(open_files((name, lambda d=data: d) for name, data, _ in cells[3:44]))
    wanted = min(reading.scored, key=lambda row: row.p_all)
    box(app.selectbox, "Cell").set_value(wanted.kept.number).run()  # reads on at first, so that there are more to choose from
    assert not app.exception and len(reading.scored) > 3
    assert box(app.selectbox, "Cell").value == wanted.kept.number
    assert any(wanted.file in image.proto.imgs[0].caption.replace("\\", "") for image in app.get("image"))
    assert not reading.waiting or f"{reading.waiting} cells still to be read" in words(app)


@pytest.mark.parametrize(
    "p_all, told",
    [(0, "<0.01"), (0.004, "<0.01"), (0.006, "0.01"), (0.5, "0.50"), (0.994, "0.99"), (0.996, ">0.99"), (1, ">0.99")],
)
def test_no_probability_reads_as_certain(p_all, told):
    assert components.probability(p_all) == told
    assert components.probability(0.9996, digits=3) == ">0.999" and components.probability(0.9994, digits=3) == "0.999"


@pytest.mark.parametrize(
    "p_all, threshold, told",
    [(0.496, 0.5, "0.496"), (0.49996, 0.5, "0.49996"), (0.504, 0.5, "0.50"), (0.426, 0.4265, "0.426"), (0.427, 0.4265, "0.43")],
)
def test_a_probability_is_told_on_its_side_of_the_operating_point(p_all, threshold, told):
    assert components.probability(p_all, threshold) == told


def test_a_checkpoint_that_cannot_be_read_ends_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("model_zoo._checkpoint.BUNDLED", tmp_path)
    monkeypatch.setenv("BLASTOSCOPE_RUNS", str(tmp_path / "runs"))
    resources.cards.clear()
    app = AppTest.from_file(APP, default_timeout=300).run()
    resources.cards.clear()
    assert not app.exception and "holds no checkpoint" in app.warning[0].value


def test_a_network_that_was_shown_pictures_does_not_claim_unseen_subjects(make_card):
    card = make_card(split=make_card().split | {"seen_unlabelled": ["fold_0"]})
    assert components.tested_on(make_card(), "subjects") == "unseen subjects"
    assert components.tested_on(card, "subjects") == "subjects seen without labels"
    assert "never saw the subject's label." in components.model_sentence(card)
    assert "never saw the subject." in components.model_sentence(make_card())
