import keras
import numpy as np
import pytest

from training.augment import StainJitter, augmentation
from training.recipe import Recipe

EVERYTHING = Recipe(
    architecture="mobilenet_v2", title="", summary="", crop=300, input_size=64, epochs=1, draws_per_epoch=8, batch_size=4,
    learning_rate=1e-3, rotate=True, flip=True, shift=0.1, stain=0.3, gamma=0.4,
)  # fmt: skip


def apply(layers, cells, training):
    for layer in layers:
        cells = layer(cells, training=training)
    return keras.ops.convert_to_numpy(cells)


@pytest.fixture(scope="module")
def cells(draw_cell):
    return np.stack([draw_cell(i, canvas=(64, 64), axes=(20, 30)) for i in range(8)]).astype("float32")


def test_augmentation_is_the_identity_outside_training(cells):
    assert (apply(augmentation(EVERYTHING), cells, training=False) == cells).all()


@pytest.mark.parametrize("chosen", ["flip", "rotate", "shift", "stain"])
def test_each_setting_changes_cells_in_training_and_is_left_out_when_off(chosen, cells):
    off = {"rotate": False, "flip": False, "shift": 0.0, "stain": 0.0, "gamma": 0.0}
    base = {f: getattr(EVERYTHING, f) for f in EVERYTHING.__dataclass_fields__}
    assert augmentation(Recipe(**base | off)) == []
    (layer,) = augmentation(Recipe(**base | off | {chosen: base[chosen]}))
    changed = apply([layer], cells, training=True)
    assert changed.shape == cells.shape and changed.dtype == np.float32 and np.isfinite(changed).all()
    assert changed.min() >= 0 and changed.max() <= 255 and (changed != cells).any()


def test_all_together_keep_the_corners_exactly_black(cells):
    changed = apply(augmentation(EVERYTHING), cells, training=True)
    assert (changed[:, :4] == 0).all() and (changed[:, :, -4:] == 0).all() and changed.max() > 30
    assert (changed.max(axis=(1, 2, 3)) > 30).all()


def test_stain_jitter_keeps_black_black_and_gives_each_cell_its_own_stain(cells):
    changed = apply([StainJitter(0.3, 0.4, seed=0)], np.repeat(cells[:1], 4, axis=0), training=True)
    black = cells[0].max(-1) == 0
    assert (changed[:, black] == 0).all() and (changed[:, ~black] > 0).all()
    assert len({cell.tobytes() for cell in changed}) == 4


def test_stain_jitter_of_nothing_changes_nothing(cells):
    np.testing.assert_allclose(apply([StainJitter(0.0, 0.0, seed=0)], cells, training=True), cells, atol=1e-3)


def test_same_seed_gives_the_same_cells(cells):
    first, second = (apply(augmentation(EVERYTHING), cells, training=True) for _ in range(2))
    assert (first == second).all()
