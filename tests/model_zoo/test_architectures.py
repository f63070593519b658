import math
import urllib.request

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import timm_reference
from keras.src.backend.common import global_state

import model_zoo
from model_zoo import CheckpointError, UnknownArchitectureError, WeightsError
from model_zoo._architecture import GroupedConv2D
from model_zoo._onnx import fill_model, read_weights, write_onnx
from model_zoo.se_resnext50 import build_classifier
from model_zoo.vanilla import TABLE_3

SIZE = 96
every = pytest.mark.parametrize("name", model_zoo.architectures())
# one of each file, and what has layers or a head of its own
with_own_layers = pytest.mark.parametrize(
    "name",
    [model_zoo.find_architecture(file).name for file in model_zoo.architecture_names()]
    + ["vanilla.2x2x1c1d_bn_adam", "vanilla.1x1c1d_zeropadding_dropout", "vgg16.allnet_baseline"]
    + ["allnet.pooled", "efficientnet_b3.pooled", "efficientnet_b3.turned"],
)


def built(name, seed=0, **options):
    keras.utils.set_random_seed(seed)
    return model_zoo.find_architecture(name).build(input_size=SIZE, **options)


def drawn(build, size):
    """The network without values: shapes, names and types are there, memory is not."""
    waiting = global_state.get_global_attribute("uninitialized_variables", [])
    with keras.StatelessScope(initialize_variables=False):
        model = build(input_size=size)
    global_state.set_global_attribute("uninitialized_variables", waiting)
    return model


def parameters(variables):
    return sum(math.prod(v.shape) for v in variables)


@pytest.fixture(scope="module")
def cells():
    return np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype="uint8")


def test_the_pyramid_pools_over_the_cell_alone():
    from model_zoo.mobilenet_v2_pyramid import MaskedCovariance, MaskedMoments

    rng = np.random.default_rng(0)
    maps, shares = rng.random((2, 6, 5, 4)).astype("float32"), np.zeros((2, 6, 5, 1), "float32")
    shares[0, 1:4, 2:5], shares[1, :, 3] = 1, 1
    for layer in (MaskedMoments(), MaskedCovariance()):
        pooled = keras.ops.convert_to_numpy(layer([maps * shares, shares]))
        half = keras.ops.convert_to_numpy(layer([maps * shares / 2, shares / 2]))  # alike everywhere: no other answer
        np.testing.assert_allclose(half, pooled, atol=1e-3)
        assert pooled.shape == layer.compute_output_shape([maps.shape, shares.shape])
        assert np.isfinite(keras.ops.convert_to_numpy(layer([0 * maps, 0 * shares]))).all()  # no cell at all
        for k in range(2):
            inside = maps[k][shares[k, :, :, 0] > 0]
            moments = np.concatenate([inside.mean(0), inside.std(0)])
            covariance = np.cov(inside.T, bias=True)[np.triu_indices(4)]
            roots = covariance / np.sqrt(np.abs(covariance) + 1e-4)
            expected = moments if isinstance(layer, MaskedMoments) else roots
            np.testing.assert_allclose(pooled[k], expected, atol=2e-3)


def test_moments_of_regions_are_those_of_each_apart():
    from model_zoo._pooling import MaskedMoments

    rng = np.random.default_rng(0)
    maps, shares = rng.random((2, 6, 5, 4)).astype("float32"), np.ones((2, 6, 5, 1), "float32")
    regions = np.zeros((2, 6, 5, 3), "float32")
    for region, rows in enumerate((slice(0, 2), slice(2, 3), slice(3, 6))):
        regions[:, rows, :, region] = 1
    pooled = keras.ops.convert_to_numpy(MaskedMoments()([maps, shares, regions]))
    assert pooled.shape == MaskedMoments().compute_output_shape([maps.shape, shares.shape, regions.shape])
    apart = [MaskedMoments()([maps * (of := regions[..., k : k + 1]), of]) for k in range(3)]
    np.testing.assert_allclose(pooled, np.concatenate(apart, axis=1), atol=1e-3)


