"""Every benchmark explains itself, refuses clearly without data, and one runs from files to its table. No clock is judged."""

import os
import pkgutil
import subprocess
import sys

import pytest

import benchmarks

SCRIPTS = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))


def run(repository, script, *arguments, data="") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", *arguments],
        cwd=repository,
        env=os.environ | {"BLASTOSCOPE_DATA": str(data)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def drawn_data(tmp_path_factory, draw_cell, encode):
    """A data folder of drawn cells, laid out as the real one."""
    root = tmp_path_factory.mktemp("data")
    for seed, label in enumerate(["all", "hem", "all", "hem"]):
        file = root / "cnmc" / "fold_0" / label / f"UID_{'h' if label == 'hem' else ''}{seed + 1}_1_1_{label}.webp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(draw_cell(seed), "WEBP"))
    return root


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_states_the_command(repository, script):
    done = run(repository, script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m benchmarks.{script}" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_data_is_one_sentence(repository, script, tmp_path):
    done = run(repository, script, data=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: $BLASTOSCOPE_DATA") and str(tmp_path) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_make_bench_runs_every_script(repository):
    makefile = (repository / "Makefile").read_text()
    assert [name for name in SCRIPTS if f"-m benchmarks.{name}\n" not in makefile] == []


def test_throughput_prints_its_table(repository, drawn_data, tiny_checkpoint):
    done = run(repository, "throughput", "--cells", "4", "--rounds", "1", "--checkpoint", str(tiny_checkpoint), data=drawn_data)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:5]] == [
        "this app, BMP files",
        "this app, lossless WebP files as stored",
        "Pillow resize, Keras model.predict one by one",
    ]
    for _, milliseconds, per_second, ratio in rows[2:]:
        assert float(milliseconds) > 0 and float(per_second) > 0 and float(ratio) > 0
    assert rows[2][3].strip() == "1.00"


def test_throughput_refuses_cells_that_do_not_compare(repository, drawn_data, tiny_checkpoint, tmp_path, encode):
    """A refused cell costs no forward pass: its speed would flatter us."""
    import numpy as np

    file = tmp_path / "cnmc" / "fold_0" / "all" / "UID_1_1_1_all.webp"
    file.parent.mkdir(parents=True)
    file.write_bytes(encode(np.zeros((450, 450, 3), "uint8"), "WEBP"))
    done = run(repository, "throughput", "--cells", "1", "--rounds", "1", "--checkpoint", str(tiny_checkpoint), data=tmp_path)
    assert done.returncode == 1
    assert "1 cells were refused" in done.stderr


def test_unknown_checkpoint_is_one_sentence(repository, drawn_data):
    done = run(repository, "throughput", "--checkpoint", "no such network", data=drawn_data)
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no checkpoint 'no such network'")
