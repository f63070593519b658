"""The Models page on checkpoints of its own: with weights, without, by image, and older ones."""

import json
import re
import shutil
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

import model_zoo
from training import results
from training.metrics import PAIRED
from training.results import METRICS, list_systems
from training.sweep import write_table

PAGE = str(Path(__file__).parents[2] / "pages" / "models.py")
HISTORY = "fold,epoch,loss,learning_rate,validation_auroc,seconds\nfold_0,1,0.7,1e-3,0.8,60\nfold_0,2,0.5,1e-3,,120\n"


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """The folder that stands in for the bundled checkpoints."""
    monkeypatch.setattr("model_zoo._checkpoint.BUNDLED", tmp_path / "zoo")
    monkeypatch.setenv("BLASTOSCOPE_RUNS", str(tmp_path / "runs"))
    st.cache_data.clear()
    yield tmp_path / "zoo"
    st.cache_data.clear()


@pytest.fixture
def put(zoo, repository, make_card):
    """put(name, recipe=, weights=, **changes of the card): a checkpoint folder whose predictions fit its card."""

    def put(name: str, *, recipe: str = "vgg16_by_subject", weights: bool = False, **changes) -> Path:
        folder = zoo / name
        folder.mkdir(parents=True)
        card = make_card(name=name, **{"architecture": "vgg16"} | changes)
        card.write(folder / "card.json")
        shutil.copy(repository / "training" / "recipes" / f"{recipe}.toml", folder / "recipe.toml")
        (folder / "history.csv").write_text(HISTORY)
        rows = ["file,subject,y_true,logit,p_all,threshold,fold"]
        for subject, y_true, n, called in card.subjects:
            shown = [0.6 + i / 300 if i < called else i / 300 for i in range(n)]
            rows += [f"{subject}_{i},{subject},{y_true},0,{p:.3f},0.5,fold_0" for i, p in enumerate(shown)]
        (folder / "predictions.csv").write_text("\n".join(rows) + "\n")
        if weights:
            (folder / "model.onnx").write_bytes(b"no page reads this")
        return folder

    return put


BY_IMAGE = {
    "title": "VGG16, as published",
    "split": {"protocol": "image-level", "sentence": "image-level split: cells of a patient on both sides."},
    "metrics": {"auroc": [0.99, 0.98, 0.995], "accuracy": [0.95, 0.93, 0.96]},
}


@pytest.fixture
def three(put):
    """A network that reads cells; VGG16's figures on unseen patients, and by image."""
    put("tiny", architecture="mobilenet_v2", recipe="mobilenet_v2", weights=True)
    put("vgg16_by_subject", title="VGG16", paper="001", metrics={"auroc": [0.81, 0.7, 0.9], "accuracy": [0.75, 0.6, 0.8]})
    put("vgg16_as_published", recipe="vgg16_as_published", paper="001", **BY_IMAGE)


def opened(row: int | None = None) -> AppTest:
    """The page with a row of the table chosen."""
    page = AppTest.from_file(PAGE, default_timeout=120)
    if row is not None:
        page.session_state[f"systems {len(list_systems())}"] = {"selection": {"rows": [row], "columns": [], "cells": []}}
    page.run()
    assert not page.exception
    return page


def words(page) -> str:
    return "\n".join(str(e.value) for kind in (page.markdown, page.caption, page.warning) for e in kind)


def test_every_system_stands_in_the_table_with_its_split_first(three):
    page = opened()
    table = page.dataframe[0].value
    assert next(iter(table.columns)) == "tested on"
    assert list(table["network"])[:3] == ["Tiny", "VGG16", "VGG16, as published"]
    assert list(table["tested on"])[:4] == ["unseen patients"] * 2 + ["known patients", "not run yet"]
    assert list(table["its weights"])[:4] == ["can read cells", "figures only", "figures only", ""]
    assert table["AUROC (95%)"][1] == "0.81 (0.70–0.90)"
    paper = table["its paper, and what that reports"]
    assert (paper[0], paper[2]) == ("ours", "Mir & Nissa 2019 (001): accuracy 84.8% (by image: validation part)")
    assert table["training"][0] == "0 epochs, 1 second, NONE"
    assert {"SE-ResNeXt50", "Six-block CNN", "ALLNet", "EfficientNetB3", "Vanilla 1C1D, as published"} <= set(table["network"])
    assert set(table["AUROC (95%)"][3:]) == {""}
    assert "**3 networks were measured here; 1 of them can read cells.**" in words(page)
    assert "#### Tiny" in words(page)  # what new cases open with


