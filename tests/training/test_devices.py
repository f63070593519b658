"""Several devices, as parts of the processor: the same network comes out as of one."""

import csv
import importlib.util
import os
import subprocess
import sys
import types

import keras
import numpy as np
import pytest

from training.devices import find_devices
from training.errors import RecipeError, RunError
from training.recipe import read_recipe

BACKENDS = [name for name in ("tensorflow", "jax") if importlib.util.find_spec(name)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_devices_give_what_one_gives(backend, data, write_recipe_file, tmp_path, repository):
    """With augmentation, averaged weights and two folds in one process; no batch norm, which sees its device's cells alone."""
    recipe = write_recipe_file("test_folds = [1, 2]", "epochs = 2")
    environment = os.environ | {"PYTHONPATH": str(repository), "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    environment |= {"BLASTOSCOPE_VIRTUAL_DEVICES": "2"}

    def logits(devices: int) -> np.ndarray:
        command = [sys.executable, "-m", "training", str(recipe), "--data", str(data), "--set", f"devices={devices}"]
        out = tmp_path / str(devices)
        done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f'"device": "{" ".join(f"cpu:{i}" for i in range(devices))}"' in (out / "run.json").read_text()
        with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
            return np.array([float(row["logit"]) for row in csv.DictReader(file)])

    one, two = logits(1), logits(2)
    np.testing.assert_allclose(two, one, atol=1e-4)
    assert one.std() > 0.05  # other draws of the augmentation change them by more than .01


@pytest.mark.parametrize(("gpus", "found"), [(0, ["cpu:0"]), (2, ["gpu:0", "gpu:1"])])
def test_devices_are_found_on_pytorch_which_keras_cannot_ask(gpus, found, monkeypatch):
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=lambda: gpus))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    monkeypatch.setattr(keras.distribution, "list_devices", None)
    assert find_devices(1) == found[:1]


@pytest.mark.parametrize(
    ("capability", "precision"), [(9.0, "mixed_bfloat16"), (7.5, "mixed_float16"), (None, "mixed_bfloat16")]
)
def test_mixed_precision_is_one_that_the_gpu_computes(capability, precision, monkeypatch):
    import training.run

    monkeypatch.setattr(training.run, "list_devices", lambda: ["gpu:0"])
    monkeypatch.setattr(training.run, "gpus", lambda: [{"capability": capability}])
    assert training.run.precision_of("auto") == precision and training.run.precision_of("float32") == "float32"
    monkeypatch.setattr(training.run, "list_devices", lambda: ["cpu:0"])
    assert training.run.precision_of("auto") == "float32"


def test_a_batch_is_divided_evenly_or_refused(write_recipe_file):
    assert read_recipe(write_recipe_file("devices = 4")).devices == 4
    for lines in (["devices = 3"], ["devices = 0"], ["devices = 16"]):
        with pytest.raises(RecipeError, match=r"multiple of devices.*batch_size=8, devices="):
            read_recipe(write_recipe_file(*lines))
    tiny = read_recipe(write_recipe_file("devices = 3", "batch_size = 33")).tiny()
    assert (tiny.batch_size, tiny.devices) == (24, 3)


def test_more_devices_than_there_are_are_refused(data, write_recipe_file, tmp_path, monkeypatch):
    from training.run import train

    monkeypatch.delenv("BLASTOSCOPE_VIRTUAL_DEVICES", raising=False)
    with pytest.raises(RunError, match="asks for 8 devices"):
        train(write_recipe_file("devices = 8"), data, tmp_path / "out", log=lambda line: None)
    assert not (tmp_path / "out").exists()


CLEARED = """
import platform, resource, sys, threading
import numpy as np
from training.devices import keep_memory

if "keep" in sys.argv:
    keep_memory()

def clear():
    for _ in range(2):  # the first time everyone clears
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            [np.ones(size, "uint8") for size in (50_000_000, *[20_000_000] * 10)]
        cleared.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

cleared, thread = [], threading.Thread(target=clear)
if "thread" in sys.argv:
    thread.start()
    thread.join()
else:
    clear()
print(platform.libc_ver()[0], cleared[1])
"""


@pytest.mark.parametrize("place", ["first", "thread"])
def test_a_run_keeps_its_memory_for_the_next_step(repository, place):
    """Pages that the kernel clears for 8 steps, each a batch of 50 MB and ten blocks of 20: but for glibc nothing changes."""
    pages = {}
    for memory in ("give", "keep"):
        command = [sys.executable, "-c", CLEARED, place, memory]
        library, pages[memory] = subprocess.run(
            command, cwd=repository, capture_output=True, text=True, check=True
        ).stdout.split()
    assert library != "glibc" or int(pages["keep"]) < int(pages["give"]) / 10
