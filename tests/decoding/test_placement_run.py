"""The whole of placing exits on a tiny random model and real shards: record, search, compare, measure, draw."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from free_dist.backbones import Blip2Backbone
from free_dist.config import EXIT_VARIANTS, DecodingConfig, EvaluationConfig, ExitsConfig, Recipe, UserError
from free_dist.evaluation.calibration import OFF
from free_dist.evaluation.placement_plot import placement_picture
from free_dist.evaluation.placement_result import measure
from free_dist.evaluation.placement_run import (
    BOUNDS,
    LEVELS,
    Recorded,
    Settings,
    Variant,
    is_adversarial,
    named_sets,
    record,
    search_all,
)
from free_dist.exits import ExitBank
from free_dist.exits.export import save_exits
from free_dist.recipe_checks import check_recipe

SETTINGS = Settings(max_exits=2, max_harm=0.05, record=4, random_sets=2, random_measured=1, samples=4, rounds=1)


@pytest.fixture(scope="module")
def model(tiny_backbone: Blip2Backbone) -> Blip2Backbone:
    backbone = copy.deepcopy(tiny_backbone)
    for parameter in backbone.model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(8.0)
    return backbone


@pytest.fixture(scope="module")
def recipe(tiny_data) -> Recipe:
    return Recipe(
        data=tiny_data,
        exits=ExitsConfig(exit_layers=[1, 3]),
        decoding=DecodingConfig(max_new_tokens=4),
        evaluation=EvaluationConfig(tasks=["vqa", "dialogue"]),
    )


@pytest.fixture(scope="module")
def recorded(model: Blip2Backbone, tiny_encoder, recipe: Recipe) -> list[Recorded]:
    variants = []
    for name in ("full", "bottleneck"):
        bank = ExitBank(model, (1, 2, 3), variant=name).eval().requires_grad_(False)
        variants.append(Variant(name=name, bank=bank, parameters=dict.fromkeys((1, 2, 3), 5 if name == "full" else 1)))
    return record(model, tiny_encoder, recipe, variants, SETTINGS, lambda _: None)


def test_a_whole_placement_has_everything_that_is_promised(
    model, tiny_encoder, recipe, recorded, tmp_path: Path
) -> None:
    found = search_all(recorded, recipe, SETTINGS, lambda _: None)
    content = measure(model, tiny_encoder, recipe, found, SETTINGS, lambda _: None)
    entries = [content["predicted"], *content["baselines"].values()]
    names = {"uniform", "recipe", "random 1", "random 2"}
    assert names < content["baselines"].keys() and len(content["baselines"]) == 6
    for entry in entries:
        for task in found.tasks:
            thresholds = entry["thresholds"][task]
            assert len(thresholds) == len(entry["layers"])
            assert set(thresholds) <= {*LEVELS, OFF}
    # Every baseline is searched as the found set is, on fewer blocks or, with more exits than the budget, on other ones.
    within = [
        placed for placed in (found.named | found.drawn).values() if len(placed.choice.layers) <= SETTINGS.max_exits
    ]
    assert all(placed.choice.relative_seconds >= found.chosen.choice.relative_seconds - 1e-9 for placed in within)
    assert len(content["predicted"]["layers"]) <= SETTINGS.max_exits
    assert content["predicted"]["predicted_harm"] <= SETTINGS.max_harm
    timed = [entry for entry in entries if entry["measured_speed"] is not None]
    assert len(timed) == 6  # found, the four named, one of the two random ones
    for entry in timed:
        low, high = entry["measured_speed_interval"]
        assert 0 < low <= entry["measured_speed"] <= high and entry["n"] == 8 and 0 <= entry["quality"] <= 1
    assert content["predicted"]["slower_than_found"] == 1.0
    assert {point["max_harm"] for point in content["points"]} == set(BOUNDS)
    for own in content["tasks"].values():
        assert isinstance(own["predicted"]["thresholds"], list)
    for number, (task, scale) in enumerate(content["saving_scales"].items()):
        assert 0.5 <= scale <= 2.0
        for name, entry in (
            content["tasks"][task]["baselines"] | {"found": content["tasks"][task]["predicted"]}
        ).items():
            placed = ({"found": found.chosen} | found.named | found.drawn)[name]
            share = placed.choice.shares[number]  # of full depth's time, by the costs alone
            assert 1 - 1 / entry["predicted_speed"] == pytest.approx(scale * (1 - share)), name
    json.dumps(content, allow_nan=False)
    with Image.open(placement_picture(content, tmp_path / "placement.png")) as picture:
        assert picture.width > 500


def test_a_parameter_budget_turns_to_smaller_exits_or_none(recorded, recipe) -> None:
    found = search_all(recorded, recipe, replace(SETTINGS, max_parameters=1, max_harm=99.0), lambda _: None)
    chosen = found.chosen
    assert sum(chosen.variant.parameters[layer] for layer in chosen.choice.layers) <= 1
    assert all(point["parameters"] <= 1 for point in found.points)


def test_placements_that_nobody_searched_for_keep_the_parameter_budget(recorded, recipe) -> None:
    found = search_all(recorded, recipe, replace(SETTINGS, max_parameters=1, max_harm=99.0), lambda _: None)
    for name, placed in (found.named | found.drawn).items():
        assert sum(placed.variant.parameters[layer] for layer in placed.choice.layers) <= 1, name
        assert {layer for one in placed.choice.placements for layer in one.layers} <= set(placed.choice.layers)


def test_a_placement_without_an_exit_before_the_last_block_is_left_out_and_said_so(recorded, recipe) -> None:
    said: list[str] = []
    last = replace(recipe, exits=ExitsConfig(exit_layers=[4]))
    found = search_all(recorded, last, SETTINGS, said.append)
    assert "recipe" not in found.named and "uniform" in found.named
    assert any("recipe: no exit before the last of 4 blocks" in line for line in said)


def test_uniform_placements_of_a_shallow_model_name_no_block_twice(recorded, recipe) -> None:
    assert named_sets(3, 3, recipe)["uniform"] == (1, 2)
    assert named_sets(2, 9, recipe)["uniform"] == (1, 2)
    found = search_all(recorded, recipe, replace(SETTINGS, max_exits=5), lambda _: None)
    assert found.named["uniform"].choice.layers == (1, 2, 3)


def test_a_speed_that_nothing_reaches_is_told_with_what_is_reached(recorded, recipe) -> None:
    with pytest.raises(UserError, match=r"--min-speed 1000.0: the fastest placement .* is predicted at \d"):
        search_all(recorded, recipe, replace(SETTINGS, min_speed=1000.0), lambda _: None)
    slow = search_all(recorded, recipe, replace(SETTINGS, min_speed=0.5), lambda _: None)
    assert slow.bound == 0.0  # the least harm will do


def test_the_authors_layers_are_scaled_to_the_depth_at_hand() -> None:
    recipe = Recipe()
    sets = list(named_sets(16, 3, recipe).values())
    assert sets == [(4, 8, 12), (2, 3, 5), (2, 3, 9, 11, 14), (2, 4, 7)]
    assert list(named_sets(32, 3, recipe).values())[1:3] == [(3, 6, 9), (3, 5, 18, 21, 27)]


def test_parameters_of_an_export_are_counted_per_exit(model: Blip2Backbone, tmp_path: Path) -> None:
    bank = ExitBank(model, (1, 3), variant="lora")
    save_exits(bank, tmp_path, thresholds=0.9, backbone=model)
    variant = Variant.load("lora", model, tmp_path)
    whole = sum(tensor.numel() for tensor in bank.trainable_state_dict().values())
    assert variant.parameters == {1: whole // 2, 3: whole // 2}
    assert variant.bank.variant.name == "full" and not any(p.requires_grad for p in variant.bank.parameters())


@pytest.mark.parametrize("variant", EXIT_VARIANTS)
def test_every_variant_is_trained_with_a_loss_that_its_recipe_may_have(recipe: Recipe, variant: str) -> None:
    assert recipe.loss.adversarial_weight > 0
    weight = recipe.loss.adversarial_weight if is_adversarial(recipe, variant) else 0.0
    check_recipe(
        replace(
            recipe,
            exits=replace(recipe.exits, variant=variant),
            loss=replace(recipe.loss, adversarial_weight=weight),
        )
    )
    assert is_adversarial(recipe, variant) == (variant != "classifier")


def test_classifiers_are_recorded_and_searched_as_other_exits(
    model: Blip2Backbone, tiny_encoder, recipe: Recipe, tmp_path: Path
) -> None:
    bank = ExitBank(model, (1, 2, 3), variant="classifier")
    save_exits(bank, tmp_path, thresholds=0.9, backbone=model)
    heads = Variant.load("classifier", model, tmp_path)
    recorded = record(model, tiny_encoder, recipe, [heads], SETTINGS, lambda _: None)
    found = search_all(recorded, recipe, SETTINGS, lambda _: None)
    assert found.chosen.variant is heads and all(count > 0 for count in heads.parameters.values())