def test_bands_part_the_cell_by_its_own_darkness():
    from model_zoo._pooling import DarknessBands

    cell = np.zeros((1, 48, 48, 3), "float32")
    cell[:, 8:40, 8:40] = 150  # cytoplasm
    cell[:, 12:36, 12:36] = 112  # nucleus
    cell[:, 20:28, 20:28] = 40  # dense chromatin
    bands = keras.ops.convert_to_numpy(DarknessBands()(cell))
    inside = cell.max(-1) > 0
    np.testing.assert_allclose(bands.sum(-1), inside, atol=1e-5)
    places = {"dense": (24, 24), "nucleus": (16, 16), "cytoplasm": (9, 24)}
    assert [int(bands[0, *places[name]].argmax()) for name in places] == [0, 1, 2]
    other_lamp = np.where(inside[..., None], cell * 0.6 + 60, 0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(DarknessBands()(other_lamp)), bands, atol=0.05)
    alike = np.where(inside[..., None], 120, 0).astype("float32")
    assert np.isfinite(keras.ops.convert_to_numpy(DarknessBands()(np.concatenate([alike, 0 * alike])))).all()


def test_size_is_what_the_cell_covers_whatever_its_stain_and_place():
    from model_zoo._pooling import CellMask, CellSize

    cells = np.zeros((3, 32, 32, 3), "float32")  # the last: no cell at all
    cells[0, 2:10, 3:13], cells[1, 20:28, 12:22] = 200, 3
    size = keras.ops.convert_to_numpy(CellSize()(CellMask()(cells)))
    np.testing.assert_allclose(size[:, 0], np.log([81, 81, 1]), atol=1e-6)


@pytest.mark.parametrize("name", ["mobilenet_v2_pyramid", "efficientnet_b3.turned", "allnet.pooled"])
def test_pooled_networks_read_size_as_a_kind_of_its_own(name):
    embedding = drawn(model_zoo.find_architecture(name).build, 96).get_layer("embedding")
    kinds = embedding.input._keras_history.operation.input
    assert [kind.shape[-1] for kind in kinds][2:] == [1]


def test_whitening_takes_away_the_stain_and_leaves_black_black():
    from model_zoo._pooling import CellWhiten

    rng = np.random.default_rng(0)
    correlated = rng.normal(size=(2, 24, 24, 1)) * [20, 25, 12] + rng.normal(size=(2, 24, 24, 3)) * 6 + [130, 90, 150]
    cell = np.zeros((2, 32, 32, 3), "float32")
    cell[:, 4:28, 4:28] = correlated
    white = keras.ops.convert_to_numpy(CellWhiten()(cell))
    assert not white[cell.max(-1) == 0].any()
    for k in range(2):
        np.testing.assert_allclose(np.cov(white[k, 4:28, 4:28].reshape(-1, 3).T) / 40**2, np.eye(3), atol=0.15)
    colours = np.array([[0.9, 0.1, 0], [0, 0.8, 0.1], [0.1, 0, 1.1]], "float32")
    restained = keras.ops.convert_to_numpy(CellWhiten()(cell @ colours))
    assert np.corrcoef(restained[cell > 0], white[cell > 0])[0, 1] > 0.95
    flat = np.where(cell.max(-1, keepdims=True) > 0, 120, 0).astype("float32") * np.ones(3, "float32")
    assert np.isfinite(keras.ops.convert_to_numpy(CellWhiten()(np.concatenate([flat, 0 * flat])))).all()


def test_a_quarter_turn_does_not_change_what_is_averaged_over_turns():
    from model_zoo._pooling import MaskedMoments, QuarterTurns, TurnsMean

    x = np.random.default_rng(0).random((2, 6, 6, 3)).astype("float32")
    turned = keras.ops.convert_to_numpy(QuarterTurns()(x))
    for turns in range(4):
        np.testing.assert_array_equal(turned[2 * turns : 2 * turns + 2], np.rot90(x, turns, axes=(1, 2)))
    uneven = np.repeat(np.random.default_rng(1).random((1, 6, 6, 1)).astype("float32"), 2, 0)  # looks otherwise at each place

    def pooled(x):
        shares = np.concatenate([uneven] * 4)
        return keras.ops.convert_to_numpy(TurnsMean()(MaskedMoments()([QuarterTurns()(x) * shares, shares])))

    assert pooled(x).shape == (2, 6)
    np.testing.assert_allclose(pooled(np.rot90(x, axes=(1, 2)).copy()), pooled(x), rtol=1e-5)
    assert np.abs(pooled(x[:, ::-1].copy()) - pooled(x)).max() > 1e-4
    views = [x, x[::-1].copy() ** 2]
    side_by_side = keras.ops.convert_to_numpy(TurnsMean(2)(QuarterTurns()(views)[:, 0, 0]))
    apart = [keras.ops.convert_to_numpy(TurnsMean()(QuarterTurns()(view)[:, 0, 0])) for view in views]
    np.testing.assert_allclose(side_by_side, np.concatenate(apart, axis=1), rtol=1e-6)


