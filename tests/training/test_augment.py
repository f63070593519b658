import keras
import numpy as np
import pytest

from training.augment import Defocus, Placement, StainJitter, _blur, _look_up, _mix, _powers, _resample, augmentation
from training.recipe import Recipe

SIZE = 64
OFF = {"flip": "", "rotate": 0.0, "quarter_turns": False, "shift": 0.0, "stain": 0.0, "gamma": 0.0, "blur": 0.0}
ON = {"flip": "both", "rotate": 180.0, "quarter_turns": True, "shift": 0.1, "stain": 0.3, "gamma": 0.4, "blur": 1.5}


def recipe(**settings):
    return Recipe(
        architecture="mobilenet_v2", title="", summary="", crop=300, input_size=SIZE, epochs=1, batch_size=4,
        learning_rate=1e-3, **OFF | settings,
    )  # fmt: skip


def apply(layers, cells, training=True):
    for layer in layers:
        cells = layer(cells, training=training)
    return keras.ops.convert_to_numpy(cells)


def tensors(*arrays):
    return [keras.ops.convert_to_tensor(a.astype("float32") if a.dtype == "float64" else a) for a in arrays]


@pytest.fixture(scope="module")
def cells(draw_cell):
    return np.stack([draw_cell(i, canvas=(SIZE, SIZE), axes=(20, 30)) for i in range(8)])


@pytest.fixture(scope="module")
def noise():
    """One frame without any symmetry, many times."""
    return np.repeat(np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), "uint8"), 64, axis=0)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_augmentation_is_the_identity_outside_training(cells, dtype):
    for chosen in ({"flip": "both"}, {"stain": 0.1}, ON):
        assert (apply(augmentation(recipe(**chosen)), cells.astype(dtype), training=False) == cells).all()


@pytest.mark.parametrize("chosen", ON)
def test_each_setting_changes_cells_in_training_and_is_left_out_when_off(chosen, cells):
    assert augmentation(recipe()) == []
    (layer,) = augmentation(recipe(**{chosen: ON[chosen]}))
    changed = apply([layer], cells)
    assert changed.shape == cells.shape and np.isfinite(changed).all()
    assert changed.min() >= 0 and changed.max() <= 255 and (changed != cells).any()


@pytest.mark.parametrize(
    "flip, quarter_turns, kinds", [("horizontal", False, 2), ("both", False, 4), ("", True, 4), ("both", True, 8)]
)
def test_mirrors_and_quarter_turns_move_pixels_and_change_none(noise, flip, quarter_turns, kinds):
    frame = noise[0]
    mirrors = {"": [frame], "horizontal": [frame, frame[:, ::-1]]}.get(
        flip, [frame, frame[:, ::-1], frame[::-1], frame[::-1, ::-1]]
    )
    turned = [np.rot90(m, k).tobytes() for m in mirrors for k in range(4 if quarter_turns else 1)]
    changed = apply([Placement(flip=flip, quarter_turns=quarter_turns)], noise)
    assert {cell.tobytes() for cell in changed} == set(turned) and len(set(turned)) == kinds


def test_resampling_is_that_of_keras(noise):
    rng = np.random.default_rng(1)
    matrix, shift = rng.uniform(-1.2, 1.2, (4, 8)), rng.uniform(-9, 9, (2, 8))
    centre = (SIZE - 1) / 2
    offset = [centre - matrix[k] * (centre + shift[0]) - matrix[k + 1] * (centre + shift[1]) for k in (0, 2)]
    rows = np.stack([*matrix[:2], offset[0], *matrix[2:], offset[1], *np.zeros((2, 8))], axis=1).astype("float32")
    expected = keras.ops.image.affine_transform(*tensors(noise[:8].astype("float32"), rows), "bilinear", "constant", 0.0)
    found = keras.ops.convert_to_numpy(_resample(*tensors(noise[:8], matrix, shift)))
    np.testing.assert_allclose(found, keras.ops.convert_to_numpy(expected), atol=0.6)  # rounded; neighbours differ by 85


def test_shift_by_whole_pixels_moves_right_and_down(noise):
    identity, shift = np.array([[1.0], [0], [0], [1]]), np.array([[3.0], [5]])
    moved = keras.ops.convert_to_numpy(_resample(*tensors(noise[:1], identity, shift)))[0]
    assert (moved[5:, 3:] == noise[0, :-5, :-3]).all() and not moved[:5].any() and not moved[:, :3].any()


def test_shift_keeps_to_its_share(cells):
    spot = np.zeros((200, SIZE, SIZE, 3), "uint8")
    spot[:, 30:34, 30:34] = 200
    mass = apply([Placement(shift=0.1)], spot)[..., 0].astype("float64")
    grid = np.arange(SIZE) - (SIZE - 1) / 2
    for axis in (1, 2):
        moved = (mass.sum(axis) * grid).sum(1) / mass.sum((1, 2))
        assert 0.09 * SIZE < np.abs(moved).max() <= 0.1 * SIZE + 0.01 and abs(moved.mean()) < 1


