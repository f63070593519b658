"""Weights in several files: the network is the same, and the files are one set."""

import hashlib
import shutil

import numpy as np
import pytest

from inference.engine import Engine
from inference.layers import LayerTaps
from model_zoo import CheckpointError, load_checkpoint
from model_zoo._checkpoint import WEIGHTS, hash_weights, weights_files
from model_zoo._onnx import read_weights, write_onnx

SHARD_BYTES = 50_000


@pytest.fixture(scope="module")
def sharded(tiny_checkpoint, tmp_path_factory, make_card):
    folder = tmp_path_factory.mktemp("sharded") / "tiny"
    folder.mkdir()
    write_onnx(load_checkpoint(tiny_checkpoint).keras_model(), folder / WEIGHTS, shard_bytes=SHARD_BYTES)
    make_card(weights_sha256=hash_weights(folder / WEIGHTS)).write(folder / "card.json")
    return folder


def test_no_file_of_the_set_is_larger_than_asked(sharded):
    graph, *shards = weights_files(sharded / WEIGHTS)
    assert graph.name == "model.onnx" and [s.name for s in shards] == [f"model.{i}.bin" for i in range(len(shards))]
    assert len(shards) > 10 and all(0 < s.stat().st_size <= SHARD_BYTES for s in shards)
    assert {f.name for f in sharded.iterdir()} == {"card.json", graph.name, *(s.name for s in shards)}


def test_one_file_where_it_suffices(tiny_checkpoint):
    path = tiny_checkpoint / WEIGHTS
    assert weights_files(path) == [path]
    assert hash_weights(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_shards_give_the_weights_and_the_answers_of_one_file(sharded, tiny_checkpoint, tiny_engine):
    whole, parts = read_weights(tiny_checkpoint / WEIGHTS), read_weights(sharded / WEIGHTS)
    assert list(whole) == list(parts)
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value)
    cells = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype="uint8")
    checkpoint = load_checkpoint(sharded)
    np.testing.assert_array_equal(Engine(checkpoint).predict(cells)[1], tiny_engine.predict(cells)[1])
    maps = LayerTaps(checkpoint).feature_maps(cells, "out_relu")
    np.testing.assert_array_equal(maps, LayerTaps(load_checkpoint(tiny_checkpoint)).feature_maps(cells, "out_relu"))


@pytest.mark.parametrize("spoil", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:-1] + b"x")])
def test_a_missing_or_altered_shard_is_refused(spoil, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "tiny")
    assert load_checkpoint(folder).name == "tiny"
    spoil(folder / "model.3.bin")
    with pytest.raises(CheckpointError, match=r"altered, or a file beside it is missing"):
        load_checkpoint(folder)


def test_weights_of_an_incomplete_set_cannot_be_read(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "tiny")
    (folder / "model.3.bin").unlink()
    with pytest.raises(CheckpointError, match=r"tiny/model\.onnx cannot be read whole"):
        read_weights(folder / WEIGHTS)


def test_writing_again_leaves_no_shard_of_before(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "tiny")
    write_onnx(load_checkpoint(folder).keras_model(), folder / WEIGHTS)
    assert weights_files(folder / WEIGHTS) == [folder / WEIGHTS]
