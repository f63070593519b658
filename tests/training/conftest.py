"""Drawn cells of drawn subjects, and the text of a recipe that trains on them within seconds."""

import pytest

RECIPE = """
architecture = "vanilla.2x2c1d"
title = "Tiny"
summary = "A run for tests."
crop = 200
input_size = 40
epochs = 3
draws_per_epoch = 16
batch_size = 8
learning_rate = 1e-3
weight_decay = 1e-3
ema = 0.9
flip = "both"
rotate = 180
shift = 0.05
stain = 0.2
gamma = 0.3
test_folds = [2]
seed = 1
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory, draw_cell, encode):
    """Ten ALL subjects with large cells, ten HEM subjects with small ones, two cells each, and one damaged file."""
    root = tmp_path_factory.mktemp("cells")
    for label in ("all", "hem"):
        (root / label).mkdir()
        for subject in range(20, 30):
            for cell in (1, 2):
                side = (150 if label == "all" else 100) + subject + cell
                name = f"UID_{'H' if label == 'hem' else ''}{subject}_1_{cell}_{label}.png"
                image = draw_cell(subject * cell, canvas=(250, 250), axes=(side, side))
                (root / label / name).write_bytes(encode(image, "PNG", compress_level=1))
    (root / "all" / "UID_99_1_1_all.png").write_bytes(b"damaged")
    return root


@pytest.fixture(scope="session")
def recipe_text():
    return RECIPE


@pytest.fixture(scope="session")
def start(tmp_path_factory, randomised):
    """A weights file of a MobileNetV2 that has seen nothing."""
    import keras

    file = tmp_path_factory.mktemp("start") / "start.weights.h5"
    keras.utils.set_random_seed(0)
    backbone = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(224, 224, 3))
    randomised(backbone)
    backbone.save_weights(file)
    return file


@pytest.fixture
def small_teacher(monkeypatch):
    """A teacher of one of MobileNetV2 pyramid's seven branches: the others teach no otherwise and are a minute's tracing."""
    from model_zoo import mobilenet_v2_pyramid

    monkeypatch.setattr(mobilenet_v2_pyramid, "_SCALES", {"fine": 1})
    monkeypatch.setattr(mobilenet_v2_pyramid, "_STAININGS", {"fine": ("raw",)})


@pytest.fixture
def write_recipe_file(tmp_path):
    """write_recipe_file("epochs = 1", ...): the tiny recipe with these lines in place of, or beside, its own."""

    def write(*lines: str, name="r.toml"):
        changed = {line.partition(" = ")[0] for line in lines}
        kept = [line for line in RECIPE.strip().splitlines() if line.partition(" = ")[0] not in changed]
        (tmp_path / name).write_text("\n".join([*kept, *lines]) + "\n")
        return tmp_path / name

    return write


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs and their cache lie in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLASTOSCOPE_RUNS", str(tmp_path / "runs"))