def test_rotation_keeps_to_its_angle():
    bar = np.zeros((200, SIZE, SIZE, 3), "uint8")
    bar[:, 30:34, 10:54] = 200
    mass = apply([Placement(rotate=20.0)], bar)[..., 0].astype("float64")
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    xx, yy, xy = ((mass * product).sum((1, 2)) for product in (x * x, y * y, x * y))
    angle = np.rad2deg(np.arctan2(2 * xy, xx - yy) / 2)
    assert 18 < angle.max() < 20.5 and -20.5 < angle.min() < -18 and abs(angle.mean()) < 3


def test_all_together_keep_the_corners_exactly_black(cells):
    changed = apply(augmentation(recipe(**ON)), cells)
    assert (changed[:, :4] == 0).all() and (changed[:, :, -4:] == 0).all()
    assert (changed.max(axis=(1, 2, 3)) > 30).all()


def test_stain_jitter_keeps_black_black_and_gives_each_cell_its_own_stain(cells):
    changed = apply([StainJitter(0.3, 0.4, seed=0)], np.repeat(cells[:1], 4, axis=0))
    black = cells[0].max(-1) == 0
    assert (changed[:, black] == 0).all() and (changed[:, ~black] > 0).all()
    assert len({cell.tobytes() for cell in changed}) == 4


def test_stain_is_a_power_and_a_matrix(cells):
    rng = np.random.default_rng(2)
    exponent, matrix = rng.uniform(0.6, 1.4, (8, 1)), np.eye(3) + rng.uniform(-0.2, 0.2, (8, 3, 3))
    expected = np.einsum("nyxk,nkj->nyxj", (cells / 255) ** exponent[..., None, None], matrix).clip(0, 1) * 255
    cells, exponent, matrix = tensors(cells, exponent, matrix)
    found = keras.ops.convert_to_numpy(_mix(_look_up(cells, _powers(exponent)), matrix))
    np.testing.assert_allclose(found, expected, atol=0.9)  # the powers are rounded to bytes
    assert abs((found - expected).mean()) < 0.02


def test_only_black_becomes_black():
    table = keras.ops.convert_to_numpy(_powers(keras.ops.convert_to_tensor([[0.5], [1.0], [2.0]])))
    assert (table[:, 0] == 0).all() and (table[:, 1:] > 0).all() and (table[1] == np.arange(256)).all()


def test_stain_jitter_of_nothing_changes_nothing(cells):
    np.testing.assert_allclose(apply([StainJitter(0.0, 0.0, seed=0)], cells), cells, atol=1e-3)


def test_draws_follow_the_seed_and_go_on_from_a_kept_state(cells):
    """The state lies in the layers' variables, so a trainer that keeps its variables resumes with the same draws."""
    first, again = augmentation(recipe(**ON)), augmentation(recipe(**ON))
    assert (apply(first, cells) == apply(again, cells)).all()
    kept = [variable.numpy() for layer in first for variable in layer.variables]
    second = apply(first, cells)
    assert (second != apply(augmentation(recipe(**ON)), cells)).any()
    for variable, value in zip([v for layer in again for v in layer.variables], kept, strict=True):
        variable.assign(value)
    assert (apply(again, cells) == second).all()


def test_full_precision_whatever_the_networks(cells):
    before, full = keras.config.dtype_policy(), apply(augmentation(recipe(**ON)), cells)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = apply(augmentation(recipe(**ON)), cells)
    finally:
        keras.config.set_dtype_policy(before)
    assert mixed.dtype == np.float32 and (mixed == full).all()


def test_in_a_compiled_training_step(cells):
    """Any batch size, the network's own precision afterwards, no gradient asked of the augmentation."""
    x = augmented = keras.Input((SIZE, SIZE, 3), dtype="uint8")
    for layer in augmentation(recipe(**ON)):
        augmented = layer(augmented)
    model = keras.Model(x, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling2D()(augmented / 255)))
    model.compile("sgd", "mse", jit_compile=False)
    before = model.get_weights()[0].copy()
    losses = [model.train_on_batch(cells[:n], np.ones((n, 1))) for n in (4, 3, 4)]
    assert np.isfinite(losses).all() and (model.get_weights()[0] != before).any()


def test_blur_is_scipys_within_the_cell(cells):
    from scipy.ndimage import gaussian_filter

    deviation, reach = np.linspace(0.4, 1.5, len(cells), dtype="float32")[:, None], np.arange(-5, 6, dtype="float32")
    found = keras.ops.convert_to_numpy(_blur(*tensors(cells, np.exp(-0.5 * (reach / deviation) ** 2))))
    for cell, sigma, blurred in zip(cells, deviation[:, 0], found, strict=True):
        inside = (cell.max(-1, keepdims=True) > 0).astype("float64")
        smooth = [gaussian_filter(x, (sigma, sigma, 0), mode="constant", radius=(5, 5, 0)) for x in (cell * inside, inside)]
        expected = np.maximum(smooth[0] / (smooth[1] + 1e-6), 1) * inside
        np.testing.assert_allclose(blurred, expected, atol=0.51)  # rounded


def test_blur_leaves_the_outline_where_it_was(cells):
    blurred = apply([Defocus(2.0, seed=0)], cells)
    assert ((blurred.max(-1) > 0) == (cells.max(-1) > 0)).all() and blurred.dtype == np.uint8
    assert np.abs(np.diff(blurred.astype(int), axis=1)).mean() < np.abs(np.diff(cells.astype(int), axis=1)).mean()
