"""What the papers report, and the table beside it, from cards of the test's own."""

import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from training.results import PAPERS, RECIPES, REPORTED, both_ways, list_systems, main, read_history, table

KEYS = "protocol", "paper", "architecture"
PUBLISHED = sorted(RECIPES.glob("*_as_published.toml"))


@pytest.fixture
def put(tmp_path, make_card):
    """put(name, recipe file of this repository, **changes of the card), in a folder of checkpoints."""

    def put(name, recipe, **changes):
        folder = tmp_path / "zoo" / name
        folder.mkdir(parents=True)
        make_card(name=name, **changes).write(folder / "card.json")
        shutil.copy(RECIPES / recipe, folder / "recipe.toml")
        return folder

    return put


BY_IMAGE = {"split": {"protocol": "image-level", "sentence": "By image."}}


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda f: f.stem)
def test_reported_figures_are_those_of_the_recipes_header(file):
    """The two were read from the papers apart."""
    recipe = tomllib.loads(file.read_text())
    header = file.read_text().partition("architecture =")[0]
    numbers = {float(n) for n in re.findall(r"(?<![\d.])\d*\.\d+|(?<![\d.])\d+(?= %)", header)}
    for reported in REPORTED[recipe["architecture"]]:
        assert reported.paper == recipe["paper"] and reported.paper in PAPERS
        if reported.cells == "final test set":  # the header gives the preliminary one
            continue
        value = reported.value
        assert any(abs(n - value) < 6e-4 or abs(n - 100 * value) < 6e-3 for n in numbers), (reported, sorted(numbers))


def test_every_architecture_of_a_paper_has_its_figure():
    recipes = [tomllib.loads(file.read_text()) for file in PUBLISHED]
    papers_own = {name for name in REPORTED if not name.endswith((".pooled", ".turned"))}
    assert len(recipes) > 20 and {recipe["architecture"] for recipe in recipes} == papers_own


def test_paper_004_and_002_are_quoted_with_their_splits():
    assert str(REPORTED["efficientnet_b3"][0]) == "accuracy 97.75% (by image: test part)"
    assert str(REPORTED["se_resnext50"][1]) == "weighted F1 89.81% (unseen patients: the best of them)"
    assert str(REPORTED["allnet"][1]) == "AUROC 0.960 (by image: test part)"


def test_systems_are_the_cards_and_the_recipes_that_have_none(tmp_path, put):
    put("vgg16", "vgg16_by_subject.toml", architecture="vgg16", metrics={"auroc": [0.7, 0.6, 0.8]})
    put("allnet", "allnet.toml", architecture="allnet", metrics={"auroc": [0.9, 0.8, 0.95]})
    put("leak", "vgg16_as_published.toml", architecture="vgg16", metrics={"auroc": [0.99, 0.9, 1.0]}, **BY_IMAGE)
    (put("reader", "mobilenet_v2.toml", metrics={"auroc": [0.6, 0.5, 0.7]}) / "model.onnx").write_bytes(b"not read")
    systems = list_systems(tmp_path / "zoo")
    assert [s.name for s in systems if s.card] == ["reader", "allnet", "vgg16", "leak"]
    assert [s.name for s in systems if s.reads_cells] == ["reader"]
    assert [s.paper for s in systems[:4]] == ["", "003", "001", "001"]
    waiting = {s.name for s in systems[4:]}
    assert {"vgg16_allnet_baseline_by_subject", "efficientnet_b3_as_published", "allnet_as_published"} <= waiting
    assert not waiting & {"vgg16_by_subject", "vgg16_as_published", "allnet", "mobilenet_v2"}
    assert systems[4].recipe_path.startswith("training/recipes/")


