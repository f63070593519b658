"""The rules of the house, read from the source with `ast`: see CONTRIBUTING.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
RANK = {"app": 5, "pages": 4, "ui": 3, "records": 2, "training": 2, "inference": 1, "model_zoo": 0}
HEAVY = {"tensorflow", "keras", "torch", "jax", "tf_keras_vis"}


def imports(file):
    """Top-level names of every module that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0] if node.level == 0 else package_of(file)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield from (str(a.value).partition(".")[0] for a in node.args if isinstance(a, ast.Constant))


def package_of(file):
    return file.relative_to(REPOSITORY).parts[0].removesuffix(".py")


def sources(*packages):
    files = [f for p in packages for f in (REPOSITORY / f"{p}.py", *(REPOSITORY / p).rglob("*.py")) if f.is_file()]
    return {str(f.relative_to(REPOSITORY)): set(imports(f)) for f in sorted(files)}


def tracked():
    """Files of the repository, those to be added included."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split("\0")
    files = [REPOSITORY / name for name in listed if name]
    assert REPOSITORY / "tests" / "test_house.py" in files
    return [file for file in files if file.is_file()]


def test_streamlit_stays_in_the_screens():
    below = sources("records", "training", "inference", "model_zoo")
    assert below and [name for name, used in below.items() if "streamlit" in used] == []


def test_keras_stays_out_of_the_screens_and_records():
    above = sources("app", "pages", "ui", "records")
    assert above and {name: used & HEAVY for name, used in above.items() if used & HEAVY} == {}


def test_imports_point_down():
    upwards = []
    for name, used in sources(*RANK).items():
        mine = package_of(REPOSITORY / name)
        upwards += [f"{name} imports {other}" for other in used & RANK.keys() - {mine} if RANK[other] >= RANK[mine]]
    assert upwards == []


def test_pages_are_run_and_never_imported():
    every = sources(*RANK, "tests", "benchmarks")
    assert "pages" not in set().union(*every.values()) and "app" not in set().union(*every.values())


@pytest.mark.parametrize("module", ["inference.cells", "inference.patients", "inference.synthetic", "model_zoo"])
def test_first_screen_waits_for_no_framework(module):
    script = f"import sys, {module}; print(*sorted({HEAVY} & {{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_importing_rule_reader_sees_every_form(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    import a.b\n    from c.d import e\n    __import__('g.h')\n")
    assert set(imports(file)) == {"a", "c", "g"}


def test_no_file_of_the_data_set_is_in_the_repository():
    pictures = re.compile(r"^UID_.*\.(bmp|png|webp|jpe?g|tiff?)$", re.IGNORECASE)
    assert [f for f in tracked() if pictures.match(f.name)] == []


def test_no_real_cell_is_in_the_repository(data_root):
    """No tracked file has the bytes of a data file, whatever its name."""
    by_size = {}
    for file in data_root.rglob("*"):
        if file.is_file():
            by_size.setdefault(file.stat().st_size, []).append(file)
    mine = [(f, g) for f in tracked() for g in by_size.get(f.stat().st_size, ())]
    assert [f for f, g in mine if f.stat().st_size and f.read_bytes() == g.read_bytes()] == []


def test_no_file_is_over_95_mb():
    assert [f for f in tracked() if f.stat().st_size > 95_000_000] == []
