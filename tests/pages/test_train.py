"""The Train page in Streamlit's own harness, on a real run."""

import json
import os
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import model_zoo
from training import jobs, promotion
from ui import resources

APP = str(Path(__file__).parents[2] / "app.py")


@pytest.fixture
def page(runs):
    """page(): the Train page as someone opens it now."""
    resources.cards.clear()

    def open_page():
        app = AppTest.from_file(APP, default_timeout=300).run()
        app.switch_page("pages/train.py").run()
        assert not app.exception
        return app

    yield open_page
    resources.cards.clear()


@pytest.fixture
def first(runs, finished_run):
    shutil.copytree(finished_run, runs / "first")
    return runs / "first"


def words(app) -> str:
    return "\n".join(str(e.value) for kind in (app.markdown, app.caption, app.warning, app.code) for e in kind)


def one(elements, label):
    return next(e for e in elements if e.label.startswith(label))


def use(app, kind, label, value):
    one(getattr(app, kind), label).set_value(value).run()
    assert not app.exception
    return app


def click(app, label):
    one(app.button, label).click().run()
    assert not app.exception
    return app


def choose(app, paper, recipe):
    if one(app.selectbox, "From").value != paper:
        use(app, "selectbox", "From", paper)
    return use(app, "selectbox", "Recipe", recipe)


def test_an_empty_page_has_the_three_steps(page):
    app = page()
    assert [t for t in words(app).splitlines() if t.startswith("#####")] == ["##### 1. Data", "##### 2. Recipe", "##### 3. Run"]
    assert "**40 cells of 20 subjects.** ALL: 20 cells of 10. HEM: 20 cells of 10." in words(app)
    assert "A run goes on when this page is closed" in words(app)
    assert jobs.describe_device() in words(app)