def test_pairs_prefer_the_same_recipe(tmp_path, put):
    put("vgg16_by_subject", "vgg16_by_subject.toml", architecture="vgg16", metrics={"auroc": [0.8, 0.7, 0.9]})
    put("other", "vgg16_as_published.toml", architecture="vgg16", metrics={"auroc": [0.9, 0.8, 1.0]})
    put("by_image", "vgg16_by_subject.toml", architecture="vgg16", **BY_IMAGE)
    put("published", "resnet50_as_published.toml", architecture="resnet50", **BY_IMAGE)
    found = [(a.name, b.name, same) for a, b, same in both_ways(list_systems(tmp_path / "zoo"))]
    assert found == [("vgg16_by_subject", "by_image", True)]
    (tmp_path / "zoo" / "by_image" / "recipe.toml").unlink()
    found = [(a.name, b.name, same) for a, b, same in both_ways(list_systems(tmp_path / "zoo"))]
    assert found == [("other", "by_image", False)]  # the best, and it cannot be known what else differs


def test_the_table_has_every_system_both_ways_and_leaves_no_gap_unsaid(tmp_path, put, capsys):
    training = {"epochs": 3, "best_epoch": 2, "cells_drawn": 12800, "networks": 5, "hours": 2.34, "device": "gpu:0"}
    metrics = {"auroc": [0.8, 0.7, 0.9], "accuracy": [float("nan")] * 3}
    put("vgg16", "vgg16_by_subject.toml", title="VGG16", architecture="vgg16", metrics=metrics, training=training)
    put("leak", "vgg16_as_published.toml", title="VGG16, as published", architecture="vgg16", **BY_IMAGE)
    assert main([str(tmp_path / "zoo")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    head = rows[0]
    assert {len(row) for row in rows} == {len(head)}
    (vgg16,) = [dict(zip(head, row, strict=True)) for row in rows if row[0] == "VGG16"]
    assert vgg16["paper"] == "Mir & Nissa 2019 (001)" and vgg16["tested on"] == "unseen patients"
    assert (vgg16["AUROC"], vgg16["accuracy"], vgg16["weighted F1"]) == ("0.80 (0.70–0.90)", "–", "–")
    assert [vgg16[name] for name in ("training", "time", "device")] == ["12,800 cells drawn by 5 networks", "2.3 hours", "GPU"]
    assert vgg16["the paper reports"] == "accuracy 84.8% (by image: validation part)"
    (leak,) = [dict(zip(head, row, strict=True)) for row in rows if row[0] == "VGG16, as published"]
    assert leak["tested on"] == "other cells of the same patients" and leak["training"] == "0 epochs"
    assert rows[rows.index(list(vgg16.values())) + 1][0] == "VGG16, as published"
    assert any(row[head.index("tested on")] == "not run yet (unseen patients)" for row in rows)
    assert len(rows) - 2 == len(list_systems(tmp_path / "zoo"))


def test_a_damaged_card_ends_with_its_name(tmp_path, put, capsys):
    (put("broken", "allnet.toml") / "card.json").write_text("{")
    assert main([str(tmp_path / "zoo")]) == 2
    assert "broken" in capsys.readouterr().err


def test_history_of_old_and_new_runs(tmp_path):
    assert read_history(tmp_path) == []
    (tmp_path / "history.csv").write_text("epoch,loss,validation_auroc,seconds\n1,0.5,,60\n")
    (row,) = read_history(tmp_path)
    assert row["fold"] == "" and row["loss"] == 0.5 and row["validation_auroc"] != row["validation_auroc"]
    (tmp_path / "history.csv").write_text("fold,epoch,loss\nfold_1,1,0.5\n")
    assert read_history(tmp_path)[0]["fold"] == "fold_1"


def test_no_framework_is_loaded(repository):
    """The Models page lists what a hundred files say; TensorFlow would take seconds."""
    script = (
        "import sys, training.results as r; r.both_ways(r.list_systems()); print(*{'tensorflow', 'keras'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_bundled_cards_are_in_the_table():
    import model_zoo

    printed = table()
    assert all(f"| {card.title} |" in printed for card in model_zoo.list_cards())


def test_the_document_holds_the_table_of_the_bundled_cards(repository):
    assert table(repository / "model_zoo" / "checkpoints") in (repository / "docs" / "results.md").read_text("utf-8")
