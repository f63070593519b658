import functools

import keras
import numpy as np
import onnxruntime
import pytest

import model_zoo
from model_zoo import CheckpointError, UnknownArchitectureError
from model_zoo._onnx import fill_model, read_weights, write_onnx

SIZE = 96
every = pytest.mark.parametrize("name", model_zoo.architecture_names())


@functools.cache
def built(name, seed):
    keras.utils.set_random_seed(seed)
    return model_zoo.find_architecture(name).build(input_size=SIZE)


@pytest.fixture(scope="module")
def cells():
    return np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype="uint8")


def logit_of(model, cells):
    tapped = keras.Model(model.inputs[0], model.get_layer("logit").output)
    return keras.ops.convert_to_numpy(tapped(cells.astype("float32"), training=False))


def variables(model):
    return [(f"{layer.name}/{v.name}", tuple(v.shape)) for layer in model.layers for v in layer.weights]


@every
def test_entry_keeps_the_zoo_contract(name, cells):
    entry, model = model_zoo.find_architecture(name), built(name, 0)
    assert entry.name == name == model.name and entry.title and entry.source and entry.input_size > 0
    p_all = keras.ops.convert_to_numpy(model(cells.astype("float32"), training=False))
    assert p_all.shape == (2, 1) and ((p_all >= 0) & (p_all <= 1)).all()
    assert model.output.name.startswith("p_all") or model.layers[-1].name == "p_all"
    assert not any(isinstance(layer, keras.Model) for layer in model.layers)
    assert model.get_layer("logit").output.shape == (None, 1)
    assert len(model.get_layer("embedding").output.shape) == 2
    assert entry.cam_layers and all(len(model.get_layer(layer).output.shape) == 4 for layer in entry.cam_layers)


@every
def test_p_all_is_the_sigmoid_of_logit(name, cells):
    model = built(name, 0)
    p_all = keras.ops.convert_to_numpy(model(cells.astype("float32"), training=False))
    np.testing.assert_allclose(p_all, 1 / (1 + np.exp(-logit_of(model, cells).astype("float64"))), atol=1e-6)


@every
def test_names_do_not_depend_on_what_was_built_before(name):
    first, second = built(name, 0), built(name, 1)
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    assert variables(first) == variables(second)


@every
def test_the_weights_file_gives_keras_and_the_runtime_one_function(name, cells, tmp_path, randomised):
    trained, other = built(name, 0), built(name, 1)
    randomised(trained)
    for layer in trained.layers:
        if layer.name == "standardise":
            layer.adapt_mean.assign([70.0, 40.0, 90.0])
            layer.adapt_variance.assign([900.0, 500.0, 1600.0])
            layer.finalize_state()
    file = tmp_path / "model.onnx"
    write_onnx(trained, file)
    before = logit_of(other, cells)
    fill_model(other, file)
    expected = logit_of(other, cells)
    assert np.abs(expected - before).max() > 1e-4  # the file's weights arrived
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    logit, embedding = session.run(["logit", "embedding"], {"cells": cells})
    np.testing.assert_allclose(logit, expected, rtol=1e-4, atol=1e-4)
    assert embedding.shape == (2, other.get_layer("embedding").output.shape[-1])
    np.testing.assert_allclose(logit_of(trained, cells), expected, rtol=0.05, atol=0.05)  # float16 rounding only


def test_allnet_has_the_papers_concatenations_and_keeps_its_standardisation(tmp_path):
    model, other = built("allnet", 0), built("allnet", 1)
    for name, channels in (
        ("concatenate1", 6 * 128),
        ("concatenate2", 512 + 2048 + 2048),
        ("concatenate3", 512 + 512 + 2048 + 2048),
    ):
        assert (
            isinstance(model.get_layer(name), keras.layers.Concatenate) and model.get_layer(name).output.shape[-1] == channels
        )
    standardise = model.get_layer("standardise")
    assert isinstance(standardise, keras.layers.Normalization)
    standardise.adapt_mean.assign([71.0, 41.0, 91.0])
    standardise.adapt_variance.assign([901.0, 501.0, 1601.0])
    standardise.finalize_state()
    write_onnx(model, tmp_path / "model.onnx")
    fill_model(other, tmp_path / "model.onnx")
    again = other.get_layer("standardise")
    assert keras.ops.convert_to_numpy(again.mean).ravel().tolist() == [71.0, 41.0, 91.0]
    assert keras.ops.convert_to_numpy(again.variance).ravel().tolist() == [901.0, 501.0, 1601.0]


