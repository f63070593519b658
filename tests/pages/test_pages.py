"""Every page, run by Streamlit's own test harness on real cells and on bad ones."""

import io
from pathlib import Path

import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

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
    assert "0 bytes" in " ".join(refused["note"])
    assert [h for h in words(app).splitlines() if h.startswith("#####")] == ["##### Patient: 11", "##### Patient: H12"]
    assert len(table) == 44
    assert table["P(ALL)"].between(0, 1).all()
    assert table["P(ALL)"].is_monotonic_decreasing
    assert "of 22 cells called ALL" in words(app)
    assert "not a marrow differential" in words(app)


def test_many_patients_stand_in_a_table(app, cells):
    upload(app, [(f"ward/{name}/{i}.webp", data, mime) for name in "ABCDE" for i, (_, data, mime) in enumerate(cells[:2])])
    patients = app.dataframe[0].value
    assert list(patients["patient"]) == list("ABCDE")
    assert list(patients["cells"]) == [2] * 5
    assert set(patients["answer"]) == {"indeterminate"}
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

    from inference.cells import CellResult
    from ui.components import to_csv

    cells = [
        CellResult(file="a.png", patient="P", p_all=0.7, call="ALL", note="odd"),
        CellResult(file="b.png", patient="P", p_all=None, call="refused", note="no cell"),
    ]
    for engine, notes in (
        (tiny_engine, ["odd", "no cell"]),
        (tiny_engine.over(8), [f"odd; {tiny_engine.over(8).remark}", "no cell"]),
    ):
        rows = list(csv.DictReader(io.StringIO(to_csv(cells, engine).decode("utf-8-sig"))))
        assert [row["note"] for row in rows] == notes
        assert {row["rotations"] for row in rows} == {str(engine.rotations)} and rows[0]["checkpoint"] == "tiny"


def test_explain_shows_a_map_and_its_resolution(app, cells):
    upload(app, cells[:3])
    app.switch_page("pages/explain.py").run()
    assert not app.exception
    assert "P(ALL)" in words(app)
    assert "Grad-CAM" in words(app)
    assert "values, enlarged" in words(app)
    assert "of the map lies on the cell" in words(app) or "The map is empty" in words(app)
    assert len(app.get("image")) == 4


def test_layers_walks_and_tells_shares(app, cells):
    upload(app, cells[:1])
    app.switch_page("pages/layers.py").run()
    assert not app.exception
    layer = next(s for s in app.selectbox if s.label.startswith("Layer"))
    first = layer.value
    next(b for b in app.button if b.label == "Next layer").click().run()
    assert next(s for s in app.selectbox if s.label.startswith("Layer")).value != first
    assert "exactly zero" in words(app)
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
    assert list(app.dataframe[-1].value["patient"]) == ["Anna"] * 4
    assert "outside the ZIP" in app.dataframe[0].value["note"][0]


def test_only_bad_files_leave_a_page_that_says_so(app):
    buffer = io.BytesIO()
    Image.new("RGB", (450, 450)).save(buffer, "PNG")
    upload(app, [("black.png", buffer.getvalue(), "image/png")])
    assert "no cell" in app.dataframe[0].value["note"][0]