def test_efficientnet_turned_reads_a_cell_alike_however_it_lies(cells):
    model = built("efficientnet_b3.turned")
    views = cells, np.rot90(cells, axes=(1, 2)).copy(), cells[:, ::-1].copy()
    features, turned, mirrored = (np.concatenate(read(model, x, "moments", "covariances"), axis=1) for x in views)
    np.testing.assert_allclose(turned, features, rtol=1e-3, atol=1e-3 * np.abs(features).max())
    assert np.abs(mirrored - features).max() > 0.01 * np.abs(features).max()


def test_what_lies_beside_the_cell_changes_nothing_the_pyramid_pools(cells):
    model = built("mobilenet_v2_pyramid")
    black = cells.copy()
    black[:, :, : SIZE // 2] = 0
    (on_cell,) = read(model, black, "fine_raw_block_6_expand_relu_on_cell")
    here = on_cell.shape[2] // 2
    assert not on_cell[:, :, :here].any() and on_cell[:, :, here:].any()


def read(model, cells, *names):
    tapped = keras.Model(model.inputs[0], {name: model.get_layer(name).output for name in names})
    outputs = tapped(cells.astype("float32"), training=False)
    return [keras.ops.convert_to_numpy(outputs[name]) for name in names]


def variables(model):
    return [(f"{layer.name}/{v.name}", tuple(v.shape)) for layer in model.layers for v in layer.weights]


@every
def test_entry_keeps_the_zoo_contract(name, cells):
    entry, model = model_zoo.find_architecture(name), built(name)
    assert entry.name == name == model.name and entry.title and entry.source and entry.input_size > 0
    assert model.layers[-1].name == "p_all" and model.output is model.layers[-1].output
    assert not any(isinstance(layer, keras.Model) for layer in model.layers)
    assert entry.cam_layers and all(len(model.get_layer(layer).output.shape) == 4 for layer in entry.cam_layers)
    p_all, logit, embedding = read(model, cells, "p_all", "logit", "embedding")
    assert p_all.shape == logit.shape == (2, 1) and embedding.ndim == 2
    assert ((p_all >= 0) & (p_all <= 1)).all() and np.isfinite(logit).all()
    np.testing.assert_allclose(p_all, 1 / (1 + np.exp(-logit.astype("float64"))), atol=1e-6)
    again = drawn(entry.build, SIZE)  # names do not depend on what was built before
    assert [layer.name for layer in model.layers] == [layer.name for layer in again.layers]
    assert variables(model) == variables(again)


@every
def test_logit_and_probability_stay_float32_in_mixed_precision(name):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = drawn(model_zoo.find_architecture(name).build, SIZE)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("logit").compute_dtype == model.get_layer("p_all").compute_dtype == "float32"
    assert model.get_layer("logit").output.dtype == model.get_layer("p_all").output.dtype == "float32"
    convolutions = {layer.compute_dtype for layer in model.layers if isinstance(layer, keras.layers.Conv2D)}
    assert convolutions == {"float16"} and {v.dtype for v in model.trainable_variables} == {"float32"}


@with_own_layers
def test_the_weights_file_gives_keras_and_the_runtime_one_function(name, cells, tmp_path, randomised):
    trained, other = built(name, 0), built(name, 1)
    randomised(trained)
    for layer in trained.layers:
        if layer.name.startswith("standardise"):
            layer.adapt_mean.assign([70.0, 40.0, 90.0])
            layer.adapt_variance.assign([900.0, 500.0, 1600.0])
            layer.finalize_state()
    file = tmp_path / "model.onnx"
    write_onnx(trained, file)
    (before,) = read(other, cells, "logit")
    fill_model(other, file)
    (expected,) = read(other, cells, "logit")
    assert np.abs(expected - before).max() > 1e-4  # the file's weights arrived
    for layer in other.layers:
        if layer.name.startswith("standardise"):
            assert keras.ops.convert_to_numpy(layer.mean).ravel().tolist() == [70.0, 40.0, 90.0]
            assert keras.ops.convert_to_numpy(layer.variance).ravel().tolist() == [900.0, 500.0, 1600.0]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    logit, embedding = session.run(["logit", "embedding"], {"cells": cells})
    np.testing.assert_allclose(logit, expected, rtol=1e-4, atol=1e-4)
    assert embedding.shape == (2, other.get_layer("embedding").output.shape[-1])
    np.testing.assert_allclose(read(trained, cells, "logit")[0], expected, rtol=0.05, atol=0.05)  # float16 rounding only


@pytest.mark.parametrize(
    ("name", "size", "total", "fixed"),
    [
        ("alexnet", 227, 62_378_344 - 1000 * 4097 + 2 * 4097, 0),  # Krizhevsky's, with two classes
        ("efficientnet_b3", 300, 11_183_665, 90_375),
        ("inception_v3", 299, 21_802_784 + 2 * 2049, 34_432),
        ("resnet50", 224, 23_587_712 + 2 * 2049, 53_120),
        ("se_resnext50", 300, 27_559_896 - 1000 * 2049 + 2049 + 68_224, 68_224),
        ("six_block_cnn", 300, 64_066_938, 5_568),
        ("vanilla.1c1d", 256, 528_517_889, 0),
        ("vanilla.2x2c1d", 256, 30_595_265, 0),
        ("vanilla.2x2c1d_dropout50", 256, 30_595_265, 0),
        ("vgg16", 224, 134_268_738, 0),
    ],
)
def test_published_sizes(name, size, total, fixed):
    entry = model_zoo.find_architecture(name)
    model = drawn(entry.build, entry.input_size)
    found = parameters(model.weights)
    assert (entry.input_size, found, found - parameters(model.trainable_weights)) == (size, total, fixed)


def test_counting_without_memory_is_counting():
    model = built("vanilla.2x2x1c1d_bn_adam")
    assert (
        parameters(drawn(model_zoo.find_architecture("vanilla.2x2x1c1d_bn_adam").build, SIZE).weights) == model.count_params()
    )


def test_six_blocks_alone_have_the_papers_size():
    model = drawn(model_zoo.find_architecture("six_block_cnn").build, 300)
    blocks = [layer for layer in model.layers if layer.name.startswith("block")]
    assert sum(isinstance(layer, keras.layers.Conv2D) for layer in blocks) == 13
    assert parameters(v for layer in blocks for v in layer.weights) == 7_535_040
    assert model.get_layer("block6_pool").output.shape == (None, 5, 5, 512)
    assert model.get_layer("flatten").output.shape == (None, 12_800)


def test_vanilla_is_the_papers_table():
    assert len(TABLE_3) == 13
    assert {row.optimizer for row in TABLE_3.values()} == {"rmsprop", "adam"}
    model = drawn(model_zoo.find_architecture("vanilla.2x2c1d_dropout50").build, 256)
    assert [(type(layer).__name__, layer.output.shape[1:]) for layer in model.layers[2:]] == [  # Figure 4
        ("Conv2D", (254, 254, 64)),
        ("Conv2D", (252, 252, 64)),
        ("MaxPooling2D", (126, 126, 64)),
        ("Dropout", (126, 126, 64)),
        ("Conv2D", (124, 124, 64)),
        ("Conv2D", (122, 122, 64)),
        ("MaxPooling2D", (61, 61, 64)),
        ("Dropout", (61, 61, 64)),
        ("Flatten", (238_144,)),
        ("Dense", (128,)),
        ("Dropout", (128,)),
        ("Dense", (1,)),
        ("Activation", (1,)),
    ]
    assert {layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)} == {0.5}