def test_allnet_starts_from_no_single_weights_file():
    with pytest.raises(ValueError, match="Received"):
        model_zoo.find_architecture("allnet").build(input_size=SIZE, weights="some.weights.h5")


def test_efficientnet_b3_is_the_papers():
    entry = model_zoo.find_architecture("efficientnet_b3")
    assert entry.input_size == 300 and entry.build(input_size=300).count_params() == 11_183_665


def test_backbone_weights_are_copied_by_layer(tmp_path, cells):
    keras.utils.set_random_seed(5)
    bare = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(224, 224, 3))
    bare.save_weights(tmp_path / "backbone.weights.h5")
    model = model_zoo.find_architecture("mobilenet_v2").build(input_size=SIZE, weights=str(tmp_path / "backbone.weights.h5"))
    for layer in ("Conv1", "block_7_expand", "Conv_1"):
        for mine, given in zip(model.get_layer(layer).get_weights(), bare.get_layer(layer).get_weights(), strict=True):
            assert (mine == given).all()


def test_fill_refuses_missing_misshapen_and_left_over_weights(tmp_path):
    def small(units, name="logit"):
        x = keras.Input((8, 8, 3))
        embedding = keras.layers.GlobalAveragePooling2D(name="embedding")(keras.layers.Conv2D(units, 3, name="conv")(x))
        return keras.Model(x, keras.layers.Dense(1, name=name)(embedding))

    file = tmp_path / "model.onnx"
    write_onnx(small(4), file)
    assert set(read_weights(file)) == {"conv/kernel", "conv/bias", "logit/kernel", "logit/bias"}
    with pytest.raises(CheckpointError, match=r"conv/kernel should have shape \(3, 3, 3, 5\).*\(3, 3, 3, 4\)"):
        fill_model(small(5), file)
    with pytest.raises(CheckpointError, match=r"other/kernel should have .* nothing"):
        fill_model(small(4, "other"), file)
    bare = keras.Model((x := keras.Input((8, 8, 3))), keras.layers.Conv2D(4, 3, name="conv")(x))
    with pytest.raises(CheckpointError, match="logit/bias"):
        fill_model(bare, file)


def test_what_has_no_onnx_rule_is_told(tmp_path):
    x = keras.Input((8, 8, 3))
    embedding = keras.layers.GlobalAveragePooling2D(name="embedding")(keras.layers.UpSampling2D(name="enlarge")(x))
    model = keras.Model(x, keras.layers.Dense(1, name="logit")(embedding))
    with pytest.raises(CheckpointError, match=r"enlarge.*UpSampling2D"):
        write_onnx(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_diverged_weights_are_not_written(tmp_path):
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, keras.layers.Dense(1, name="logit")(keras.layers.GlobalMaxPooling2D(name="embedding")(x)))
    model.get_layer("logit").kernel.assign([[np.nan]] * 3)
    with pytest.raises(CheckpointError, match=r"logit/kernel.*diverged"):
        write_onnx(model, tmp_path / "model.onnx")


def test_unknown_architecture_offers_the_nearest():
    with pytest.raises(UnknownArchitectureError, match="Did you mean 'efficientnet_b3'"):
        model_zoo.find_architecture("efficientnetb3")
    with pytest.raises(UnknownArchitectureError, match="Known: allnet"):
        model_zoo.find_architecture("../allnet")


def test_architectures_are_every_file_and_nothing_else():
    assert list(model_zoo.architectures()) == model_zoo.architecture_names()
    assert {"allnet", "efficientnet_b3", "mobilenet_v2"} <= set(model_zoo.architecture_names())
