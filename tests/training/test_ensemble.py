"""Ensembles: members beside them, one card, one set of held-out figures."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from inference.cells import score_files
from inference.engine import Engine
from inference.images import frame_cell, resize_cells
from inference.sources import open_paths
from model_zoo import Card, CheckpointError, FrameSpec, list_checkpoints, load_checkpoint
from training.__main__ import main
from training.compare import read_predictions
from training.ensemble import join
from training.errors import RunError
from training.jobs import delete_run
from training.metrics import auroc

FOLDS = ("fold_0", "fold_1", "fold_2")


def predict(folder, seed, *, skill=1.5, folds=FOLDS):
    """Held-out logits of 12 subjects in three folds, of a network that errs in its own way."""
    rng = np.random.default_rng(seed)
    lines = ["file,subject,y_true,logit,p_all,threshold,fold"]
    for i in range(12):
        y = i % 2
        for cell in range(20):
            logit = skill * (2 * y - 1) + rng.normal(0, 2)
            name = f"UID_{'' if y else 'H'}{i}_1_{cell}_{'all' if y else 'hem'}.bmp"
            lines.append(f"{name},{'' if y else 'H'}{i},{y},{logit:.9g},{1 / (1 + np.exp(-logit)):.6f},0.5,{folds[i // 4]}")
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def shelf(tiny_checkpoint, tmp_path, make_card):
    """Two checkpoints beside each other, the second of its own size."""
    import keras

    import model_zoo
    from model_zoo._checkpoint import hash_weights
    from model_zoo._onnx import write_onnx

    told = {"epochs": 0, "best_epoch": 0, "cells_drawn": 0, "networks": 4, "hours": 0.1, "device": "CPU"}
    told |= {"start": "random weights", "teacher": ""}
    split = {"protocol": "by subject", "sentence": "Unseen subjects.", "folds": 3, "test_folds": list(FOLDS), "seed": 0}
    for seed, (name, size) in enumerate((("one", 96), ("two", 64))):
        folder = tmp_path / "shelf" / name
        shutil.copytree(tiny_checkpoint, folder)
        if size != 96:
            keras.utils.set_random_seed(seed)
            write_onnx(model_zoo.find_architecture("mobilenet_v2").build(input_size=size), folder / "model.onnx")
        card = make_card(name=name, title=name.title(), framing=FrameSpec(crop=300, size=size), training=told, split=split)
        data = card.data | {"training_subjects": ["1", "H2"]}
        replace(card, weights_sha256=hash_weights(folder / "model.onnx"), data=data).write(folder / "card.json")
        predict(folder, seed)
    return tmp_path / "shelf"


def joined(shelf):
    folders = [str(shelf / name) for name in ("one", "two")]
    assert main(["ensemble", *folders, "--out", str(shelf / "both"), "--title", "Both"]) == 0
    return load_checkpoint(shelf / "both")


def test_an_ensemble_was_trained_on_what_any_member_was(shelf):
    (shelf / "one" / "trained_on.txt").write_text("aa\nbb\n")
    (shelf / "two" / "trained_on.txt").write_text("bb\ncc\n")
    table = shelf / "one" / "predictions.csv"
    head, first, *rest = table.read_text().splitlines()
    lines = [f"cell_hash,{head}", f"aa,{first}", *(f"{i:x},{row}" for i, row in enumerate(rest, 4096))]
    table.write_text("\n".join(lines))
    join([shelf / "one", shelf / "two"], shelf / "both", title="Both")
    trained = load_checkpoint(shelf / "both").trained_on
    assert trained.keys() == {"aa", "bb", "cc"} and trained["bb"] is trained["cc"] is None
    both = read_predictions(shelf / "both")
    assert trained["aa"] == (both["p_all"][0], both["p_all"][0] >= both["threshold"][0])


def test_it_reads_the_mean_of_its_members_logits(shelf, draw_cell):
    ensemble, members = joined(shelf), [load_checkpoint(shelf / name) for name in ("one", "two")]
    assert ensemble.card.members == ["one", "two"] and [m.name for m in ensemble.networks] == ["one", "two"]
    cells = [draw_cell(i, axes=(100 + 10 * i, 150)) for i in range(5)]
    logits = []
    for member in members:
        p_all, _ = Engine(member).predict(np.stack([frame_cell(cell, member.card.framing) for cell in cells]))
        logits.append(np.log(p_all / (1 - p_all)) * member.card.temperature)
    engine = Engine(ensemble)
    p_all, embedding = engine.predict(np.stack([frame_cell(cell, ensemble.card.framing) for cell in cells]))
    expected = 1 / (1 + np.exp(-np.mean(logits, axis=0) / ensemble.card.temperature))
    np.testing.assert_allclose(p_all, expected, atol=1e-4)
    assert embedding.shape == (5, 2560) and engine.predict(np.zeros((0, 300, 300, 3), "uint8"))[0].shape == (0,)
    turned, _ = engine.over(8).predict(np.stack([frame_cell(cell, ensemble.card.framing) for cell in cells]))
    assert turned.shape == (5,) and not np.array_equal(turned, p_all)


def test_members_get_what_they_would_get_alone(draw_cell):
    cell = draw_cell(3)
    window = frame_cell(cell, FrameSpec(crop=300, size=300))
    for size in (64, 96, 192, 300):
        alone = frame_cell(cell, FrameSpec(crop=300, size=size))
        assert np.array_equal(resize_cells(window[None], size)[0], alone)


def test_its_figures_are_of_the_mean_of_held_out_logits(shelf):
    card = joined(shelf).card
    one, two, both = (read_predictions(shelf / name) for name in ("one", "two", "both"))
    np.testing.assert_allclose(both["logit"], (one["logit"] + two["logit"]) / 2, atol=1e-6)
    assert list(both["file"]) == list(one["file"])
    assert card.metrics["auroc"][0] == pytest.approx(auroc(both["y_true"], both["p_all"]), abs=1e-3)
    singles = [auroc(table["y_true"], table["logit"]) for table in (one, two)]
    assert auroc(both["y_true"], both["logit"]) > max(singles)  # they err apart
    assert {k: len(set(both["threshold"][both["fold"] == k])) for k in FOLDS} == dict.fromkeys(FOLDS, 1)
    assert card.framing == FrameSpec(crop=300, size=300) and card.training["networks"] == 8
    assert sum(n for _, _, n, _ in card.subjects) == 240 and card.data["training_subjects"] == ["1", "H2"]


def test_it_stands_in_the_menus_while_its_members_are_there(shelf):
    joined(shelf)
    assert {card.name for card in list_checkpoints(shelf)} == {"one", "two", "both"}
    (shelf / "two" / "model.onnx").unlink()
    assert {card.name for card in list_checkpoints(shelf)} == {"one"}
    with pytest.raises(CheckpointError, match="two has a card but no"):
        load_checkpoint(shelf / "both")


def test_another_network_in_a_members_place_is_refused(shelf):
    joined(shelf)
    for name in ("model.onnx", "card.json"):
        shutil.copy(shelf / "one" / name, shelf / "two" / name)
    with pytest.raises(CheckpointError, match="a member was altered"):
        load_checkpoint(shelf / "both")


def test_a_member_is_found_by_its_folder_whatever_its_card_is_called(shelf):
    (shelf / "one").rename(shelf / "first")
    assert main(["ensemble", str(shelf / "first"), str(shelf / "two"), "--out", str(shelf / "both"), "--title", "Both"]) == 0
    assert [member.name for member in load_checkpoint(shelf / "both").members] == ["one", "two"]


def test_a_run_that_an_ensemble_needs_is_not_deleted(shelf, monkeypatch):
    joined(shelf)
    monkeypatch.setenv("BLASTOSCOPE_RUNS", str(shelf))
    for name in ("one", "two"):
        (shelf / name / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"member of the ensemble .*both"):
        delete_run("one")
    shutil.rmtree(shelf / "both")
    delete_run("one")
    assert not (shelf / "one").exists()


def test_a_member_that_kept_no_network_is_told(shelf, capsys):
    change(shelf / "one", weights_sha256="")
    assert main(["ensemble", str(shelf / "one"), str(shelf / "two"), "--out", str(shelf / "x"), "--title", "X"]) == 2
    assert "figures and no network" in capsys.readouterr().err


def test_an_ensemble_of_itself_is_refused(shelf):
    joined(shelf)
    change(shelf / "both", members=["both", "two"])
    with pytest.raises(CheckpointError, match="joins ensembles"):
        load_checkpoint(shelf / "both")


def test_it_scores_files_as_any_other_network(shelf, drawn_cells):
    results = list(score_files(open_paths(sorted((drawn_cells / "all").glob("*"))[:4]), Engine(joined(shelf))))
    assert len(results) == 4 and all(0 < result.p_all < 1 for result in results)


def test_grad_cam_is_the_mean_over_its_networks(shelf, draw_cell):
    from inference.explain import Explainer, average_cams

    ensemble = joined(shelf)
    explainer = Explainer(ensemble)
    window = frame_cell(draw_cell(1), ensemble.card.framing)[None]
    alone = [Explainer(member).cam(resize_cells(window, member.card.framing.size), "ALL") for member in ensemble.networks]
    np.testing.assert_allclose(explainer.cam(window, "ALL"), average_cams(alone), rtol=1e-4, atol=1e-7)
    assert explainer.layers == ["out_relu", "out_relu"]


def test_averaged_maps_count_by_area():
    from inference.explain import average_cams

    coarse, fine = np.ones((1, 2, 2), "float32"), np.ones((1, 4, 4), "float32")
    assert average_cams([coarse, fine]).shape == (1, 4, 4)
    np.testing.assert_allclose(average_cams([coarse, fine]), (4 + 16) / 2)  # one of the coarse places is four of the fine


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda shelf: predict(shelf / "two", 1, folds=("fold_0", "fold_2", "fold_1")), "same cells in the same folds"),
        (lambda shelf: predict(shelf / "two", 1, folds=("fold_0",) * 3), "same cells in the same folds"),
        (lambda shelf: change(shelf / "two", framing={"crop": 400, "size": 64}), "cuts another window"),
        (lambda shelf: change(shelf / "two", rotations=8), "over 8 rotations, one over 1"),
        (lambda shelf: (shelf / "two" / "predictions.csv").unlink(), "no held-out predictions"),
        (lambda shelf: cut(shelf / "two" / "predictions.csv", columns=6), "no held-out predictions"),
        (lambda shelf: cut(shelf / "two" / "predictions.csv", characters=40), "no held-out predictions"),
    ],
)
def test_networks_that_do_not_fit_together_are_refused(spoil, named, shelf, capsys):
    spoil(shelf)
    folders = [str(shelf / name) for name in ("one", "two")]
    assert main(["ensemble", *folders, "--out", str(shelf / "both"), "--title", "Both"]) == 2
    assert named in capsys.readouterr().err and not (shelf / "both").exists()


def cut(table, *, columns=None, characters=None):
    lines = [",".join(line.split(",")[:columns]) for line in table.read_text().splitlines()]
    table.write_text("\n".join(lines)[: -characters if characters else None])


def change(folder, **fields):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | fields))


def test_it_lies_beside_its_members_and_overwrites_nothing(shelf, tmp_path):
    from training.ensemble import join

    folders = [shelf / "one", shelf / "two"]
    with pytest.raises(RunError, match="must lie beside"):
        join(folders, tmp_path / "elsewhere", title="Both")
    with pytest.raises(RunError, match="already holds"):
        join(folders, shelf / "one", title="Both")
    with pytest.raises(RunError, match="two checkpoints or more"):
        join(folders[:1], shelf / "both", title="Both")
    with pytest.raises(RunError, match="each once"):
        join([shelf / "one", shelf / "one"], shelf / "both", title="Both")
    joined(shelf)
    with pytest.raises(RunError, match="an ensemble itself"):
        join([shelf / "both", shelf / "one"], shelf / "more", title="More")
    assert isinstance(Card.read(shelf / "both" / "card.json"), Card)
