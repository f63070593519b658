"""The same cells, the same first weights, one fit: every installed backend of Keras ends with the same probabilities."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import numpy as np

BACKENDS = [name for name in ("tensorflow", "jax", "torch") if importlib.util.find_spec(name)]
FIT = """
import json, sys
from pathlib import Path
import numpy as np
from model_zoo import find_architecture
from training.data import index_cells, pack_cells, verify_cells
from training.fit import fit, predict_logit
from training.splits import Part
from training.recipe import read_recipe

class Report:
    untouched = None
    def log(self, line): pass
    history = subjects = log
    def progress(self, **values): pass
    def stopping(self): return False
    finishing = stopping

recipe = read_recipe(Path("r.toml"))
cells, _ = verify_cells(index_cells(Path(sys.argv[1])), cache=Path("cache"))
packed = pack_cells(cells, recipe.framing, cache=Path("cache"))
rows = np.arange(len(cells))
part = Part(name="fold", training=rows[rows % 4 > 0], validation=rows[rows % 4 == 0], test=rows[rows % 4 == 0])
network = find_architecture(recipe.architecture).build(input_size=recipe.input_size)
rng = np.random.default_rng(0)
network.set_weights([(rng.normal(0, 0.1, w.shape) if w.ndim > 1 else w).astype("float32") for w in network.get_weights()])
first = predict_logit(network, packed, part.test, batch_size=8)
fit(network, recipe, packed, cells, part, Path("."), Report())
logit = predict_logit(network, packed, part.test, batch_size=8)
print(json.dumps([first.tolist(), (1 / (1 + np.exp(-logit))).tolist()]))
"""


ON_DEVICE = """
import training.devices
training.devices._gpu_memory = lambda: 10**12  # cells are held as on a GPU with room for them
"""


SMALL_TEACHER = """
from model_zoo import mobilenet_v2_pyramid as teacher
teacher._SCALES, teacher._STAININGS = {"fine": 1}, {"fine": ("raw",)}
"""


def trained(backend, data, recipe, repository, before=""):
    folder = recipe.parent / (f"{backend} otherwise" if before else backend)
    folder.mkdir()
    (folder / "r.toml").write_text(recipe.read_text())
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", before + FIT, str(data)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return map(np.array, json.loads(done.stdout.splitlines()[-1]))


def test_every_backend_trains_to_the_same_probabilities(data, write_recipe_file, repository):
    assert len(BACKENDS) > 1, "install requirements-dev.txt: it holds a second backend"
    lines = [
        'flip = ""',
        "rotate = 0",
        "shift = 0",
        "stain = 0",
        "gamma = 0",
        "learning_rate = 3e-4",
        'optimizer = "sgd"',
        "epochs = 2",
    ]
    recipe = write_recipe_file(*lines)
    first, expected = trained("tensorflow", data, recipe, repository)
    for backend in BACKENDS[1:]:
        start, found = trained(backend, data, recipe, repository)
        np.testing.assert_allclose(start, first, rtol=1e-3, atol=1e-3)
        assert np.abs(expected - 1 / (1 + np.exp(-first))).max() > 0.01  # the training moved them
        np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=backend)


def test_jax_draws_alike_from_cells_on_the_device(data, write_recipe_file, repository):
    assert "jax" in BACKENDS, "install requirements-dev.txt: it holds JAX"
    recipe = write_recipe_file("epochs = 2")
    first, expected = trained("jax", data, recipe, repository)
    start, found = trained("jax", data, recipe, repository, ON_DEVICE)
    np.testing.assert_array_equal(start, first)
    np.testing.assert_array_equal(found, expected)


HELD = """
import jax, numpy as np
from training.devices import held

class GPU:
    platform = "gpu"
    def memory_stats(self): return {"bytes_limit": limit}

def full(cells): raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

cells = np.zeros((2, 8, 8, 3), "uint8")
assert held(cells) is cells  # the processor reads them where they are
jax.devices = lambda: [GPU()]
limit = 4 * cells.nbytes + 1
assert isinstance(held(cells), jax.Array) and held(cells, devices=2) is cells
limit -= 1
assert held(cells) is cells
limit, jax.device_put = 10**12, full
assert held(cells) is cells
"""


def test_cells_are_held_on_a_gpu_with_room_for_them(repository):
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", HELD], cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_jax_trains_a_whole_run_and_keeps_what_it_compiled(data, start, write_recipe_file, repository, tmp_path):
    """With a teacher and weight averages, whose arrays JAX would share, from cells on the device.

    The second fold's network is compiled no more, and no step twice.
    """
    lines = [f'teacher = "{start}"', "test_folds = [1, 2]", "folds = 3", "epochs = 2", "validation = false"]
    recipe = write_recipe_file(*lines)
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}
    environment |= {"PYTHONPATH": str(repository), "BLASTOSCOPE_RUNS": str(tmp_path)}
    main = "import sys; from training.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", ON_DEVICE + SMALL_TEACHER + main, str(recipe), "--data", str(data), "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    took = [float(s) for s in re.findall(r"Finished XLA compilation of jit\(train_step\) in ([\d.e-]+) sec", done.stderr)]
    assert len(took) == 2 and took[1] < took[0] / 2  # read, not compiled: from 21 s to 2 s where a network is large
    assert list((tmp_path / "cache" / "compiled").glob("jit_train_step-*"))
    assert {row.split(",")[0] for row in (tmp_path / "run" / "history.csv").read_text().splitlines()[1:]} == {
        "fold_1",
        "fold_2",
    }
