"""A laboratory's whole way in a real Chromium: train on real cells, leave, come back, stop, go on, promote, read, take back."""

import os
import re
import shutil
import signal

import pytest
from playwright.sync_api import expect
from test_app import LONG, browser, serving  # noqa: F401  (a fixture)

import model_zoo
from inference.images import subject_of
from training import jobs


@pytest.fixture
def few_cells(data_root, tmp_path):
    """Four real cells of each subject, and the folder to which runs go."""
    seen = {}
    for file in sorted((data_root / "cnmc").rglob("UID_*")):
        subject = subject_of(file.name)
        seen[subject] = seen.get(subject, 0) + 1
        if seen[subject] <= 4:
            folder = tmp_path / "data" / file.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)
    return tmp_path / "data"


@pytest.fixture
def address(few_cells, tmp_path, monkeypatch):
    monkeypatch.setenv("BLASTOSCOPE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BLASTOSCOPE_DATA", str(few_cells))
    try:
        with serving() as found:
            yield found
    finally:
        for run in jobs.list_runs():
            if run.alive:
                os.kill(run.told["pid"], signal.SIGKILL)


def _choose(page, label, option):
    """As a user would: a press that a redraw of a busy page swallowed is made again."""
    page.locator("[data-test-script-state=notRunning]").wait_for()
    box, options = page.get_by_role("combobox", name=re.compile(f"{label}$")), page.get_by_role("option", name=option)
    for last in (False, False, True):
        if not options.first.is_visible():  # else the list is still open
            box.click()
        options.first.click()
        try:
            return expect(box).to_have_value(option, timeout=LONG if last else 20_000)
        except AssertionError:
            if last:
                raise


def _set(page, label, value):
    field = page.get_by_role("spinbutton", name=label, exact=True)
    field.fill(str(value))
    field.press("Enter")
    page.get_by_text(re.compile(rf"Changed:.*→ {value}\b")).wait_for()


def _epoch(page) -> int:
    text = page.get_by_text(re.compile(r"^Epoch \d+ of 60")).first.inner_text()
    return int(re.match(r"Epoch (\d+)", text).group(1))


def _at_epoch(page, epoch):
    page.get_by_text(re.compile(rf"^Epoch ({'|'.join(map(str, range(epoch, 61)))}) of 60")).first.wait_for()


def test_train_reload_stop_resume_promote_read_and_take_back(browser, address, few_cells, wait_for):  # noqa: F811
    bundled = model_zoo.find_checkpoint(model_zoo.default_checkpoint(model_zoo._checkpoint.BUNDLED)).card.title
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(LONG)
    page.goto(address)
    page.get_by_role("button", name="Try the demo patients").wait_for()
    page.get_by_role("link", name="Train").first.click()
    page.get_by_text(re.compile(r"cells of 50 subjects")).wait_for()
    name = page.get_by_role("textbox", name="Name of the run")  # drawn last: it says for which recipe the page stands
    _choose(page, "From", re.compile("Paper 000"))
    expect(name).to_have_value(re.compile("^vanilla"))
    _choose(page, "Recipe", re.compile("2X2C1D.*split by subject"))
    expect(name).to_have_value(re.compile("^vanilla_2x2c1d.*by_subject"))
    _set(page, "Input (pixels)", 32)
    _set(page, "Cells per epoch", 640)
    _set(page, "Epochs", 60)
    _set(page, "Patience (epochs)", 0)  # else it may stop early before the page is read again
    _choose(page, "Held out to measure", re.compile("fold 0 alone"))
    name.fill("Night run")
    name.press("Enter")
    page.get_by_role("button", name="Start").click()

    _at_epoch(page, 2)
    page.reload()
    _at_epoch(page, 2)
    _at_epoch(page, _epoch(page) + 1)  # it went on, and is still watched
    page.get_by_role("button", name="Stop").click()
    page.get_by_text(re.compile("^Stopped in epoch")).wait_for()
    done = len(jobs.read_run("night-run").history())
    assert 0 < done < 60
    page.get_by_role("button", name="Resume").click()
    _at_epoch(page, done + 1)
    page.get_by_role("button", name="Finish now").click()
    wait_for(lambda: jobs.read_run("night-run").state == "finished")

    page.get_by_role("button", name="Make it the default").wait_for()
    epochs = [row["epoch"] for row in jobs.read_run("night-run").history()]
    assert epochs == list(range(1, len(epochs) + 1)) and len(epochs) > done  # none twice, none missing
    page.get_by_text("Finished in").wait_for()
    page.get_by_text("held-out cells").first.wait_for()
    page.get_by_role("button", name="Make it the default").click()
    page.get_by_text(re.compile(r"New cases open with .*\(run night-run\)")).wait_for()

    page.get_by_role("link", name="Case").first.click()
    network = page.get_by_role("combobox", name=re.compile("Network"))
    expect(network).to_have_value(re.compile("run night-run"))
    cell = next(few_cells.rglob("UID_*"))
    page.locator("input[type=file]").first.set_input_files(cell)
    page.locator("button.tile").first.wait_for()
    assert 0 <= float(page.locator("button.tile .p").first.inner_text()) <= 1

    page.get_by_role("link", name="Train").first.click()
    page.get_by_role("button", name="Take the promotion back").click()
    page.get_by_text("It is bundled with the app.").wait_for()
    page.get_by_role("link", name="Case").first.click()
    page.locator("button.tile").first.wait_for()  # read again, by the bundled network
    expect(network).to_have_value(re.compile(re.escape(bundled)))
    assert page.get_by_text("Traceback").count() == 0
    context.close()
