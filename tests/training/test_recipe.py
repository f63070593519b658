import dataclasses
import math

import pytest

from model_zoo import FrameSpec, UnknownArchitectureError
from training.errors import RecipeError
from training.recipe import Recipe, read_recipe

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
    recipe = read_recipe(write(tmp_path / "r.toml", seed=3, flip=False))
    assert recipe == Recipe(**GOOD, seed=3, flip=False)
    assert recipe.framing == FrameSpec(crop=300, size=96) and recipe.folds == 5 and recipe.rotate
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
        ({"flip": 1}, "flip must be of type bool"),
        ({"title": 7}, "title must be of type str"),
        ({"learning_rate": "fast"}, "learning_rate must be of type float"),
        ({"epochs": None, "crop": None}, "missing crop, epochs"),
        ({"epochs": 0}, "epochs must be above 0.*epochs=0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"gamma": 1.5}, "gamma must lie in 0..1.*gamma=1.5"),
        ({"ema": 1.0}, "ema must lie"),
        ({"stain": -0.1}, "stain must lie"),
        ({"test_fold": 5}, "must lie in 0..4"),
        ({"test_fold": 0}, "must differ"),
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


def test_every_recipe_reads_and_states_its_command_source_and_expectation(repository):
    files = sorted((repository / "training" / "recipes").glob("*.toml"))
    assert {"efficientnet_b3.toml", "mobilenet_v2.toml"} <= {file.name for file in files}
    for file in files:
        assert read_recipe(file).title
        header = [line for line in file.read_text("utf-8").splitlines() if line.startswith("#")]
        assert header[0].startswith(f"# python -m training training/recipes/{file.name}")
        assert any("Source:" in line for line in header) and any("Expected" in line for line in header)
