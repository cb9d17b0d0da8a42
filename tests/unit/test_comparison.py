"""A comparison on a tiny model: every method answers the same samples, each by its own rules, and the table says so."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from free_dist.config import DataConfig, DecodingConfig, EvaluationConfig, Recipe
from free_dist.data.stream import split_samples
from free_dist.decoding import generate
from free_dist.evaluation.arms import ours
from free_dist.evaluation.benchmark import exits_arm, prompted, run_interleaved
from free_dist.evaluation.comparison import FIXED, OURS, Method, Setting, contest, method_arm
from free_dist.evaluation.comparison_choice import ChoiceAmounts, Chosen, SettingJudge, choose_settings
from free_dist.evaluation.comparison_report import COLUMNS, kept_on_both, markdown, verdict
from free_dist.evaluation.comparison_run import compare_task
from free_dist.evaluation.metrics_captions import CaptionSuite
from free_dist.evaluation.operating_points import wanted
from free_dist.evaluation.report_claims import comparison_claims
from free_dist.exits import ExitBank

LAYERS = (1, 2)
AMOUNTS = ChoiceAmounts(first_samples=2, samples=3, kept=2, finalists=1, timed_samples=2)
COSTS = {
    name: {"training_seconds": 2.0, "training_flops_per_sample": 3.0} for name in ("ce_gan", "ce", "kl", "classifier")
}


@pytest.fixture(scope="module")
def recipe(tiny_data: DataConfig) -> Recipe:
    return Recipe(
        data=tiny_data,
        decoding=DecodingConfig(max_new_tokens=5),
        evaluation=EvaluationConfig(max_samples=6, tasks=["vqa"], thresholds=[0.002, 0.01]),
    )


@pytest.fixture(scope="module")
def methods(tiny_backbone, recipe: Recipe):
    banks = {}
    for seed, name in enumerate(COSTS):
        bank = ExitBank(tiny_backbone, LAYERS, variant="classifier" if name == "classifier" else "full")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in bank.transformers.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        banks[name] = bank.eval().requires_grad_(False)
    return contest(tiny_backbone, banks, recipe.evaluation.thresholds)


@pytest.fixture(scope="module")
def chosen(tiny_backbone, tiny_encoder, methods, recipe: Recipe) -> dict[str, Chosen]:
    return choose_settings(
        tiny_backbone, tiny_encoder, methods, recipe, "vqa", min_quality=0.99, amounts=AMOUNTS,
        prompted=lambda samples: list(prompted(tiny_backbone, tiny_encoder, samples)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tiny_backbone, tiny_encoder, methods, chosen, recipe: Recipe):
    return compare_task(
        tiny_backbone, tiny_encoder, methods, chosen, recipe, "vqa", min_quality=0.99, costs=COSTS, quiet=True
    )


def test_every_row_has_the_columns_and_they_hold_together(measured, methods) -> None:
    table, sweep = measured
    for row in (*table, *sweep):
        assert set(COLUMNS) <= set(row)
        assert row["n"] == 6 and row["quality_name"] == "VQA accuracy"
        assert row["quality_interval"][0] <= row["quality"] <= row["quality_interval"][1]
        assert row["speed_interval"][0] <= row["speed"] <= row["speed_interval"][1]
        assert row["layer_ratio"] == pytest.approx(4 / row["mean_blocks"])
        assert math.isfinite(row["speed"]) and row["speed"] > 0
    assert {row["method"] for row in table} == {"full", "hf", *(method.name for method in methods)}
    full = {row["method"]: row for row in table}["full"]
    assert full["agreement"] == 1 and full["mean_blocks"] == 4 and full["quality"] == full["quality_full"]
    assert max(row["speed"] for row in table if row["method"] in ("full", "hf")) == 1


def test_one_row_per_exit_layer_of_a_fixed_depth_and_no_method_is_left_out_of_the_choice(
    measured, chosen, methods
) -> None:
    table, _ = measured
    for name in ("cut_lens", "cut_ce"):
        rows = [row for row in table if row["method"] == name]
        assert {tuple(row["exit_layers"]) for row in rows} >= {(layer,) for layer in LAYERS}
        for row in rows:
            layer = row["exit_layers"][0]
            assert row["mean_blocks"] == layer + (name == "cut_ce"), (
                "an exit transformer counts as a block, a lens as none"
            )
    assert set(chosen) == {method.name for method in methods}
    assert all(sum(row["method"] == name and bool(row.get("chosen")) for row in table) == 1 for name in chosen)
    assert chosen["ours_propagated"].setting == chosen[OURS].setting


@pytest.mark.parametrize("tokenizer", ["ptb-like", "auto"])
def test_captions_are_scored_with_the_recipe_s_tokenizer_which_every_row_names(
    tiny_backbone, tiny_encoder, methods, chosen, measured, recipe: Recipe, tokenizer: str
) -> None:
    settings = replace(recipe.evaluation, tasks=["caption"], max_samples=2, caption_tokenizer=tokenizer)
    table, sweep = compare_task(
        tiny_backbone, tiny_encoder, methods, chosen, replace(recipe, evaluation=settings), "caption",
        min_quality=0.99, costs=COSTS, quiet=True,
    )  # fmt: skip
    wanted = CaptionSuite.of(settings).tokenizer
    assert {row["tokenizer"] for row in (*table, *sweep)} == {wanted}
    assert all("tokenizer" not in row for row in measured[0])


def test_a_method_that_never_ran_on_calibration_has_no_quality_there_and_is_never_named_as_kept(
    measured, chosen
) -> None:
    assert chosen["ours_propagated"].quality_ratio is None and chosen["ours_propagated"].keeps is None
    (row,) = [row for row in measured[0] if row["method"] == "ours_propagated"]
    assert row["calibration_quality_ratio"] is None and row["note"].startswith("never ran on calibration")
    best = row | {"quality": 0.8, "quality_full": 0.8, "speed": 9.0}
    assert kept_on_both([best], 0.99) == []


def test_trained_numbers_are_those_of_the_exits_and_untrained_methods_cost_nothing(measured, tiny_backbone) -> None:
    rows = {row["method"]: row for row in measured[0]}
    head = sum(parameter.numel() for parameter in tiny_backbone.shared_modules()[1].parameters())
    block = sum(parameter.numel() for parameter in tiny_backbone.block(1).parameters())
    for name in ("classifier", "deebert", "pabee"):
        assert (rows[name]["trainable_parameters"], rows[name]["training_seconds"]) == (2 * head, 2.0)
    for name in ("ce_gan", "ce", "kl", "ours_propagated", "ours_lossless", "cut_ce"):
        assert rows[name]["trainable_parameters"] == 2 * block
    for name in ("full", "hf", "calm", "cut_lens", "self_speculation"):
        assert (rows[name]["trainable_parameters"], rows[name]["training_flops_per_sample"]) == (0, 0.0)


def test_self_speculation_says_what_the_full_model_says_at_every_layer(
    tiny_backbone, tiny_encoder, methods, recipe
) -> None:
    method = methods.named("self_speculation")
    samples = split_samples(recipe.data, "test", "vqa", max_samples=6)
    drafted = accepted = 0
    for prompt in prompted(tiny_backbone, tiny_encoder, samples):
        (wanted,) = generate(tiny_backbone, None, prompt.pixel_values, prompt.prompt_ids, max_new_tokens=9)
        for setting in method.settings:
            (found,) = generate(
                tiny_backbone,
                method.bank,
                prompt.pixel_values,
                prompt.prompt_ids,
                max_new_tokens=9,
                **method.options(setting),
            )
            assert found.tokens == wanted.tokens
            drafted, accepted = drafted + found.drafted, accepted + found.accepted
    assert drafted > accepted > 0, "drafts that are all right, or all wrong, would prove nothing"


def test_lossless_rows_agree_with_the_full_model(measured) -> None:
    rows = [row for row in measured[0] if row.get("lossless")]
    assert {row["method"] for row in rows} == {"self_speculation", "ours_lossless"}
    assert all(row["agreement"] == 1 and row["quality"] == row["quality_full"] for row in rows)


def test_a_fixed_depth_leaves_there_for_every_token(tiny_backbone, tiny_encoder, methods, recipe) -> None:
    sample = split_samples(recipe.data, "test", "vqa", max_samples=1)
    (prompt,) = prompted(tiny_backbone, tiny_encoder, sample)
    for name in ("cut_lens", "cut_ce"):
        method = methods.named(name)
        assert method.policy == FIXED
        for setting in method.settings:
            layer = method.bank.exit_layers[setting.used[0]]
            (found,) = generate(
                tiny_backbone, method.bank, prompt.pixel_values, prompt.prompt_ids, max_new_tokens=6,
                eos_token_id=-1, **method.options(setting),
            )  # fmt: skip
            assert found.exit_layers == [layer] * 6 and found.blocks_executed == [layer] * 6
            # The same tokens as a confidence policy that always emits, which computes a softmax for it.
            thresholds = [0.0 if i in setting.used else 1.1 for i in range(len(method.bank.exit_layers))]
            (always,) = generate(
                tiny_backbone, method.bank, prompt.pixel_values, prompt.prompt_ids, max_new_tokens=6,
                eos_token_id=-1, thresholds=thresholds,
            )  # fmt: skip
            assert found.tokens == always.tokens


@pytest.mark.parametrize("variant", ["full", "lora", "bottleneck", "classifier", "lens"])
def test_every_arm_counts_an_exit_as_a_block_only_where_it_is_one(
    tiny_backbone, tiny_encoder, recipe, variant: str
) -> None:
    bank = ExitBank(tiny_backbone, [1], variant=variant).merged().eval().requires_grad_(False)
    setting = Setting(used=(0,), threshold=0.0)
    method = Method(name="it", label="it", bank=bank, policy="max_prob", settings=(setting,))
    arms = [
        exits_arm(tiny_backbone, bank, threshold=0.0, max_new_tokens=4),
        ours(tiny_backbone, bank, method="ours", thresholds=[0.0], max_new_tokens=4).arm,
        method_arm(tiny_backbone, method, setting, max_new_tokens=4),
    ]
    samples = split_samples(recipe.data, "test", "vqa", max_samples=1)
    (answers,) = run_interleaved(arms, prompted(tiny_backbone, tiny_encoder, samples), warmup=0)
    for answer in answers:
        assert answer is not None
        assert answer.blocks == len(answer.tokens) * (1 + (variant in ("full", "lora")))


def test_the_choice_takes_what_keeps_the_quality_and_says_where_nothing_does(
    tiny_backbone, tiny_encoder, methods, recipe, monkeypatch
) -> None:
    good = methods.named("cut_lens").settings[-1]

    def judged(self, method, setting, count):
        del self, count
        return (1.0 if setting is None or (method.name == "cut_lens" and setting == good) else 0.2), 1.0

    monkeypatch.setattr(SettingJudge, "judge", judged)
    found = choose_settings(
        tiny_backbone, tiny_encoder, methods, recipe, "vqa", min_quality=0.9, amounts=AMOUNTS,
        prompted=lambda samples: list(prompted(tiny_backbone, tiny_encoder, samples)),
    )  # fmt: skip
    assert found["cut_lens"].setting == good and found["cut_lens"].keeps
    assert not found[OURS].keeps and found[OURS].quality_ratio == pytest.approx(0.2)
    assert found["self_speculation"].keeps, "what is verified needs no choice by quality"


@pytest.mark.parametrize(
    ("ratio", "min_quality", "keeps"), [(0.992, 0.99, True), (0.988, 0.99, False), (1.0, 1.0, True)]
)
def test_a_setting_is_remarked_as_not_kept_only_below_the_wanted_quality(
    tiny_backbone, tiny_encoder, methods, recipe, monkeypatch, ratio: float, min_quality: float, keeps: bool
) -> None:
    monkeypatch.setattr(SettingJudge, "judge", lambda self, method, setting, count: (ratio if method else 1.0, 1.0))
    found = choose_settings(
        tiny_backbone, tiny_encoder, methods, recipe, "vqa", min_quality=min_quality, amounts=AMOUNTS,
        prompted=lambda samples: list(prompted(tiny_backbone, tiny_encoder, samples)),
    )  # fmt: skip
    assert (found[OURS].quality_ratio, found[OURS].keeps) == (ratio, keeps)


def test_all_of_the_quality_can_be_wanted_and_still_the_fastest_setting_is_taken() -> None:
    assert wanted(1.0) == 1.0 and wanted(0.99) == pytest.approx(0.995)


def test_the_report_says_who_wins_from_the_rows_alone(measured) -> None:
    table, sweep = measured
    content = {"rows": table, "sweep": sweep, "min_quality": 0.99, "command": "python launch/compare.py"}
    text = markdown(content)
    assert all(row["label"] in text for row in table) and "## Sweep" in text
    ours = next(row for row in table if row["method"] == OURS and row["chosen"])
    better = dict(ours) | {
        "quality": 0.8, "quality_full": 0.8, "calibration_quality_ratio": 1.0, "ours_over_this_interval": [1.2, 1.4]
    }  # fmt: skip
    other = better | {"method": "ce", "label": "CE", "speed": ours["speed"] + 1, "ours_over_this_interval": [0.5, 0.9]}
    said = verdict([better, other], 0.99)
    assert said[0].startswith("Fastest operating point with at least 99% of the quality, here and on calibration: CE")
    assert said[-1] == "Ours is slower than (paired, 95%): CE."
    lost = [row | {"quality": row["quality_full"] - 1} for row in (better, other)]
    none = "No method keeps 99% of the quality, here and on calibration."
    assert verdict(lost, 0.99)[0] == none
    # Good on these samples alone, or shown without having been chosen: luck is no win.
    lucky = [row | {"calibration_quality_ratio": ratio} for row, ratio in ((better, 0.9), (other, None))]
    assert verdict(lucky, 0.99)[0] == none


def test_the_claim_is_of_a_chosen_method_that_kept_the_quality_on_both_splits() -> None:
    def row(method: str, speed: float, quality: float, calibration: float | None) -> dict[str, object]:
        return {
            "task": "vqa", "method": method, "label": method.upper(), "speed": speed, "quality": quality,
            "quality_full": 0.8, "calibration_quality_ratio": calibration,
        }  # fmt: skip

    rows = [
        row("full", 1.0, 0.8, None),
        row("hf", 9.0, 0.8, None),
        row("ours", 1.5, 0.8, 1.0),
        row("ce", 1.4, 0.8, 1.0),
    ]
    lucky = [row("cut", 5.0, 0.8, None), row("calm", 4.0, 0.8, 0.9), row("kl", 3.0, 0.5, 1.0)]
    (claim,) = comparison_claims({"rows": rows + lucky, "min_quality": 0.99})
    assert claim == (
        "vqa: of 5 methods on the same decoder, OURS is the fastest that keeps 99% of the quality, here and on calibration: 1.50."
    )
    (claim,) = comparison_claims({"rows": rows[:2] + lucky, "min_quality": 0.95})
    assert claim == "vqa: none of 3 methods keeps 95% of the quality, here and on calibration."


def test_a_setting_is_told_with_its_layers() -> None:
    class Bank:
        exit_layers = (2, 4, 7)

    assert Setting(used=(0, 2), threshold=0.5).text(Bank()) == "block 2+7, > 0.5"  # type: ignore[arg-type]
    assert Setting(used=(0, 1, 2), patience=2).text(Bank()) == "block 2+4+7, 2 agree"  # type: ignore[arg-type]
    assert replace(Setting(used=(1,))).text(Bank()) == "block 4"  # type: ignore[arg-type]
