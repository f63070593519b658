import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_zoo import FrameSpec, UnknownArchitectureError
from training.errors import RecipeError
from training.recipe import Recipe, make_recipe, read_recipe, write_recipe

GOOD = {
    "architecture": "mobilenet_v2",
    "title": "T",
    "summary": "S",
    "crop": 300,
    "input_size": 96,
    "epochs": 1,
    "draws_per_epoch": 8,
    "batch_size": 4,
    "learning_rate": 1e-3,
}


def write(path, **changes):
    values = {key: value for key, value in (GOOD | changes).items() if value is not None}

    def toml(value):
        return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')

    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in values.items()))
    return path


def test_recipe_is_read_with_its_defaults(tmp_path):
    recipe = read_recipe(write(tmp_path / "r.toml", seed=3, flip="both"))
    assert recipe == Recipe(**GOOD, seed=3, flip="both")
    assert recipe.framing == FrameSpec(crop=300, size=96) and recipe.folds == 5 and recipe.test_folds == []
    assert read_recipe(write(tmp_path / "r.toml", learning_rate=1)).learning_rate == 1


def test_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe(**GOOD).seed = 1


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"learning_rat": 0.1}, "unknown key 'learning_rat'.*Did you mean 'learning_rate'"),
        ({"zzz": 1}, "unknown key 'zzz'.*Known keys: architecture"),
        ({"epochs": 1.5}, "epochs must be of type int.*epochs=1.5"),
        ({"epochs": True}, "epochs must be of type int"),
        ({"flip": True}, "flip must be of type str"),
        ({"flip": "up"}, "flip must be one of '', 'horizontal', 'both'.*'up'"),
        ({"protocol": "by_image"}, "protocol must be one of"),
        ({"title": 7}, "title must be of type str"),
        ({"learning_rate": "fast"}, "learning_rate must be of type float"),
        ({"epochs": None, "crop": None}, "missing crop, epochs"),
        ({"epochs": 0}, "without epochs needs a probe"),
        ({"probe_imaging": 1.0}, "probe_imaging needs a probe, and stain, gamma or blur"),
        ({"epochs": -1}, "epochs must not be below 0.*epochs=-1"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"rotate": 270}, "rotate must lie in 0..180"),
        ({"schedule": "steps"}, "needs step_epochs"),
        ({"shares": [0.5, 0.5, 0.5]}, "adding up to 1"),
        ({"folds": 2}, "need folds >= 3"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"gamma": 1.5}, "gamma must lie in 0..1.*gamma=1.5"),
        ({"ema": 1.0}, "ema must lie"),
        ({"stain": -0.1}, "stain must lie"),
        ({"test_folds": [5]}, "must lie in 0..4"),
        ({"test_folds": [0, 0]}, "each fold once"),
        ({"shares": ["a", "b", "c"]}, "shares must be numbers"),
        ({"seed": -1}, "seed must not be below 0"),
        ({"seed": 5_000_000_000}, "seed must be below 4294967294.*seed=5000000000"),
        *[({name: math.inf}, f"{name} must be finite.*{name}=inf") for name in ("learning_rate", "blur", "probe")],
        ({"shares": [math.nan, 0.5, 0.5]}, "adding up to 1"),
        ({"subject_power": math.nan}, "subject_power must not be below 0"),
        ({"folds_by": "stains"}, "folds_by must be one of 'cells', 'chance', 'stain'"),
        ({"folds_by": "stain", "protocol": "image_level"}, "folds_by names folds"),
    ],
)
def test_mistakes_are_told_with_what_was_received(changes, told, tmp_path):
    with pytest.raises(RecipeError, match=told):
        read_recipe(write(tmp_path / "r.toml", **changes))


def test_unknown_architecture_offers_the_nearest(tmp_path):
    with pytest.raises(UnknownArchitectureError, match="Did you mean 'mobilenet_v2'"):
        read_recipe(write(tmp_path / "r.toml", architecture="mobilenetv2"))


@pytest.mark.parametrize("content", [b"epochs = ", b"\xff\xfe", b"epochs = 1\nepochs = 2"])
def test_what_is_no_toml_is_told_by_name(content, tmp_path):
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.toml"):
        read_recipe(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match=r"nowhere\.toml"):
        read_recipe(tmp_path / "nowhere.toml")


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31),
        "stain": st.floats(0, 0.9),
        "flip": st.sampled_from(["", "horizontal", "both"]),
        "title": st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=20),
        "test_folds": st.lists(st.integers(0, 4), max_size=3, unique=True),
        "rates": st.dictionaries(st.from_regex(r"[a-z0-9_.]{1,8}", fullmatch=True), st.floats(0, 10), max_size=3),
        "quarter_turns": st.booleans(),
    },
)


@given(SETTINGS)
def test_what_is_written_reads_as_the_same_recipe(tmp_path_factory, settings):
    recipe, file = Recipe(**GOOD | settings), tmp_path_factory.mktemp("r") / "r.toml"
    write_recipe(recipe, file)
    assert read_recipe(file) == recipe


@pytest.mark.parametrize(
    "rates, told",
    [({"[": 1}, "no regular expression"), *[({"a": factor}, "a number from 0") for factor in (-1, "b", math.inf, math.nan)]],
)
def test_rates_are_checked(rates, told):
    with pytest.raises(RecipeError, match=told):
        make_recipe(GOOD | {"rates": rates})


def test_tiny_is_small_whatever_the_recipe():
    tiny = Recipe(**GOOD | {"input_size": 300, "epochs": 100, "batch_size": 64, "refit": True}).tiny()
    assert (tiny.input_size, tiny.epochs, tiny.draws_per_epoch, tiny.batch_size) == (96, 2, 16, 8)
    assert tiny.test_folds == [0] and not tiny.refit and "mean nothing" in tiny.summary