def test_se_resnext50_is_timms():
    model = build_classifier(input_size=timm_reference.SIZE)
    assert parameters(model.trainable_variables) == 27_559_896
    timm_reference.fill_with_derived(model)
    expected = np.load(timm_reference.REFERENCE)["logits"]
    (logits,) = read(model, timm_reference.derived_cells(), "fc")
    assert expected.shape == (2, 1000) and expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize(("groups", "channels"), [(32, 128), (6, 48), (2, 80)])
def test_grouped_convolution_learns_as_keras_own(groups, channels):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(2, 7, 7, channels)).astype("float32") for _ in range(2))

    def network(layer):
        cell = keras.Input((7, 7, channels))
        return keras.Model(cell, layer(channels, 3, strides=1, groups=groups, padding="same")(cell))

    ours, keras_own = network(GroupedConv2D), network(keras.layers.Conv2D)
    ours.set_weights(keras_own.get_weights())
    for model in (ours, keras_own):
        model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False)
        model.train_on_batch(x, y)
    for mine, expected in zip(ours.get_weights(), keras_own.get_weights(), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)
    np.testing.assert_allclose(ours(x), keras_own(x), atol=1e-5)


def test_allnet_has_the_papers_concatenations():
    model = drawn(model_zoo.find_architecture("allnet").build, 250)
    assert isinstance(model.get_layer("standardise"), keras.layers.Normalization)
    for name, shape in (
        ("concatenate1", (6, 6, 6 * 128)),
        ("concatenate2", (6, 6, 512 + 2048 + 2048)),
        ("concatenate3", (6, 6, 512 + 512 + 2048 + 2048)),
        ("head_pool", (3, 3, 512 + 512 + 2048 + 2048)),
    ):
        assert model.get_layer(name).output.shape[1:] == shape


