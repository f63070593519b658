"""EfficientNetB3 grown out of MobileNetV2: it computes what MobileNetV2 computes."""

import keras
import numpy as np
import pytest

import model_zoo
from inference.images import frame_cell
from training.errors import RecipeError
from training.growth import grow
from training.recipe import make_recipe

SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def few_cells():
    """Drawn cells are alike: the tests need not look at so many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.growth._CELLS", 40)
        yield


@pytest.fixture(scope="module")
def packed(draw_cell):
    spec = model_zoo.FrameSpec(crop=200, size=SIZE)
    return np.stack([frame_cell(draw_cell(i, canvas=(250, 250), axes=(100 + 2 * i, 130)), spec) for i in range(40)])


def recipe_of(start):
    given = {"architecture": "efficientnet_b3", "title": "Grown", "summary": "For tests.", "crop": 200, "input_size": SIZE}
    return make_recipe(given | {"grow_from": str(start), "epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "flip": "both"})


def maps(network, layer, cells):
    return keras.ops.convert_to_numpy(keras.Model(network.inputs[0], network.get_layer(layer).output)(cells.astype("float32")))


@pytest.fixture(scope="module")
def grown(start, packed):
    """(network, what `grow` told, EfficientNetB3 as it was)"""
    keras.utils.set_random_seed(3)
    network = model_zoo.find_architecture("efficientnet_b3").build(input_size=SIZE)
    before = maps(network, "block4a_expand_bn", packed)
    return network, grow(network, recipe_of(start), packed, np.arange(30)), before


def test_its_maps_are_those_it_grew_from(grown, start, packed):
    network, told, before = grown
    assert list(told) == [f"block{i}" for i in range(1, 8)] and min(told.values()) > 0.9
    old = model_zoo.find_architecture("mobilenet_v2").build(input_size=SIZE, weights=str(start))
    cells = packed[30:]  # that it did not see
    inside = packed[30:, ::8, ::8].max(-1) > 0
    theirs = maps(old, "block_6_expand_BN", cells)[inside]

    def alike(mine):
        mine = mine[inside][:, : theirs.shape[1]]
        return np.nanmean([np.corrcoef(a, b)[0, 1] for a, b in zip(mine.T, theirs.T, strict=True)])

    assert alike(maps(network, "block4a_expand_bn", cells)) > 0.8 > 0.3 > abs(alike(before[30:]))
    assert np.isfinite(maps(network, "top_activation", cells)).all()


def test_batch_norms_hold_the_statistics_of_the_cells_it_grew_on(grown, packed):
    """So a training that goes on does not begin with a jump."""
    network, *_ = grown
    conv, bn = maps(network, "block4a_expand_conv", packed[:30]), network.get_layer("block4a_expand_bn")
    deviation = np.sqrt(keras.ops.convert_to_numpy(bn.moving_variance))
    inside = packed[:30, ::8, ::8].max(-1) > 0
    gap = (conv[inside].mean(0) - keras.ops.convert_to_numpy(bn.moving_mean)) / (deviation + 1e-6)
    assert np.abs(gap).mean() < 0.5


def test_no_cell_is_looked_at_twice(packed, start, monkeypatch):
    seen = []
    monkeypatch.setattr("training.growth._Growth.run", lambda growth: seen.extend(growth.old.max((1, 2, 3))))
    monkeypatch.setattr("training.growth.augmentation", lambda recipe: [])
    cells = np.arange(1, 41, dtype="uint8").reshape(40, 1, 1, 1) * np.ones((1, SIZE, SIZE, 3), "uint8")
    network = model_zoo.find_architecture("efficientnet_b3.pooled").build(input_size=SIZE)
    grow(network, recipe_of(start), cells, np.arange(5, 15))
    assert seen == list(range(6, 16))


@pytest.mark.parametrize("form", ["pooled", "turned"])
def test_the_pooled_forms_grow_as_far_as_they_go(grown, start, packed, form):
    network = model_zoo.find_architecture(f"efficientnet_b3.{form}").build(input_size=SIZE)
    told = grow(network, recipe_of(start), packed, np.arange(30))
    assert list(told) == [f"block{i}" for i in range(1, 6)]
    np.testing.assert_allclose(  # the same seed, the same network
        maps(network, "block6a_expand_bn", packed[:2])[:2], maps(grown[0], "block6a_expand_bn", packed[:2]), atol=1e-2
    )


def test_other_networks_are_refused(start, packed):
    with pytest.raises(RecipeError, match="Only an EfficientNetB3"):
        grow(model_zoo.find_architecture("vanilla.1c1d").build(input_size=SIZE), recipe_of(start), packed, np.arange(4))
