"""The parameter table against arithmetic on the published hyperparameters, and what it says about the paper's claim."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.backbones.published import (
    PUBLISHED_BACKBONES,
    meta_language_model,
    meta_model,
    n_language_blocks,
    published_config,
)
from free_dist.config import EXIT_VARIANTS, UserError
from free_dist.evaluation import parameter_table as tables
from free_dist.exits import ExitBank, ExitVariant, FeatureClassifiers
from launch import plan

OPT = {"blip2-opt-2.7b": (2560, 32), "blip2-opt-6.7b": (4096, 32)}
T5 = {"blip2-flan-t5-xl": (2048, 5120, 2048), "instructblip-flan-t5-xxl": (4096, 10240, 4096)}
LLAMA = {
    "instructblip-vicuna-7b": (4096, 4096, 11008, 32, 32001),
    "minigpt4-vicuna-13b": (5120, 5120, 13824, 40, 32001),
    "minigpt4-llama2-7b": (4096, 4096, 11008, 32, 32000),
    "smollm2-135m": (576, 192, 1536, 30, 49152),
}


@pytest.fixture(scope="module")
def counts() -> dict[tuple[str, str], tables.ExitCount]:
    """All backbones and variants, by name."""
    return {(count.backbone, count.variant.name): count for count in tables.parameter_table()}


def millions(n: float) -> float:
    return round(n / 1e6, 1)


def test_a_full_exit_is_the_block_that_arithmetic_gives(counts) -> None:
    for name, (width, n_blocks) in OPT.items():
        block = 4 * (width**2 + width) + 2 * 4 * width**2 + 4 * width + width + 4 * width
        count = counts[name, "full"]
        assert (count.per_exit, count.block, count.n_blocks) == (block, block, n_blocks)
        assert count.classifier == 50304 * width
    for name, (width, inner, heads_width) in T5.items():
        count = counts[name, "full"]
        assert count.per_exit == count.block == 8 * width * heads_width + 3 * width * inner + 3 * width
        assert (count.classifier, count.n_blocks) == (32128 * width, 24)
    for name, (width, shared_width, inner, n_blocks, vocab_size) in LLAMA.items():
        count = counts[name, "full"]
        assert count.per_exit == 2 * width**2 + 2 * width * shared_width + 3 * width * inner + 2 * width
        assert (count.classifier, count.n_blocks) == (vocab_size * width, n_blocks)


def test_low_rank_and_bottleneck_exits_count_what_arithmetic_gives(counts) -> None:
    # OPT: four square maps and two of 1:4; T5: eight square ones, three of the inner width; 16 rows for every side.
    assert counts["blip2-opt-2.7b", "lora"].per_exit == 16 * (4 * 2 + 2 * 5) * 2560
    assert counts["blip2-flan-t5-xl", "lora"].per_exit == 16 * (8 * 2 * 2048 + 3 * (2048 + 5120))
    for name in PUBLISHED_BACKBONES:
        count = counts[name, "bottleneck"]
        size = count.width // 4
        assert count.per_exit == 2 * count.width * size + size + count.width + 2 * count.width


def test_the_blocks_and_heads_that_the_method_is_argued_from_are_these(counts) -> None:
    known = {
        "blip2-opt-2.7b": (78.7, 128.8),
        "blip2-opt-6.7b": (201.4, 206.0),
        "blip2-flan-t5-xl": (65.0, 65.8),
        "blip2-flan-t5-xxl": (260.1, 131.6),
        "instructblip-vicuna-7b": (202.4, 131.1),
    }
    for name, (block, head) in known.items():
        count = counts[name, "full"]
        assert (millions(count.block), millions(count.classifier)) == (block, head)


def test_counts_are_those_of_the_modules_that_training_builds() -> None:
    backbone = Blip2Backbone(new_model().eval().requires_grad_(False))
    for name in EXIT_VARIANTS:
        variant = ExitVariant(name=name, rank=4, bottleneck_size=24)
        bank = ExitBank(backbone, (2, 4, 7), variant=variant)
        trained = sum(parameter.numel() for parameter in bank.parameters() if parameter.requires_grad)
        count = tables.count_exit("embedded", variant, discriminator_hidden_size=32)
        assert count.trained(3) == trained == sum(tensor.numel() for tensor in bank.trainable_state_dict().values())
        judges = tables.n_parameters(FeatureClassifiers(3, backbone.hidden_size, 32))
        assert count.trained(3, with_discriminators=True) == trained + judges
        assert count.classifier == tables.n_parameters(bank.lm_head)


def test_the_papers_saving_is_not_that_of_a_block_but_of_another_class(counts) -> None:
    assert round(counts["blip2-opt-2.7b", "full"].saving, 2) == 0.39
    claims = tables.paper_claim()
    savings = {name: round(1 - n / tables.PAPER_CLASSIFIER, 2) for name, n in claims.items()}
    assert [name for name, saving in savings.items() if saving == tables.PAPER_SAVING] == [
        "torch.nn.TransformerDecoderLayer, inner width 2048 (its default)"
    ]
    assert claims["a replica of a block"] == counts["blip2-opt-2.7b", "full"].per_exit
    width = 2560
    cross_and_self, norms = 2 * (4 * width**2 + 4 * width), 3 * 2 * width
    assert savings and claims["torch.nn.TransformerDecoderLayer, inner width 2048 (its default)"] == (
        cross_and_self + 2 * 2048 * width + 2048 + width + norms
    )


def test_full_blocks_cost_more_than_classifiers_on_some_backbones_and_two_variants_save_on_all(counts) -> None:
    assert counts["blip2-flan-t5-xxl", "full"].saving < 0
    assert counts["instructblip-vicuna-7b", "full"].saving < 0
    enough = tables.variants_that_save(list(counts.values()))
    assert set(enough) == {"lora", "bottleneck"}
    for name, least in enough.items():
        assert least == min(counts[backbone, name].saving for backbone in PUBLISHED_BACKBONES) >= 0.52


def test_published_models_have_the_sizes_they_are_known_by() -> None:
    def billions(name: str) -> float:
        model = meta_model(name)
        assert all(parameter.is_meta for parameter in model.parameters())
        return round(tables.n_parameters(model) / 1e9, 2)

    assert billions("blip2-opt-2.7b") == 3.74
    assert billions("instructblip-vicuna-7b") == 7.91
    assert billions("blip2-flan-t5-xl") == 3.94
    assert billions("smollm2-135m") == 0.13


def test_a_meta_model_may_be_shallow_and_configurations_are_ones_own(counts) -> None:
    for name in PUBLISHED_BACKBONES:
        config = published_config(name)
        config.hidden_size = 1
        assert published_config(name).to_dict() != config.to_dict()
        shallow, deeper = (meta_language_model(name, n_blocks=n) for n in (1, 2))
        assert next(shallow.parameters()).is_meta
        assert n_language_blocks(name) > 1
        assert tables.n_parameters(deeper) - tables.n_parameters(shallow) >= counts[name, "full"].block
    with pytest.raises(UserError, match=r"did you mean 'blip2-opt-2\.7b'"):
        published_config("blip2-opt-2.7")


def test_counting_leaves_no_weights_behind() -> None:
    block = tables._decoder("blip2-opt-2.7b").blocks[1]
    assert isinstance(block, nn.Module) and all(
        parameter.device == torch.device("meta") for parameter in block.parameters()
    )


def test_the_launcher_prints_the_table_as_json_and_as_text(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", "params", "--json", "--rank", "8"])
    plan.main()
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == set(PUBLISHED_BACKBONES)
    for variants in printed.values():
        assert set(variants) == set(EXIT_VARIANTS)
        assert all(set(numbers) == {"per_exit", "saving_vs_classifiers"} for numbers in variants.values())
    assert printed["blip2-opt-2.7b"]["lora"]["per_exit"] == 8 * 18 * 2560

    monkeypatch.setattr(sys, "argv", ["plan.py", "params", "--backbone", "blip2-flan-t5-xxl", "--exits", "2", "7"])
    plan.main()
    text = capsys.readouterr().out
    assert "-97.6%" in text and "520.1 + 2.1" in text and "1820.4 + 7.3" in text
    assert "saving 52% or more on every backbone above: lora" in text
    assert "63.0M saves  51.6%" in text