_BACKBONES = {
    "efficientnet_b3": ("EfficientNetB3", keras.applications.efficientnet, "top_activation"),
    "inception_v3": ("InceptionV3", keras.applications.inception_v3, "mixed10"),
    "mobilenet_v2": ("MobileNetV2", keras.applications.mobilenet_v2, "out_relu"),
    "resnet50": ("ResNet50", keras.applications.resnet, "conv5_block3_out"),
    "vgg16": ("VGG16", keras.applications.vgg16, "block5_pool"),
}


@pytest.mark.parametrize("name", _BACKBONES)
def test_keras_backbone_files_keep_their_function_on_raw_cells(name, tmp_path, cells, randomised):
    make, module, features = _BACKBONES[name]

    def standardise(model, variance):
        for layer in model.layers:
            if isinstance(layer, keras.layers.Normalization):
                layer.adapt_mean.assign([0.485, 0.456, 0.406])
                layer.adapt_variance.assign(variance)
                layer.finalize_state()

    keras.utils.set_random_seed(5)
    bare = getattr(keras.applications, make)(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    randomised(bare)
    deviation = np.array([0.229, 0.224, 0.225], "float32")
    standardise(bare, deviation)  # what stands in Keras' ImageNet file of EfficientNet in the place of variances
    bare.save_weights(tmp_path / "backbone.weights.h5")
    standardise(bare, deviation**2)
    model = built(name, weights=str(tmp_path / "backbone.weights.h5"))
    expected = keras.ops.convert_to_numpy(bare(module.preprocess_input(cells.astype("float32")), training=False))
    np.testing.assert_allclose(read(model, cells, features)[0], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_kernels_made_for_bgr_are_turned_to_rgb_in_a_baseline_too(tmp_path):
    bare = keras.applications.VGG16(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    bare.save_weights(tmp_path / "backbone.weights.h5")
    model = built("vgg16.allnet_baseline", weights=str(tmp_path / "backbone.weights.h5"))
    first, given = (m.get_layer("block1_conv1").get_weights()[0] for m in (model, bare))
    np.testing.assert_array_equal(first, given[:, :, ::-1])


def test_a_network_that_reads_middle_layers_starts_from_a_whole_backbone(tmp_path):
    bare = keras.applications.EfficientNetB3(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    bare.save_weights(tmp_path / "backbone.weights.h5")
    model = built("efficientnet_b3.pooled", 1, weights=str(tmp_path / "backbone.weights.h5"))
    last, beyond = "block6a_expand_conv", "block7a_expand_conv"
    np.testing.assert_array_equal(model.get_layer(last).get_weights()[0], bare.get_layer(last).get_weights()[0])
    assert beyond not in {layer.name for layer in model.layers}


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("alexnet", "pool5"),
        ("se_resnext50", "layer4_2_out"),
        ("six_block_cnn", "block6_pool"),
        ("vanilla.2x2c1d_dropout50", "block2_dropout"),
    ],
)
def test_own_backbones_start_from_a_file(name, end, tmp_path):
    trained = built(name)
    backbone = keras.Model(trained.inputs, trained.get_layer(end).output)
    backbone.save_weights(tmp_path / "backbone.weights.h5")
    model = built(name, 1, weights=str(tmp_path / "backbone.weights.h5"))
    for layer in backbone.layers:
        for mine, given in zip(model.get_layer(layer.name).get_weights(), layer.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, given)
    heads = [[layer.get_weights() for layer in m.layers if layer.weights][-1][0] for m in (trained, model)]
    assert (heads[0] != heads[1]).all()  # the rest stays random


@pytest.mark.parametrize("name", ["alexnet", "se_resnext50", "six_block_cnn", "vanilla.3c1d"])
def test_networks_without_imagenet_weights_say_so(name):
    with pytest.raises(WeightsError, match=f"Keras offers no ImageNet weights of {name}"):
        built(name, weights="imagenet")


def test_imagenet_without_a_network_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))  # nothing downloaded before
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"ImageNet weights of mobilenet_v2 could not be downloaded.*local \.weights\.h5"):
        built("mobilenet_v2", weights="imagenet")


