import numpy as np
import pytest

from inference.explain import Explainer, colorize, describe_cam, describe_size, grad_cam, overlay_cam, size_share
from inference.images import frame_cell
from model_zoo import load_checkpoint


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_checkpoint(tiny_checkpoint).keras_model()


@pytest.fixture(scope="module")
def cells(draw_cell, tiny_engine):
    return np.stack([frame_cell(draw_cell(i, axes=(120 + 20 * i, 150)), tiny_engine.card.framing) for i in range(3)])


def test_grad_cam_equals_tf_keras_vis(model, cells):
    import keras
    from tf_keras_vis.gradcam import Gradcam

    until_logit = keras.Model(model.inputs[0], model.get_layer("logit").output)
    oracle = Gradcam(until_logit, clone=True)(
        lambda output: output[:, 0],
        cells.astype("float32"),
        penultimate_layer="out_relu",
        seek_penultimate_conv_layer=False,
        expand_cam=False,
        normalize_cam=False,
    )
    ours = grad_cam(model, "out_relu")(cells)
    assert ours.shape == (3, 3, 3) and ours.max() > 0
    np.testing.assert_allclose(ours, np.asarray(oracle), rtol=1e-4, atol=1e-6 * ours.max())


def test_the_map_of_a_network_that_turns_the_cell_turns_with_it(cells):
    import keras

    from inference.images import resize_cells
    from model_zoo import find_architecture

    keras.utils.set_random_seed(0)
    entry = find_architecture("efficientnet_b3.turned")
    network, small = entry.build(input_size=64), resize_cells(cells, 64)
    last = network.get_layer("logit")
    last.set_weights([np.random.default_rng(0).normal(size=last.kernel.shape), np.zeros(1)])
    cam = grad_cam(network, entry.cam_layers[0])
    upright, turned = cam(small), cam(np.rot90(small, axes=(1, 2)).copy())
    assert upright.shape == (3, 8, 8) and upright.max() > 0
    np.testing.assert_allclose(np.rot90(upright, axes=(1, 2)), turned, atol=1e-3 * upright.max())
    assert np.abs(upright - turned).max() > 0.1 * upright.max()


def test_what_speaks_for_hem_is_the_map_of_the_negative_logit(model, cells):
    cam = grad_cam(model, "out_relu")
    for_all, for_hem = cam(cells, "ALL"), cam(cells, "HEM")
    assert (for_all >= 0).all() and (for_hem >= 0).all() and for_hem.max() > 0
    assert (np.minimum(for_all, for_hem) == 0).all()  # one place cannot speak for both
    with pytest.raises(KeyError):
        cam(cells, "AML")


def test_explainer_reads_the_architecture_s_layer(tiny_checkpoint, cells):
    explainer = Explainer(load_checkpoint(tiny_checkpoint))
    assert explainer.layers[0] == "out_relu"
    np.testing.assert_allclose(explainer.cam(cells[:1])[0], explainer.cam(cells)[0], rtol=1e-4, atol=1e-7)


def test_the_share_of_size_is_what_the_logit_has_of_it(model, cells):
    import keras

    from inference.images import resize_cells
    from model_zoo import find_architecture

    keras.utils.set_random_seed(0)
    network, small = find_architecture("efficientnet_b3.turned").build(input_size=64), resize_cells(cells, 64)
    embedding, last = network.get_layer("embedding"), network.get_layer("logit")
    embedding.moving_mean.assign(np.full(embedding.moving_mean.shape, 6.5))
    kernel = np.random.default_rng(0).normal(size=last.kernel.shape)
    last.set_weights([kernel, np.ones(1)])
    share = size_share(network)(small)
    logit_of = keras.Model(network.inputs, last.output)
    whole = logit_of.predict(small.astype("float32"), verbose=0)[:, 0]
    kernel[-1] = 0
    last.set_weights([kernel, np.ones(1)])
    np.testing.assert_allclose(share, whole - logit_of.predict(small.astype("float32"), verbose=0)[:, 0], rtol=1e-3)
    assert share.std() > 0  # three sizes
    assert not size_share(model)(cells).any()  # a network that does not read it


def test_the_sentence_on_size_tells_what_an_average_cell_would_read():
    told = describe_size(float(np.log(4)), 0.8)  # odds of 4, all of them of size
    assert "speaks for ALL" in told and "would be 0.50 instead of 0.80" in told
    assert "speaks for HEM" in describe_size(-1.0, 0.2) and describe_size(0.0, 0.8) == ""
    assert "hardly changes" in describe_size(1.0, 1.0) and "hardly changes" in describe_size(-0.01, 0.9)


def test_overlay_ends_are_the_cell_and_the_map(draw_cell):
    image = draw_cell(1)
    cam = np.array([[0.0, 1.0], [2.0, 4.0]], "float32")
    np.testing.assert_array_equal(overlay_cam(image, cam, 0.0), image)
    alone = overlay_cam(image, cam, 1.0)
    assert alone.shape == image.shape and alone.dtype == np.uint8
    assert alone[-1, -1].tolist() == colorize(np.ones((1, 1)))[0, 0].tolist()
    assert alone[0, 0].tolist() == colorize(np.zeros((1, 1)))[0, 0].tolist()


def test_an_empty_map_gives_no_division_by_zero(draw_cell):
    image = draw_cell(1)
    shown = overlay_cam(image, np.zeros((3, 3), "float32"), 0.5)
    np.testing.assert_allclose(shown, image * 0.5 + colorize(np.zeros((1, 1)))[0, 0] * 0.5, atol=1)


def test_inferno_rises_in_lightness():
    ramp = colorize(np.linspace(0, 1, 50)[None])[0].astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(ramp) > 0).all()


def test_the_sentence_tells_where_the_map_lies():
    mask = np.zeros((100, 100), bool)
    mask[:, :50] = True
    left, right = np.zeros((4, 4), "float32"), np.zeros((4, 4), "float32")
    left[:, :2], right[:, 2:] = 1, 1
    assert "100%" in describe_cam(left, mask, "ALL")
    assert "Only 0%" in describe_cam(right, mask, "ALL")
    assert "nothing in the window speaks for HEM" in describe_cam(left * 0, mask, "HEM")
