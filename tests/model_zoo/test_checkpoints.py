import json
import shutil
from dataclasses import replace

import pytest

import model_zoo
from model_zoo import Card, CheckpointError, default_checkpoint, find_checkpoint, list_cards, list_checkpoints, load_checkpoint


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "shelf" / "tiny")


def test_checkpoint_is_read_and_verified(folder, make_card):
    checkpoint = load_checkpoint(folder)
    assert checkpoint.name == "tiny" and checkpoint.path == folder and checkpoint.weights.is_file()
    assert checkpoint.card == make_card(weights_sha256=checkpoint.card.weights_sha256)
    assert checkpoint.card.threshold == 0.5


def test_altered_weights_are_refused_by_name(folder):
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x00\x01")
    with pytest.raises(CheckpointError, match=r"tiny/model\.onnx was altered"):
        load_checkpoint(folder)


def test_missing_weights_are_told(folder):
    (folder / "model.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.onnx"):
        load_checkpoint(folder)
    assert list_checkpoints(folder.parent) == []
    assert [card.name for card in list_cards(folder.parent)] == ["tiny"]


def test_cards_are_listed_with_and_without_weights(folder, make_card):
    for name, auroc in ((".next.partial", 0.99), ("measured", 0.95)):
        (folder.parent / name).mkdir()
        make_card(name=name, metrics={"auroc": [auroc, 0.4, 1.0]}, weights_sha256="").write(folder.parent / name / "card.json")
    assert [card.name for card in list_cards(folder.parent)] == ["measured", "tiny"]
    assert [card.name for card in list_checkpoints(folder.parent)] == ["tiny"]


def test_a_checkpoint_knows_the_cells_that_trained_it_and_what_they_read_when_held_out(folder):
    assert load_checkpoint(folder).trained_on == {}
    (folder / "trained_on.txt").write_text("aa\nbb\n")
    assert load_checkpoint(folder).trained_on == {"aa": None, "bb": None}
    table = "cell_hash,p_all,threshold\nbb,0.25,0.2\ncc,0.5,0.2\n"
    (folder / "predictions.csv").write_text(table)
    assert load_checkpoint(folder).trained_on == {"aa": None, "bb": None}  # of one network alone: it did not hold bb out
    card = Card.read(folder / "card.json")
    several = replace(card, training=card.training | {"networks": 6})
    replace(several, split=card.split | {"protocol": "image-level"}).write(folder / "card.json")
    assert load_checkpoint(folder).trained_on == {"aa": None, "bb": None}  # copies may lie on both sides
    several.write(folder / "card.json")
    assert load_checkpoint(folder).trained_on == {"aa": None, "bb": (0.25, True)}
    (folder / "predictions.csv").write_text("file,p_all,threshold\n1.bmp,0.5,0.5\n")  # of before there were hashes
    assert load_checkpoint(folder).trained_on == {"aa": None, "bb": None}
    for damaged in ("cell_hash,p_all,threshold\nbb,?,0.5\n", "cell_hash,p_all\nbb,0.5\n"):
        (folder / "predictions.csv").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"trained_on\.txt or predictions\.csv is damaged"):
            load_checkpoint(folder).trained_on  # noqa: B018


def test_cards_of_before_still_load(folder):
    file = folder / "card.json"
    fields = json.loads(file.read_text())
    assert (fields.pop("rotations"), fields.pop("members"), fields.pop("paper")) == (1, [], "")
    file.write_text(json.dumps(fields))
    card = Card.read(file)
    assert (card.rotations, card.members, card.paper) == (1, [], "")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda card: card.unlink(),
        lambda card: card.write_text("{"),
        lambda card: card.write_text("[]"),
        lambda card: card.write_bytes(b"\xff\xfe"),
        lambda card: card.write_text(json.dumps({k: v for k, v in json.loads(card.read_text()).items() if k != "framing"})),
        lambda card: card.write_text(json.dumps(json.loads(card.read_text()) | {"pickle": "x"})),
    ],
)
def test_missing_or_spoilt_card_is_told_by_name(spoil, folder):
    spoil(folder / "card.json")
    with pytest.raises(CheckpointError, match=r"tiny(/| holds no )card\.json"):
        load_checkpoint(folder)


def test_unknown_name_lists_the_known(folder):
    with pytest.raises(CheckpointError, match=r"'nonsense'.*Known: tiny"):
        find_checkpoint("nonsense", folder.parent)
    with pytest.raises(CheckpointError, match="Known: none"):
        find_checkpoint("nonsense", folder / "nowhere")
    assert find_checkpoint("tiny", folder.parent).path == folder


def test_names_cannot_walk_out_of_the_shelf(folder):
    with pytest.raises(CheckpointError, match="Known"):
        find_checkpoint("../shelf/tiny", folder.parent)


def test_best_comes_first_and_unfinished_ones_not_at_all(folder, make_card):
    for name, auroc in (("better", 0.99), ("worse", 0.5)):
        shutil.copytree(folder, folder.parent / name)
        make_card(name=name, metrics={"auroc": [auroc, 0.4, 1.0]}).write(folder.parent / name / "card.json")
    unfinished = folder.parent / ".next.partial"
    unfinished.mkdir()
    shutil.copy(folder / "model.onnx", unfinished)  # a training writes the weights before the card
    assert [card.name for card in list_checkpoints(folder.parent)] == ["better", "tiny", "worse"]
    assert default_checkpoint(folder.parent) == "tiny"  # the surest: its interval begins at .8
    shutil.copytree(folder, folder.parent / "sure")
    metrics = make_card().metrics | {"auroc": [0.88, 0.85, 0.91]}  # lower than the other's, on more persons
    make_card(name="sure", metrics=metrics).write(folder.parent / "sure" / "card.json")
    assert default_checkpoint(folder.parent) == "sure"
    shutil.copytree(folder, folder.parent / "shown")  # pictures of the subjects it is measured on
    split, surer = make_card().split | {"seen_unlabelled": ["fold_0"]}, metrics | {"auroc": [0.95, 0.9, 0.97]}
    make_card(name="shown", metrics=surer, split=split).write(folder.parent / "shown" / "card.json")
    (folder.parent / "joined").mkdir()
    make_card(name="joined", metrics=surer, members=["sure", "tiny"]).write(folder.parent / "joined" / "card.json")
    assert "joined" in {card.name for card in list_checkpoints(folder.parent)}
    assert default_checkpoint(folder.parent) == "sure"


def test_no_checkpoint_at_all_says_how_to_train_one(tmp_path):
    with pytest.raises(CheckpointError, match="python -m training"):
        default_checkpoint(tmp_path)


def test_every_error_is_the_projects_own():
    assert issubclass(CheckpointError, model_zoo.BlastoscopeError)
    assert issubclass(model_zoo.UnknownArchitectureError, model_zoo.BlastoscopeError)