def test_a_card_without_weights_shows_its_figures_and_how_to_train_it(three):
    page = opened(1)
    shown = words(page)
    assert "#### VGG16" in shown
    assert "**Split by subject: tested on unseen patients.**" in shown
    assert "0.81 (0.70–0.90)" in shown and "on 600 ALL cells of 6 subjects and 600 HEM cells of 6 subjects" in shown
    assert "never saw the subject" in shown
    assert "Figures only: its weights are not bundled. Train it on the Train page" in shown
    assert "Mir & Nissa 2019 (001), reports accuracy 84.8%" in shown
    assert "Called ALL: 543 of 600 ALL cells and 39 of 600 HEM cells" in shown
    assert len(page.get("plotly_chart")) == 5  # ROC, reliability, subjects, training; the comparison of splits
    assert 'architecture = "vgg16"' in page.code[0].value
    assert set(page.dataframe[1].value["on unseen patients"]) == {"AUROC", "Accuracy"}  # what this card has


def test_a_split_by_image_is_never_called_unseen(three):
    page = opened(2)
    card = words(page).partition("#### What the split does")[0].partition("#### VGG16")[2]
    assert "**Split by image: tested on other cells of the same patients.** Image-level split" in card
    assert "other cells of whom trained it" in card
    assert "unseen" not in card and "never saw" not in card
    assert next(iter(page.dataframe[1].value.columns)) == "on other cells of the same patients"


def test_a_system_that_was_not_run_shows_its_recipe_and_the_papers_figure(three):
    systems = list_systems()
    page = opened([s.name for s in systems].index("six_block_cnn_as_published"))
    assert "**Not run yet.** Split by image" in words(page)
    assert "reports accuracy 93.02% (by image: validation part)" in words(page)
    assert "`python -m training training/recipes/six_block_cnn_as_published.toml --data FOLDER`" in words(page)
    assert len(page.get("plotly_chart")) == 1
    assert 'architecture = "six_block_cnn"' in page.code[0].value


def test_splits_are_compared_with_what_else_differs(three, put):
    page = opened()
    assert "97.75%" in words(page) and "88.9%" in words(page)
    assert names_compared(page) == {"VGG16 *"}
    assert "\\* By image as published, on unseen patients by our own recipe." in words(page)
    put("vgg16_image_level", **BY_IMAGE)
    st.cache_data.clear()
    page = opened()
    assert names_compared(page) == {"VGG16 *", "VGG16"}
    next(g for g in page.segmented_control if g.label == "Figure").set_value("weighted_f1").run()
    assert not page.exception and names_compared(page) == set()  # these cards have none


def names_compared(page) -> set[str]:
    figure = json.loads(page.get("plotly_chart")[-1].proto.spec)
    return {name for trace in figure["data"] for name in trace.get("y") or ()}


def test_nothing_to_compare_is_said(put):
    put("tiny", weights=True)
    page = opened()
    assert "No network was measured both ways yet" in words(page)
    assert len(page.get("plotly_chart")) == 4