def test_initial_weights_that_are_not_the_backbones_are_told(tmp_path):
    with pytest.raises(WeightsError, match=r"missing\.weights\.h5 of mobilenet_v2 do not exist"):
        built("mobilenet_v2", weights=str(tmp_path / "missing.weights.h5"))
    broken = tmp_path / "broken.weights.h5"
    broken.write_bytes(b"not HDF5")
    with pytest.raises(WeightsError, match=r"broken\.weights\.h5 does not hold"):
        built("mobilenet_v2", weights=str(broken))
    other = tmp_path / "other.weights.h5"
    x = keras.Input((8, 8, 3))
    keras.Model(x, keras.layers.Conv2D(4, 3)(x)).save_weights(other)
    with pytest.raises(WeightsError, match=r"other\.weights\.h5 does not hold"):
        built("mobilenet_v2", weights=str(other))
    with pytest.raises(WeightsError, match=r"Received: weights='one\.weights\.h5'"):
        built("allnet", weights="one.weights.h5")


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


def test_a_grouped_convolution_is_one_node(tmp_path):
    x = keras.Input((8, 8, 64))
    y = GroupedConv2D(64, 3, groups=16, name="grouped")(x)
    embedding = keras.layers.GlobalAveragePooling2D(name="embedding")(y)
    write_onnx(keras.Model(x, keras.layers.Dense(1, name="logit")(embedding)), tmp_path / "model.onnx")
    convolutions = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Conv"]
    assert [a.i for node in convolutions for a in node.attribute if a.name == "group"] == [16]


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
    with pytest.raises(UnknownArchitectureError, match="Known: alexnet, allnet"):
        model_zoo.find_architecture("../allnet")
    with pytest.raises(UnknownArchitectureError, match=r"Did you mean 'vanilla\.2x2c1d_dropout50'.*Known: vanilla, "):
        model_zoo.find_architecture("vanilla.2x2c1d_dropout5")
    with pytest.raises(UnknownArchitectureError, match=r"no architecture 'allnet\.small'.*Known: allnet, allnet\.pooled"):
        model_zoo.find_architecture("allnet.small")


def test_architectures_are_every_file_and_its_variants():
    names = model_zoo.architecture_names()
    assert {"alexnet", "allnet", "efficientnet_b3", "inception_v3", "mobilenet_v2", "resnet50"} <= set(names)
    assert {"se_resnext50", "six_block_cnn", "vanilla", "vgg16"} <= set(names)
    found = model_zoo.architectures()
    assert {name.partition(".")[0] for name in found} == set(names)
    assert {f"vanilla.{variant}" for variant in TABLE_3} <= set(found)
    assert {f"{name}.allnet_baseline" for name in ("vgg16", "resnet50", "inception_v3")} <= set(found)
    assert all(model_zoo.find_architecture(name) is entry for name, entry in found.items())
    assert model_zoo.find_architecture("vanilla").name == "vanilla.2x2c1d_dropout50"
