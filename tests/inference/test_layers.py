import numpy as np
import pytest

from inference.errors import LayerError
from inference.images import frame_cell
from inference.layers import LayerTaps, tile_maps
from model_zoo import find_checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def taps(tiny_checkpoint):
    return LayerTaps(load_checkpoint(tiny_checkpoint))


@pytest.fixture(scope="module")
def cells(draw_cell, tiny_engine):
    return np.stack([frame_cell(draw_cell(i, axes=(120 + 20 * i, 150)), tiny_engine.card.framing) for i in range(2)])


def test_maps_equal_keras_at_several_depths(taps, tiny_checkpoint, cells):
    import keras

    model = load_checkpoint(tiny_checkpoint).keras_model()
    for name in ("Conv1", "Conv1_relu", "block_3_depthwise", "block_12_expand_relu", "out_relu"):
        expected = keras.Model(model.inputs[0], model.get_layer(name).output)(cells.astype("float32")).numpy()
        np.testing.assert_allclose(taps.feature_maps(cells, name), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_a_layer_that_sees_turned_copies_gives_the_maps_of_the_cells_as_they_are(draw_cell):
    checkpoint = find_checkpoint("mobilenet_v2_pyramid")
    taps = LayerTaps(checkpoint)
    name = "coarse_raw_block_3_expand_relu"
    cells = np.stack([frame_cell(draw_cell(i, axes=(120 + 20 * i, 150)), checkpoint.card.framing) for i in range(2)])
    maps = taps.feature_maps(cells, name)
    assert maps.shape == (2, *taps.find(name).shape)
    np.testing.assert_allclose(maps[1:], taps.feature_maps(cells[1:], name), atol=1e-4)
    assert np.abs(maps[0] - maps[1]).max() > 0.1


def test_every_convolution_activation_and_pooling_is_offered(taps):
    roles = {layer.role for layer in taps.maps}
    assert roles == {"convolution", "activation"}  # MobileNetV2's one pooling leaves no map
    assert len(taps.maps) == sum(layer.kind in ("Conv2D", "DepthwiseConv2D", "ReLU") for layer in taps.layers)
    for layer in taps.maps:
        assert len(layer.shape) == 3 and layer.shape[0] > 1


def test_table_counts_every_parameter(taps, tiny_checkpoint):
    model = load_checkpoint(tiny_checkpoint).keras_model()
    assert sum(layer.parameters for layer in taps.layers) == model.count_params()
    assert [layer.name for layer in taps.layers] == [layer.name for layer in model.layers]
    known = {layer.name for layer in taps.layers}
    assert all(source in known for layer in taps.layers for source in layer.inputs)


def test_zero_shares_are_those_of_the_maps(taps, cells):
    shares = {layer.name: (zero, low) for layer, zero, low in taps.zero_shares(cells[:1])}
    assert len(shares) == len(taps.maps)
    for name in ("Conv1_relu", "out_relu", "block_1_expand"):
        maps = taps.feature_maps(cells[:1], name)
        assert shares[name] == pytest.approx(((maps == 0).mean(), (maps <= 0).mean()))
    assert shares["Conv1_relu"][0] == shares["Conv1_relu"][1] > 0  # ReLU: nothing below zero


@pytest.mark.parametrize("name", ["embedding", "logit", "no such layer"])
def test_a_layer_without_maps_is_refused_by_name(taps, cells, name):
    with pytest.raises(LayerError, match=name):
        taps.feature_maps(cells, name)


def test_tiles_are_standardised_as_in_paper_001():
    rng = np.random.default_rng(0)
    maps = rng.normal(3, 2, (5, 4, 7)).astype("float32")
    sheet = tile_maps(maps, columns=3, scale=2, gap=1)
    assert sheet.shape == (3 * 11, 3 * 9) and sheet.dtype == np.uint8
    tile = sheet[11:21:2, 9:17:2]  # the fifth map, one pixel of each 2 x 2
    expected = (maps[:, :, 4] - maps[:, :, 4].mean()) / maps[:, :, 4].std() * 64 + 128
    np.testing.assert_allclose(tile, np.clip(expected, 0, 255), atol=1)
    assert (sheet[22:, 9:] == 0).all()  # no eighth map


def test_a_map_without_contrast_stays_black():
    assert (tile_maps(np.full((4, 4, 1), 7.0), columns=1) == 0).all()
