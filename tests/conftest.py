"""Factories shared by all tests: drawn cells, encoded files, a tiny real checkpoint, and the real cells where they lie."""

import atexit
import io
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["BLASTOSCOPE_RUNS"] = tempfile.mkdtemp(prefix="blastoscope-")  # no test sees this machine's runs and promotions

import numpy as np
import pytest
from PIL import Image, ImageDraw

atexit.register(shutil.rmtree, os.environ["BLASTOSCOPE_RUNS"], ignore_errors=True)

REPOSITORY = Path(__file__).resolve().parents[1]
SUBJECTS = [[f"{10 + i}", 1, 100, 88 + i] for i in range(6)] + [[f"H{1 + i}", 0, 100, 4 + i] for i in range(6)]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def draw_cell():
    """draw_cell(seed=0, *, canvas=(450, 450), centre=None, axes=(170, 150)): a violet ellipse on exact black.

    The same seed and axes give the same cell wherever it lies; `centre` is (y, x), the canvas' middle by default.
    """

    def draw(seed=0, *, canvas=(450, 450), centre=None, axes=(170, 150)) -> np.ndarray:
        height, width = axes
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).ellipse((0, 0, width - 1, height - 1), fill=255)
        mask = np.asarray(mask) > 0
        rng = np.random.default_rng(seed)
        colour = np.array([130, 60, 160]) + rng.integers(-25, 25, 3)
        grain = rng.integers(-20, 21, (height // 6 + 1, width // 6 + 1, 1)).repeat(6, 0).repeat(6, 1)[:height, :width]
        cell = np.clip(colour + grain, 20, 255).astype("uint8") * mask[..., None]
        image = np.zeros((*canvas, 3), "uint8")
        y, x = centre or (canvas[0] // 2, canvas[1] // 2)
        top, left = y - height // 2, x - width // 2
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + height, canvas[0]), min(left + width, canvas[1])
        image[y0:y1, x0:x1] = cell[y0 - top : y1 - top, x0 - left : x1 - left]
        return image

    return draw


@pytest.fixture(scope="session")
def encode():
    """encode(image, "BMP"): the bytes of a file; WebP is lossless unless told otherwise."""

    def encode(image, form: str, **options) -> bytes:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        buffer = io.BytesIO()
        picture.save(buffer, form, **({"lossless": True} if form == "WEBP" else {}) | options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def make_card():
    """make_card(**changes): the card of a network that errs on about one unseen cell in ten."""
    from model_zoo import Card, FrameSpec

    def make(**changes) -> Card:
        counts = {"all_subjects": 6, "all_cells": 600, "hem_subjects": 6, "hem_cells": 600}
        figure = [0.9, 0.8, 0.95]
        return Card(
            **{
                "name": "tiny",
                "title": "Tiny",
                "architecture": "mobilenet_v2",
                "framing": FrameSpec(crop=300, size=96),
                "positive_class": "ALL",
                "summary": "Random weights, for tests.",
                "data": {"source": "none", "training": counts, "validation": counts, "test": counts},
                "split": {"protocol": "by subject", "sentence": "Not measured.", "folds": 5, "seed": 0},
                "training": {"epochs": 0, "best_epoch": 0, "hours": 0.0, "device": "none", "start": "random weights"},
                "metrics": dict.fromkeys(
                    ("auroc", "sensitivity", "specificity", "accuracy", "f1", "weighted_f1", "brier", "ece"), figure
                ),
                "operating_points": {"default": {"threshold": 0.5, "sensitivity": figure, "specificity": figure}},
                "temperature": 1.5,
                "subjects": SUBJECTS,
                "limits": ["Knows nothing: its weights are random."],
                "weights_sha256": "0" * 64,
                "licence": "none",
                "versions": {"keras": "3"},
            }
            | changes
        )

    return make


def randomise_statistics(model, seed=0):
    """Batch norms as after a training: means and variances that are not 0 and 1."""
    import keras

    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            n = layer.moving_mean.shape[0]
            layer.moving_mean.assign(rng.normal(0, 0.1, n).astype("float32"))
            layer.moving_variance.assign(rng.uniform(0.5, 1.5, n).astype("float32"))
            if layer.center:
                layer.beta.assign(rng.normal(0, 0.2, n).astype("float32"))


@pytest.fixture(scope="session")
def randomised():
    return randomise_statistics


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, make_card, draw_cell) -> Path:
    """A real checkpoint folder: MobileNetV2 at 96 px, random weights, about as many cells called ALL as HEM."""
    import keras

    import model_zoo
    from inference.images import frame_cell
    from model_zoo._checkpoint import WEIGHTS, hash_weights
    from model_zoo._onnx import write_onnx

    card = make_card()
    keras.utils.set_random_seed(0)
    model = model_zoo.find_architecture(card.architecture).build(input_size=card.framing.size)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # one pass in training mode below takes over the drawn cells' statistics
    cells = np.stack([frame_cell(draw_cell(seed, axes=(130 + 5 * seed, 150)), card.framing) for seed in range(12)])
    head = model.get_layer("logit")
    logit_of = keras.Model(model.inputs[0], head.output)
    logit_of(cells.astype("float32"), training=True)
    logit = keras.ops.convert_to_numpy(logit_of(cells.astype("float32")))
    head.kernel.assign(head.kernel / logit.std())
    head.bias.assign(-np.median(logit / logit.std(), axis=0))
    folder = tmp_path_factory.mktemp("checkpoints") / card.name
    folder.mkdir()
    write_onnx(model, folder / WEIGHTS)
    make_card(weights_sha256=hash_weights(folder / WEIGHTS)).write(folder / "card.json")
    return folder


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint):
    from inference.engine import Engine
    from model_zoo import load_checkpoint

    return Engine(load_checkpoint(tiny_checkpoint))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real images, described in its own README; never part of this repository."""
    given = os.environ.get("BLASTOSCOPE_DATA")
    if not given:
        pytest.skip("BLASTOSCOPE_DATA is not set: no real cells to test on")
    return Path(given).resolve()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's executable."""
    from benchmarks import find_chromium

    if found := find_chromium():
        return found
    assert not os.environ.get("REQUIRE_BROWSER"), "REQUIRE_BROWSER is set, and there is no Chromium"
    pytest.skip("no Chromium on this machine")


@pytest.fixture(scope="session")
def real_cells(data_root):
    """real_cells(n): n files of C-NMC cells, spread evenly over subjects and both classes."""
    files = sorted((data_root / "cnmc").rglob("UID_*"))
    assert files, f"{data_root}/cnmc holds no cells"
    return lambda n: [files[i] for i in np.linspace(0, len(files) - 1, n).astype(int)]


@pytest.fixture(scope="session")
def usual() -> dict:
    """What the network that opens first knows of cells and persons, see `training.data.usual_ranges`."""
    from model_zoo import find_checkpoint

    return find_checkpoint("mobilenet_v2_pyramid").card.data["usual"]


@pytest.fixture(scope="session")
def drawn_cells(tmp_path_factory, draw_cell, encode) -> Path:
    """A folder to train on: ten ALL subjects with large cells, ten HEM subjects with small ones, two cells each."""
    root = tmp_path_factory.mktemp("drawn") / "cells"
    for label in ("all", "hem"):
        (root / label).mkdir(parents=True)
        for subject in range(20, 30):
            for cell in (1, 2):
                side = (150 if label == "all" else 100) + subject + cell
                name = f"UID_{'H' if label == 'hem' else ''}9{subject}_1_{cell}_{label}.png"  # no name of C-NMC's
                image = draw_cell(subject * cell + 1000 * (label == "hem"), canvas=(250, 250), axes=(side, side))
                (root / label / name).write_bytes(encode(image, "PNG", compress_level=1))
    return root


@pytest.fixture(scope="session")
def tiny_recipe():
    """tiny_recipe(**changes): a real recipe of a small network, whose epochs take a fraction of a second."""
    from training.recipe import make_recipe

    given = {"architecture": "vanilla.2x2c1d", "title": "Tiny", "summary": "A run for tests.", "crop": 200, "input_size": 48}
    given |= {
        "epochs": 2,
        "draws_per_epoch": 16,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "flip": "both",
        "stain": 0.2,
        "seed": 1,
    }
    return lambda **changes: make_recipe(given | {"folds": 3, "test_folds": [0]} | changes)


@pytest.fixture
def runs(tmp_path, drawn_cells, monkeypatch) -> Path:
    """An empty folder of runs, and the drawn cells within the allowed roots; what still runs at the end is killed."""
    from training import jobs

    monkeypatch.setenv("BLASTOSCOPE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BLASTOSCOPE_DATA", str(drawn_cells.parent))
    monkeypatch.delenv("BLASTOSCOPE_DATA_ROOTS", raising=False)
    yield tmp_path / "runs"
    for run in jobs.list_runs():
        if run.alive:
            os.kill(run.told["pid"], 9)


@pytest.fixture(scope="session")
def wait_for():
    """wait_for(condition): its first true value; fails after half an hour, a bound against hanging."""

    def wait(condition):
        end = time.monotonic() + 1800
        while not (value := condition()):
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.1)
        return value

    return wait


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, drawn_cells, tiny_recipe, wait_for) -> Path:
    """The folder of a real run that finished. It was started by a process that was killed at once, as an app may be."""
    import signal
    import subprocess
    import sys

    from training import jobs

    home = tmp_path_factory.mktemp("lab") / "runs"
    script = (
        "import time; from pathlib import Path; from training import jobs; from training.recipe import Recipe\n"
        f"jobs.start_run({tiny_recipe()!r}, Path({str(drawn_cells)!r}), 'first'); print('started', flush=True)\n"
        "time.sleep(600)"
    )
    environment = os.environ | {"BLASTOSCOPE_RUNS": str(home), "BLASTOSCOPE_DATA": str(drawn_cells)}
    own = {"cwd": REPOSITORY, "env": environment, "start_new_session": True}
    app = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, **own)
    assert app.stdout.readline() == "started\n"
    os.killpg(app.pid, signal.SIGKILL)  # and all of its group: the run is not in it
    app.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLASTOSCOPE_RUNS", str(home))
        assert jobs.read_run("first").alive
        wait_for(lambda: not jobs.read_run("first").alive)
        run = jobs.read_run("first")
    assert run.state == "finished", run.message
    return run.folder