def test_sweeps_tell_luck_from_a_difference(three, tmp_path):
    assert "#### Sweeps" not in words(opened())
    figure = {"mean": 0.8, "_min": 0.7, "_max": 0.9}
    row = {"recipe": "mobilenet_v2", "title": "MobileNetV2", "protocol": "by subject", "seeds": 3, "runs": 15, "cells": 900}
    row |= {f"{m}{end}": figure[end or "mean"] for m in METRICS for end in ("", "_min", "_max")}
    row |= {"against": "", "shared_cells": 0} | {f"{m}_gap{end}": None for m in PAIRED for end in ("", "_low", "_high")}
    gaps = {"auroc": (0.05, 0.01, 0.09), "accuracy": (0.02, -0.01, 0.05), "weighted_f1": (-0.03, -0.05, -0.01)}
    other = row | {"recipe": "allnet", "title": "ALLNet", "against": "mobilenet_v2", "shared_cells": 900}
    for metric, values in gaps.items():
        other |= {f"{metric}_gap{end}": v for end, v in zip(("", "_low", "_high"), values, strict=True)}
    folder = tmp_path / "runs" / "sweeps" / "both"
    folder.mkdir(parents=True)
    write_table(folder / "table.csv", [row, other])
    page = opened()
    shown = words(page).partition("#### Sweeps")[2]
    assert "on 900 cells that both held out: AUROC +0.050 (95% +0.010 to +0.090): **better**." in shown
    assert shown.count("against") == 1 and len(page.get("plotly_chart")) == 6
    table = page.dataframe[-1].value
    assert list(table["recipe"]) == ["mobilenet_v2", "allnet"] and set(table["tested on"]) == {"unseen patients"}
    assert set(table["AUROC, mean (lowest–highest)"]) == {"0.80 (0.70–0.90)"}
    for name, verdict in (("accuracy", "not told apart by these subjects"), ("weighted_f1", "worse")):
        page.segmented_control(key="sweep figure").set_value(name).run()
        assert f"**{verdict}**." in words(page)
    for damaged in (b"recipe\na\n", b"\xff\xfe"):
        (folder / "table.csv").write_bytes(damaged)
        assert re.search(r"table\\.csv is no table of a sweep", words(opened()))


def test_an_old_or_incomplete_folder_shows_what_it_has(put):
    folder = put("tiny", weights=True)
    (folder / "history.csv").write_text("epoch,loss,validation_auroc,seconds\n1,0.7,0.8,60\n")
    (folder / "recipe.toml").unlink()
    assert len(opened().get("plotly_chart")) == 4
    (folder / "history.csv").write_text("fold,epoch,loss,validation_auroc\nall,0,,\n")
    assert "No epochs" in words(opened())
    (folder / "predictions.csv").unlink()
    page = opened()
    assert "holds no held\\-out predictions" in words(page)
    assert "AUROC" in set(page.dataframe[1].value["on unseen patients"])


def test_a_damaged_card_is_a_sentence(put):
    put("tiny", weights=True)
    (put("broken") / "card.json").write_text("{")
    page = opened()
    assert re.search(r"broken.*card.*is no readable card", words(page))
    assert not page.dataframe


@pytest.fixture
def promote(put, tmp_path):
    """promote("run-1"): a copy of `tiny` on the promoted shelf, as another process puts it there."""

    def promote(name: str) -> Path:
        shelf = tmp_path / "runs" / "promoted"
        shelf.mkdir(parents=True)
        folder = shutil.move(put(name, weights=True), shelf / name)
        (shelf / "history.json").write_text(json.dumps([{"name": name, "run": name, "promoted": "2026-01-01T10:00:00"}]))
        return folder

    return promote


def test_a_network_promoted_a_moment_ago_breaks_nothing(three, promote):
    before = opened()  # reads the systems, which are kept for some seconds
    promote("run-1")
    page = opened()
    assert list(page.dataframe[0].value["network"]) == list(before.dataframe[0].value["network"])
    assert "#### Tiny" in words(page)
    st.cache_data.clear()
    assert "run-1" in {s.name for s in list_systems()} and not opened().exception


@pytest.mark.parametrize(
    "spoil", [{"metrics": {}}, {"metrics": {"auroc": None}}, {"operating_points": {}}, {"split": {}}, None]
)
def test_a_damaged_promotion_is_left_out_and_told(three, promote, spoil):
    card = promote("run-1") / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | spoil) if spoil else "{")
    assert model_zoo.default_checkpoint() == "tiny" and "run-1" not in {card.name for card in model_zoo.list_cards()}
    page = opened()
    assert re.search(r"run\\-1.card\\.json is no readable card.*It is left out", words(page))
    assert "#### Tiny" in words(page) and len(page.dataframe[0].value)


@pytest.mark.parametrize("name", [card.name for card in model_zoo.list_cards()])
def test_every_bundled_card_can_be_opened(name, monkeypatch, tmp_path):
    monkeypatch.setenv("BLASTOSCOPE_RUNS", str(tmp_path))
    st.cache_data.clear()
    systems = list_systems()
    row = [s.name for s in systems].index(name)
    page = opened(row)
    card = systems[row].card
    low, high = card.metrics["auroc"][1:]
    assert f"tested on {results.tested_on(card)}." in words(page) and f"({low:.2f}–{high:.2f})" in words(page)
    assert len(page.get("plotly_chart")) >= 3