def test_a_folder_outside_the_allowed_roots_is_refused_in_a_sentence(page, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for path in (str(tmp_path / "elsewhere"), "/etc", "../.."):
        app = page()
        use(app, "text_input", "Or the path", path)
        assert "outside the data folders" in words(app).replace("\\", "")
        assert "Choose data and a recipe first." in words(app)
        assert not [b for b in app.button if b.label == "Start"]


def test_what_is_passed_over_is_said_and_remarks_are_counted(page, drawn_cells, tmp_path, monkeypatch):
    littered = shutil.copytree(drawn_cells, tmp_path / "data" / "cells")
    (littered / "stray.png").write_bytes(b"")
    monkeypatch.setenv("BLASTOSCOPE_DATA", str(littered.parent))
    app = use(page(), "selectbox", "Folder", str(littered))
    said = "Passed over: 1 image without a label (first: cells/stray.png)."
    assert words(app).replace("\\", "").count(said) == 1
    click(app, "Check every picture")
    assert one(app.expander, "1 remark on the pictures") and words(app).replace("\\", "").count(said) == 2
    monkeypatch.setattr("ui.train.verify_cells", lambda *_, **__: (None, [f"Remark {i}" for i in range(60)]))
    click(app, "Check again")
    remarks = [element.value for element in one(app.expander, "60 remarks on the pictures").markdown]
    assert remarks == [*(f"Remark {i}" for i in range(50)), "and 10 more"]


def test_without_a_data_folder_the_page_says_how_to_give_one(page, monkeypatch):
    monkeypatch.delenv("BLASTOSCOPE_DATA")
    assert "Start the app with BLASTOSCOPE_DATA" in words(page()).replace("\\", "")


def test_every_recipe_can_be_chosen_and_names_its_split(page):
    app = page()
    for name, recipe in jobs.shipped_recipes().items():
        choose(app, recipe.paper, name)
        assert one(app.number_input, "Epochs").value == recipe.epochs
        shown = words(app).replace("\\", "")
        if recipe.protocol == "image_level":
            assert "cells of a patient lie on both sides" in shown
        else:
            assert "by subject into" in shown or "needs the preliminary test set" in shown
        assert "As shipped; nothing is changed." in shown, name


def test_changes_are_shown_against_the_shipped_recipe_and_checked(page):
    app = choose(page(), "", "mobilenet_v2")
    epochs = one(app.number_input, "Epochs").value
    use(app, "number_input", "Epochs", epochs + 3)
    use(app, "selectbox", "Mirroring", "both")
    assert f"epochs {epochs} → **{epochs + 3}**" in words(app) and "flip none → **both**" in words(app)
    use(app, "number_input", "Folds", 11)
    assert "11 folds need at least 11 groups" in words(app).replace("\\", "")
    assert not [b for b in app.button if b.label == "Start"]


def test_changes_to_a_recipe_survive_another_page(page):
    app = choose(page(), "000", "vanilla_3c1d_by_subject")
    use(app, "number_input", "Epochs", 7)
    use(app, "number_input", "Rotation", 45)
    use(app, "selectbox", "Subjects in the folds", "chance")
    use(app, "selectbox", "Held out", 1)
    app.switch_page("pages/models.py").run()
    app.switch_page("pages/train.py").run()
    assert not app.exception
    changed = next(line for line in words(app).splitlines() if line.startswith("Changed: "))
    assert all(f"**{value}**" in changed for value in ("7", "45", "chance", r"[1]")), changed


def test_a_tiny_run_is_told_as_it_is(page):
    app = choose(page(), "", "mobilenet_v2")
    assert "Split by subject into 5 folds; each is held out in turn; one more" in words(app)
    one(app.checkbox, "Tiny").check().run()
    assert "Split by subject into 3 folds; fold 0 is held out." in words(app)


def test_subjects_are_put_into_folds_as_chosen(page):
    app = choose(page(), "000", "vanilla_3c1d_by_subject")
    assert "folds; each is held out in turn" in words(app) and "As shipped" in words(app)
    use(app, "selectbox", "Subjects in the folds", "chance")
    assert "folds drawn by chance; each" in words(app) and "folds_by cells → **chance**" in words(app)
    use(app, "selectbox", "Subjects in the folds", "stain")
    assert "folds from the darkest stained to the lightest; each" in words(app)


def test_every_picture_is_checked_on_request(page, drawn_cells, runs, tmp_path, monkeypatch):
    shutil.copytree(drawn_cells, tmp_path / "data")
    (tmp_path / "data" / "all" / "UID_99_1_1_all.png").write_bytes(b"damaged")
    shutil.copy(tmp_path / "data" / "all" / "UID_920_1_1_all.png", tmp_path / "data" / "all" / "UID_98_1_1_all.png")
    monkeypatch.setenv("BLASTOSCOPE_DATA", str(tmp_path / "data"))
    app = click(page(), "Check every picture")
    shown = words(app).replace("\\", "")
    assert "1 of 42 images cannot be read as cells" in shown and "share 1 picture" in shown
    assert not [b for b in app.button if b.label == "Check every picture"]
    (tmp_path / "data" / "all" / "UID_99_1_1_all.png").unlink()
    shown = words(click(app, "Check again"))
    assert "cannot be read" not in shown and "share 1 picture" in shown.replace("\\", "")


def test_a_run_is_started_watched_stopped_and_finished_here(page, wait_for):
    app = choose(page(), "000", "vanilla_2x2c1d_dropout50_by_subject")
    use(app, "selectbox", "Held out", 0)
    for label, value in (("Cells per epoch", 64), ("Patience", 0), ("Batch", 8)):
        use(app, "number_input", label, value)
    use(app, "number_input", "Epochs", 900)
    use(app, "number_input", "Input", 48)
    use(app, "text_input", "Name of the run", "../up")
    click(app, "Start")
    assert "is a path" in words(app) and jobs.list_runs() == []
    use(app, "text_input", "Name of the run", "My Run")
    click(app, "Start")
    run = jobs.read_run("my-run")
    assert run.alive and run.recipe.epochs == 900 and run.recipe.input_size == 48
    assert "2X2C1D" in words(app) and "**Started: my\\-run.** Watch it below." in words(app)
    wait_for(lambda: jobs.read_run("my-run").history())

    app = page()  # reloaded
    assert one(app.selectbox, "Run").value == "my-run"
    assert "Best" in words(app) and "epoch 1" in words(app)
    click(app, "Stop")
    wait_for(lambda: not jobs.read_run("my-run").alive)
    assert "**Stopped in epoch" in words(app.run())
    assert "Resume goes on from the last complete epoch" in words(app)

    click(app, "Resume")
    wait_for(lambda: jobs.read_run("my-run").state == "running")
    click(app.run(), "Finish now")
    wait_for(lambda: not jobs.read_run("my-run").alive)
    assert len(jobs.read_run("my-run").history()) < 900
    assert "**Finished** in" in words(app.run()) and jobs.read_run("my-run").card.training["epochs"] == 900


def test_a_finished_run_is_compared_promoted_and_taken_back(page, first):
    before = model_zoo.default_checkpoint()
    app = page()
    assert "**Finished** in" in words(app) and "share no held-out cells" in words(app)
    table = app.dataframe[0].value
    assert list(table["figure"]) == ["AUROC", "Accuracy", "Weighted F1"] and "difference (95%)" not in table
    click(app, "Have the default read this run's held-out cells")
    assert "subjects of this run, which the default read as it is, this run's AUROC is" in words(app)
    assert list(app.dataframe[0].value["difference (95%)"].str.contains(" to ")) == [True] * 3
    click(app, "Make it the default")
    assert model_zoo.default_checkpoint().startswith("first-")
    assert "New cases open with Tiny (run first)" in words(app) and "is the default" in words(app)
    app.switch_page("pages/case.py").run()
    assert not app.exception and one(app.selectbox, "Network").value.startswith("first-")
    app.switch_page("pages/train.py").run()
    click(app, "Take the promotion back")
    assert model_zoo.default_checkpoint() == before
    app.switch_page("pages/case.py").run()
    assert not app.exception and one(app.selectbox, "Network").value == before


def test_a_promoted_card_that_cannot_be_read_is_said_and_taken_back(page, first, runs):
    before = model_zoo.default_checkpoint()
    promotion.promote("first")
    (runs / "promoted" / model_zoo.promoted_names()[-1] / "card.json").write_text("{")
    app = page()
    assert model_zoo.default_checkpoint() == before and "that was promoted last cannot be read" in words(app)
    click(app, "Take the promotion back")
    assert model_zoo.promoted_names() == [] and "It is bundled with the app" in words(app)


def test_two_runs_on_the_same_cells_get_the_interval_of_their_difference(page, first, runs):
    shutil.copytree(first, runs / "second")
    promotion.promote("first")
    app = page()
    use(app, "selectbox", "Run", "second")
    use(app, "multiselect", "Beside it", ["first"])
    assert "no clear difference" in words(app)
    assert all(cell.startswith("+0.000 (+0.000 to") for cell in app.dataframe[0].value["difference (95%)"])


@pytest.mark.parametrize("state", ["failed", "crashed", "queued"])
def test_a_run_that_ended_early_says_what_happened_and_offers_to_go_on(state, page, first):
    told = json.loads((first / "run.json").read_text())
    told |= {"state": {"crashed": "running"}.get(state, state), "message": "Disk full." if state == "failed" else ""}
    (first / "run.json").write_text(json.dumps(told))
    app = page()
    shown = words(app).replace("\\", "")
    assert ("Disk full." if state == "failed" else "Ended without a word") in shown
    assert one(app.button, "Resume") and not [b for b in app.button if b.label == "Make it the default"]


def test_a_run_without_epochs_or_validation_cells_promises_none(page, first):
    recipe = (first / "recipe.toml").read_text().replace("epochs = 2", "epochs = 0\nprobe = 1e-3\nvalidation = false")
    (first / "recipe.toml").write_text(recipe)
    header, *rows = (first / "history.csv").read_text().splitlines()
    kept = [name in ("fold", "epoch", "seconds") for name in header.split(",")]
    emptied = [",".join(v if keep else "" for v, keep in zip(row.split(","), kept, strict=True)) for row in rows]
    (first / "history.csv").write_text("\n".join([header, *emptied]) + "\n")
    shown = words(page())
    assert "**Finished** in" in shown and " on CPU.\n" in shown and "validated" not in shown and "Best" not in shown


def test_a_run_split_by_image_is_neither_compared_nor_promoted(page, first):
    card = json.loads((first / "card.json").read_text()) | {"split": {"protocol": "image-level", "sentence": "…"}}
    (first / "card.json").write_text(json.dumps(card))
    app = page()
    assert "cells of a patient lie on both sides" in words(app)
    assert not [b for b in app.button if b.label == "Make it the default"]


def test_a_run_is_deleted_for_good_and_its_page_goes_on(page, first, runs):
    shutil.copytree(first, runs / "second")
    app = use(page(), "selectbox", "Run", "second")
    click(app, "Delete for good")
    assert [run.name for run in jobs.list_runs()] == ["first"]
    assert one(app.run().selectbox, "Run").value == "first"


def test_a_damaged_run_folder_breaks_nothing(page, first, runs):
    (first / "recipe.toml").write_text("epochs = ")
    (first / "card.json").write_text("{")
    (runs / "odd").mkdir()
    (runs / "odd" / "run.json").write_text("not json")
    app = page()
    assert {run.name for run in jobs.list_runs()} == {"first", "odd"}
    for name in ("first", "odd"):
        use(app, "selectbox", "Run", name)
    assert not os.path.lexists(runs / "promoted")
