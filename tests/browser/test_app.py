"""The whole way in a real Chromium, on the app as `make run` starts it."""

import contextlib
import csv
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect

import model_zoo
from inference.cells import score_files
from inference.engine import Engine
from inference.sources import open_paths
from ui.components import probability

ROOT = Path(__file__).parents[2]
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
LONG = 180_000  # ms: a bound against hanging, not a measurement
expect.set_options(timeout=LONG)


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=_FLAGS)
        yield launched
        launched.close()


@contextlib.contextmanager
def serving():
    """The address of a fresh server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    server = subprocess.Popen(
        ["make", "run", f"PORT={port}"], cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/_stcore/health", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def address():
    with serving() as found:
        yield found


def _wait_until_up(url: str, server: subprocess.Popen) -> None:
    import time

    for _ in range(600):
        assert server.poll() is None, "make run ended"
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the app did not come up")


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(LONG)
    page.goto(address)
    page.get_by_role("button", name="Try the demo patients").wait_for()
    yield page
    context.close()


@pytest.fixture
def two_subjects(data_root, tmp_path) -> Path:
    """A folder of real cells: 24 of an ALL subject, 24 of a HEM subject, and a text file."""
    folder = tmp_path / "patients"
    for pattern in ("all/UID_11_*", "hem/UID_H12_*"):
        for file in sorted((data_root / "cnmc" / "fold_0").glob(pattern))[:24]:
            folder.mkdir(exist_ok=True)
            shutil.copy(file, folder)
    (folder / "notes.txt").write_text("no image")
    return folder


def _tiles(page):
    return page.locator("button.tile")


def _wait_for_all_read(page):
    _tiles(page).first.wait_for()
    page.get_by_text(re.compile(r"^Reading \d")).wait_for(state="detached")


def test_a_folder_of_two_subjects_all_the_way(page, two_subjects):
    page.get_by_role("radio", name="A folder").or_(page.get_by_role("button", name="A folder")).first.click()
    folder_input = page.locator("input[type=file][webkitdirectory]")
    folder_input.wait_for(state="attached")
    folder_input.set_input_files(two_subjects)
    _wait_for_all_read(page)
    page.get_by_text("48 cells. Click a cell").wait_for()
    page.get_by_text("1 of 49 files were refused").wait_for()
    for subject in ("11", "H12"):
        page.get_by_role("heading", name=f"Patient: {subject}").wait_for()
    expect(page.get_by_text("not a marrow differential")).to_have_count(2)

    with page.expect_download() as download:
        page.get_by_test_id("stDownloadButton").get_by_role("button").click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8-sig"))))
    engine = Engine(model_zoo.find_checkpoint(model_zoo.default_checkpoint()))
    expected = {r.file: r for r in score_files(open_paths([two_subjects]), engine)}
    assert {row["file"] for row in rows} == set(expected)
    for row in rows:
        result = expected[row["file"]]
        assert (row["patient"], row["call"]) == (result.patient, result.call)
        assert row["p_all"] == ("" if result.p_all is None else f"{result.p_all:.6f}")

    first, largest = _tiles(page).first, max(r.p_all for r in expected.values() if r.p_all is not None)
    shown = probability(largest)
    expect(first.locator(".p")).to_have_text(shown)  # on a busy machine the gallery is drawn after the words
    first.click()
    page.get_by_role("heading", name=f"P(ALL) {shown}").wait_for()
    page.get_by_text("Grad-CAM (Selvaraju").wait_for()
    assert _spread(_image(page, "with what speaks for")) > 20

    page.get_by_role("link", name="Layers").first.click()
    page.get_by_text("How much stays silent").wait_for()
    before = page.get_by_text(re.compile(r"^Maps 1–")).first.inner_text()
    page.get_by_role("button", name="Next layer").click()
    page.get_by_text(re.compile(r"^Maps 1–")).first.wait_for()
    assert before.startswith("Maps 1–")
    assert _spread(_image(page, "Maps 1–")) > 20

    page.get_by_role("link", name="Models").first.click()
    page.get_by_text("Limits.").first.wait_for()
    page.get_by_text("Split by subject: tested on unseen patients.").wait_for()
    assert page.get_by_text("Traceback").count() == 0


def test_the_first_request_of_a_server_may_be_any_page(browser):
    with serving() as fresh:
        page = browser.new_page()
        page.set_default_timeout(LONG)
        page.goto(f"{fresh}/models")
        page.get_by_text("not a medical device").first.wait_for()
        page.get_by_text("can read cells").first.wait_for()
        page.close()


def test_every_screen_says_that_it_is_no_medical_device(page):
    for name in ("Case", "Explain", "Layers", "Models"):
        page.get_by_role("link", name=name).first.click()
        page.get_by_role("link", name=name, exact=True).first.wait_for()
        page.get_by_text("not a medical device").first.wait_for()


def _image(page, caption: str):
    """The image with this caption, once it is there: words around it may be drawn earlier."""
    return page.get_by_test_id("stImage").filter(has_text=caption).locator("img").first


def _spread(image) -> float:
    """Difference between the brightest and the darkest grey of an image that the browser has drawn."""
    image.wait_for()
    return image.evaluate(
        """async (element) => {
            await element.decode();
            const canvas = document.createElement('canvas');
            canvas.width = canvas.height = 64;
            const context = canvas.getContext('2d');
            context.drawImage(element, 0, 0, 64, 64);
            const { data } = context.getImageData(0, 0, 64, 64);
            let low = 255, high = 0;
            for (let i = 0; i < data.length; i += 4) {
                const grey = (data[i] + data[i + 1] + data[i + 2]) / 3;
                low = Math.min(low, grey); high = Math.max(high, grey);
            }
            return high - low;
        }"""
    )


def test_demo_patients_in_one_click_and_labelled_synthetic(page):
    page.get_by_role("button", name="Try the demo patients").click()
    _wait_for_all_read(page)
    page.get_by_text("The demo patients are synthetic").wait_for()
    _tiles(page).nth(99).wait_for()
    assert all("synthetic" in t for t in _tiles(page).evaluate_all("tiles => tiles.map(t => t.title)"))
    _tiles(page).nth(3).click()
    page.get_by_text("This cell is synthetic").wait_for()


def test_tiles_are_buttons_in_a_list_and_the_focus_stays_while_cells_come_in(page):
    page.get_by_role("button", name="Try the demo patients").click()
    tile = page.get_by_role("listitem").get_by_role("button", name="Open in Explain").first
    tile.focus()
    focused = "document.activeElement.shadowRoot?.activeElement?.title ?? document.activeElement.title"
    title, before = page.evaluate(focused), _tiles(page).count()
    _wait_for_all_read(page)
    page.get_by_text(re.compile(r"cells\. Click a cell")).wait_for()
    assert _tiles(page).count() > before
    assert title and page.evaluate(focused) == title
    assert page.locator("button.tile[tabindex='0']").count() == 1
    titles = _tiles(page).evaluate_all("tiles => tiles.map(tile => tile.title)")
    across = _tiles(page).evaluate_all("tiles => tiles.filter(tile => tile.offsetTop === tiles[0].offsetTop).length")
    for key, place in (("Home", 0), ("ArrowRight", 1), ("ArrowDown", 1 + across), ("ArrowLeft", across), ("ArrowUp", 0)):
        page.keyboard.press(key)
        assert page.evaluate(focused) == titles[place], key


def test_what_is_taken_out_of_the_uploader_leaves_the_case_and_only_that(page, data_root):
    files = sorted((data_root / "cnmc" / "fold_0" / "all").glob("UID_11_*"))[:6]
    page.locator("input[type=file]").first.set_input_files(files[:3])
    _wait_for_all_read(page)
    page.get_by_role("button", name=re.compile("^Remove ")).first.click()
    page.get_by_text("2 cells. Click a cell").wait_for()
    page.get_by_role("link", name="Models").first.click()
    page.get_by_text("can read cells").first.wait_for()
    page.get_by_role("link", name="Case").first.click()
    page.get_by_text("2 cells. Click a cell").wait_for()
    page.locator("input[type=file]").first.set_input_files(files[3:])
    page.get_by_text("5 cells. Click a cell").wait_for()
    _wait_for_all_read(page)


def test_a_network_chosen_while_cells_are_read_stays_chosen(page, data_root):
    files = sorted((data_root / "cnmc" / "fold_0" / "all").glob("UID_11_*"))[:60]
    page.locator("input[type=file]").first.set_input_files(files)
    page.get_by_text(re.compile(r"^Reading \d")).first.wait_for()
    box = page.get_by_role("combobox", name=re.compile("Network"))
    for title in ("MobileNetV2", "MobileNetV2 pyramid", "MobileNetV2", "MobileNetV2 pyramid"):
        box.click()
        page.get_by_role("option", name=title, exact=True).click()
        expect(box).to_have_value(title)
    _wait_for_all_read(page)
    page.get_by_text("60 cells. Click a cell").wait_for()
    expect(box).to_have_value("MobileNetV2 pyramid")


def test_a_hostile_name_is_shown_as_text(page, data_root):
    real = next((data_root / "cnmc" / "fold_0" / "all").iterdir()).read_bytes()
    name = '<img src=x onerror="window.hacked=1">\'\u202egpj.webp'
    page.locator("input[type=file]").first.set_input_files([{"name": name, "mimeType": "image/webp", "buffer": real}])
    _wait_for_all_read(page)
    expect(_tiles(page)).to_have_count(1)
    assert "<img src=x" in _tiles(page).first.get_attribute("title")
    _tiles(page).first.click()
    page.get_by_text("Grad-CAM (Selvaraju").wait_for()
    assert page.evaluate("window.hacked") is None


def test_two_sessions_at_once_keep_their_cells_apart(browser, address, data_root):
    cells = {s: sorted((data_root / "cnmc" / "fold_0" / "all").glob(f"UID_{s}_*"))[:12] for s in ("11", "14")}
    pages = {}
    for subject, files in cells.items():
        pages[subject] = browser.new_context().new_page()
        pages[subject].set_default_timeout(LONG)
        pages[subject].goto(address)
        pages[subject].locator("input[type=file]").first.wait_for(state="attached")
        pages[subject].locator("input[type=file]").first.set_input_files(files)
    for subject, page in pages.items():
        _wait_for_all_read(page)
        expect(_tiles(page)).to_have_count(12)
        titles = _tiles(page).evaluate_all("tiles => tiles.map(t => t.title)")
        assert all(t.startswith(f"UID_{subject}_") for t in titles)
        page.context.close()
