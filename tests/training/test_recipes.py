"""Every file of training/recipes/, against the papers' figures (the five systems: training data, input, batch, rate, split)."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import model_zoo
from training.recipe import read_recipe

FOLDER = Path(__file__).parents[2] / "training" / "recipes"
FILES = {file.stem: file for file in sorted(FOLDER.glob("*.toml"))}
PUBLISHED = [stem for stem in FILES if stem.endswith("_as_published")]
BY_SUBJECT = [stem for stem in FILES if stem.endswith("_by_subject")]
LEAK = "image-level split: cells of a patient on both sides"

# What each paper says of all its systems. Where one is silent, nothing is pinned.
BY_PAPER = {
    "000": {"protocol": "image_level", "input_size": 256, "epochs": 100, "shares": [0.75, 0.0, 0.25], "sampling": "cells"},
    "001": {
        "protocol": "image_level",
        "crop": 400,
        "batch_size": 30,
        "epochs": 100,
        "draws_per_epoch": 20_000,
        "optimizer": "sgd",
        "learning_rate": 2e-4,
        "flip": "both",
        "quarter_turns": True,
        "watch": "accuracy",
        "shares": [0.8, 0.2, 0.0],
    },
    "002": {
        "protocol": "official",
        "crop": 300,
        "input_size": 300,
        "batch_size": 16,
        "epochs": 6,
        "draws_per_epoch": 0,
        "optimizer": "adam",
        "learning_rate": 1.0,
        "schedule": "steps",
        "step_epochs": 2,
        "class_weight": True,
        "flip": "both",
        "rotate": 180,
        "shift": 0.2,
        "stain": 0.0,
        "gamma": 0.0,
        "rotations": 8,
    },
    "003": {
        "protocol": "image_level",
        "input_size": 250,
        "batch_size": 32,
        "epochs": 40,
        "weights": "imagenet",
        "watch": "accuracy",
        "patience": 0,
        "shares": [0.6, 0.2, 0.2],
        "sampling": "cells",
    },
    "004": {
        "protocol": "image_level",
        "sampling": "undersampled",
        "flip": "horizontal",
        "optimizer": "adam",
        "weights": "imagenet",
        "patience": 3,
        "shares": [0.9, 0.05, 0.05],
    },
}
SYSTEMS = {
    "000": "vanilla.",
    "001": ("alexnet", "vgg16", "resnet50", "inception_v3", "six_block_cnn"),
    "002": "se_resnext50",
    "003": ("allnet", "vgg16.allnet_baseline", "resnet50.allnet_baseline", "inception_v3.allnet_baseline"),
    "004": "efficientnet_b3",
}


def header(stem):
    """Comment lines before the first key, and their text as one line."""
    lines = FILES[stem].read_text("utf-8").splitlines()
    lines = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return lines, " ".join(line.removeprefix("# ") for line in lines)


def factor(recipe, layer):
    return next((f for pattern, f in recipe.rates.items() if re.fullmatch(pattern, layer)), 1)


@pytest.mark.parametrize("stem", FILES)
def test_header_names_its_command_source_and_expectation(stem):
    recipe, (lines, text) = read_recipe(FILES[stem]), header(stem)
    assert lines[0] == f"# python -m training training/recipes/{stem}.toml --data DATA"
    assert "Source: " in text and "Expected" in text
    assert recipe.title and recipe.summary.endswith(".")
    if recipe.paper:
        assert f"paper {recipe.paper}" in text


@pytest.mark.parametrize("stem", PUBLISHED + BY_SUBJECT)
def test_file_is_named_after_its_network_and_protocol(stem):
    recipe, (_, text) = read_recipe(FILES[stem]), header(stem)
    ending = "as_published" if stem in PUBLISHED else "by_subject"
    assert stem == f"{recipe.architecture.replace('.', '_')}_{ending}"
    assert recipe.paper and "[ours]" in text and "Reported" in text


@pytest.mark.parametrize("stem", PUBLISHED)
def test_as_published_says_how_it_splits(stem):
    recipe, (_, text) = read_recipe(FILES[stem]), header(stem)
    label = {"image_level": LEAK, "official": "official split"}[recipe.protocol]
    assert label in text and label in recipe.summary


@pytest.mark.parametrize("stem", BY_SUBJECT)
def test_by_subject_is_our_protocol(stem):
    recipe = read_recipe(FILES[stem])
    assert (recipe.protocol, recipe.folds, recipe.test_folds, recipe.validation) == ("by_subject", 5, [], True)
    assert (recipe.sampling, recipe.watch, recipe.crop) == ("subjects", "auroc", 300)
    assert recipe.stain and recipe.gamma and recipe.rotate == 180 and recipe.flip == "both"


@pytest.mark.parametrize("stem", PUBLISHED)
def test_as_published_holds_the_papers_figures(stem):
    recipe = read_recipe(FILES[stem])
    assert recipe.architecture.startswith(SYSTEMS[recipe.paper])
    told = BY_PAPER[recipe.paper]
    assert {name: getattr(recipe, name) for name in told} == told
    assert recipe.input_size == model_zoo.find_architecture(recipe.architecture).input_size
    if recipe.paper in ("000", "003"):
        assert not (recipe.flip or recipe.rotate or recipe.shift or recipe.stain or recipe.class_weight)


def test_every_architecture_trains_from_a_recipe_and_every_system_from_two():
    recipes, tuned = {stem: read_recipe(FILES[stem]) for stem in FILES}, ("allnet", "efficientnet_b3")
    assert {recipe.architecture for recipe in recipes.values()} == set(model_zoo.architectures())
    vanilla = {recipe.architecture for recipe in recipes.values() if recipe.architecture.startswith("vanilla.")}
    assert len(vanilla) == 13
    read_by_us = {name for name in model_zoo.architectures() if name.endswith((".pooled", ".turned"))}
    for architecture in {recipe.architecture for recipe in recipes.values() if recipe.paper} - read_by_us:
        stem = architecture.replace(".", "_")
        assert f"{stem}_as_published" in FILES
        assert (stem if stem in tuned else f"{stem}_by_subject") in FILES


def test_vanilla_recipes_have_the_optimizers_of_table_3():
    from model_zoo.vanilla import TABLE_3

    alike = Counter(replace(row, title="", optimizer="") for row in TABLE_3.values())  # twice where the optimizer is all
    for variant, row in TABLE_3.items():
        assert read_recipe(FILES[f"vanilla_{variant}_as_published"]).optimizer == row.optimizer
        ours = row.optimizer if alike[replace(row, title="", optimizer="")] > 1 else "adamw"
        assert read_recipe(FILES[f"vanilla_{variant}_by_subject"]).optimizer == ours


def test_every_layer_of_se_resnext50_trains_at_its_stages_rate():
    recipe = read_recipe(FILES["se_resnext50_as_published"])
    network = model_zoo.find_architecture(recipe.architecture).build(input_size=32)
    stages = {"conv1": 1e-6, "bn1": 1e-6, "layer1": 1e-6, "layer2": 1e-4, "layer3": 1e-4, "layer4": 1e-4, "logit": 1e-2}
    trained = [layer.name for layer in network.layers if layer.trainable_variables]
    assert {name.partition("_")[0] for name in trained} == set(stages)
    for name in trained:
        assert recipe.learning_rate * factor(recipe, name) == stages[name.partition("_")[0]]


def test_first_ten_layers_of_the_vgg_baseline_are_frozen():
    recipe = read_recipe(FILES["vgg16_allnet_baseline_as_published"])
    network = model_zoo.find_architecture(recipe.architecture).build(input_size=96)
    first = next(i for i, layer in enumerate(network.layers) if layer.name == "block1_conv1")
    ten = network.layers[first : first + 9]  # Keras counts VGG16's input layer first
    frozen = {layer.name for layer in network.layers if layer.trainable_variables and factor(recipe, layer.name) == 0}
    assert frozen == {layer.name for layer in ten if layer.trainable_variables} and len(frozen) == 7
