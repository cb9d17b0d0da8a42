"""Kinds of exit transformers: what each computes, what of it is trained, and what it leaves to the backbone."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

from free_dist.backbones import BackboneFeatures
from free_dist.backbones.replica import replica
from free_dist.config import EXIT_VARIANTS, ConfigError, ExitsConfig
from free_dist.exits import ExitBank, ExitVariant
from free_dist.exits.variants import BottleneckExit, LowRankLinear
from free_dist.losses import cross_entropy_loss, distillation_loss

LAYERS = (1, 2)
SMALL = {name: ExitVariant(name=name, rank=3, bottleneck_size=5) for name in EXIT_VARIANTS}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def features(case, row: int = 1) -> BackboneFeatures:
    """A training forward of one prompt and its answer."""
    backbone, prompt, answer = case.backbone, case.prompts[row], list(case.answer)
    ids, decoder_ids = ([prompt], torch.tensor([[0, *answer]])) if case.is_t5 else ([[*prompt, *answer]], None)
    pixels = case.pixels[row : row + 1]
    with torch.no_grad():
        return backbone(pixels, torch.tensor([0]), torch.tensor(ids), LAYERS, decoder_ids=decoder_ids)


def exit_features(bank: ExitBank, found: BackboneFeatures) -> Tensor:
    return bank(found.exits, memory=found.memory, span=found.span)


def exit_logits(bank: ExitBank, found: BackboneFeatures) -> Tensor:
    return bank.exit_logits(exit_features(bank, found))


@torch.no_grad()
def disturbed(bank: ExitBank, seed: int = 5) -> ExitBank:
    """The bank with every trained weight moved, so that no update is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.transformers.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return bank


@pytest.mark.parametrize("init", ["same", "next", "last"])
def test_lora_starts_as_the_block_it_updates(case, init: str) -> None:
    found = features(case)
    full, lora = (ExitBank(case.backbone, LAYERS, variant=SMALL[name], init=init) for name in ("full", "lora"))
    assert torch.equal(exit_features(lora, found), exit_features(full, found))


@torch.no_grad()
def test_lora_is_a_block_with_the_product_added_to_every_matrix_merged_or_not(case) -> None:
    found = features(case)
    lora = disturbed(ExitBank(case.backbone, LAYERS, variant=SMALL["lora"]))
    wanted = ExitBank(case.backbone, LAYERS)
    n_maps = 0
    for block, updated in zip(wanted.transformers, lora.transformers, strict=True):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                update = updated.get_submodule(name)
                module.weight += update.up @ update.down
                n_maps += 1
    assert (
        n_maps
        == len(LAYERS)
        * {"opt": 6, "llama": 7, "flan-t5": 11, "t5": 10}[case.kind.replace("-grouped", "").replace("-yarn", "")]
    )
    assert not torch.allclose(exit_features(wanted, found), exit_features(ExitBank(case.backbone, LAYERS), found))
    for bank in (lora, lora.merged()):
        torch.testing.assert_close(exit_features(bank, found), exit_features(wanted, found), **EXACT)


@pytest.mark.parametrize("name", EXIT_VARIANTS)
def test_training_reaches_every_weight_of_the_variant_and_no_other(case, name: str) -> None:
    found = features(case)
    bank = disturbed(ExitBank(case.backbone, LAYERS, variant=SMALL[name]))
    taps = [tap.clone().requires_grad_() for tap in found.exits]
    exit_logits(bank, dataclasses.replace(found, exits=tuple(taps))).square().sum().backward()
    trained = {weight for weight, parameter in bank.named_parameters() if parameter.requires_grad}
    assert trained == set(bank.trainable_state_dict())
    for weight, parameter in bank.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == (weight in trained), weight
    assert all(bool(tap.grad.abs().sum() > 0) for tap in taps)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in case.backbone.parameters())


def test_a_lora_exit_holds_the_backbones_own_weights_and_leaves_its_modules_alone(case) -> None:
    before = [type(module) for module in case.backbone.modules()]
    bank = ExitBank(case.backbone, LAYERS, variant=SMALL["lora"], init="next")
    assert [type(module) for module in case.backbone.modules()] == before
    for k, exit_transformer in zip(LAYERS, bank.transformers, strict=True):
        own = {id(parameter) for parameter in case.backbone.block(k + 1).parameters()}
        held = {id(parameter) for parameter in exit_transformer.parameters() if not parameter.requires_grad}
        assert held == own


def test_copied_frozen_weights_are_not_the_backbones_and_one_block_is_copied_once(case) -> None:
    bank = ExitBank(case.backbone, LAYERS, variant=SMALL["lora"], init="last", copy_frozen=True)
    backbones = {id(parameter) for parameter in case.backbone.parameters()}
    assert not any(id(parameter) in backbones for parameter in bank.parameters())
    frozen = [
        {id(parameter) for parameter in exit_transformer.parameters() if not parameter.requires_grad}
        for exit_transformer in bank.transformers
    ]
    assert frozen[0] == frozen[1]
    found = features(case)
    shared = ExitBank(case.backbone, LAYERS, variant=SMALL["lora"], init="last")
    assert torch.equal(exit_features(bank, found), exit_features(shared, found))


@torch.no_grad()
def test_a_merged_bank_owns_its_blocks_and_the_other_variants_need_no_merging(case) -> None:
    lora = disturbed(ExitBank(case.backbone, LAYERS, variant=SMALL["lora"]))
    merged = lora.merged()
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert not any(isinstance(module, LowRankLinear) for module in merged.modules())
    shared = {id(parameter) for parameter in lora.transformers.parameters()}
    assert not any(id(parameter) in shared for parameter in merged.transformers.parameters())
    assert (merged.final_norm, merged.lm_head) == (lora.final_norm, lora.lm_head)
    assert merged.variant.name == "full" and lora.variant.name == "lora"
    assert set(merged.trainable_state_dict()) == set(ExitBank(case.backbone, LAYERS).trainable_state_dict())
    for name in ("full", "bottleneck", "classifier"):
        bank = ExitBank(case.backbone, LAYERS, variant=SMALL[name])
        assert bank.merged() is bank


@torch.no_grad()
def test_a_merged_matrix_is_the_rounded_sum_in_half_precision() -> None:
    torch.manual_seed(0)
    frozen = nn.Linear(40, 30).bfloat16()
    update = LowRankLinear(frozen, 4)
    update.up.normal_()
    exact = frozen.weight.double() + update.up.double() @ update.down.double()
    error = (update.merged().weight.double() - exact).abs()
    assert update.merged().weight.dtype == torch.bfloat16
    assert bool((error <= exact.abs() * 2**-8 * 1.001).all())  # half the distance between neighbours
    assert torch.equal(update.merged().bias, frozen.bias)


@pytest.mark.parametrize("init", ["same", "next", "last"])
def test_a_replica_of_t5s_first_block_leaves_the_position_bias_of_all_blocks_behind(make_case, init: str) -> None:
    backbone = make_case("flan-t5").backbone
    assert any("relative_attention_bias" in name for name, _ in backbone.block(1).named_parameters())
    for name in ("full", "lora"):
        bank = ExitBank(backbone, LAYERS, variant=SMALL[name], init=init)
        assert not any("relative_attention_bias" in weight for weight, _ in bank.named_parameters())
    assert {"relative_attention_bias"} == {
        name.split(".")[-2]
        for name in {name for name, _ in backbone.block(1).named_parameters()}
        - {name for name, _ in replica(backbone.block(1)).named_parameters()}
    }


@torch.no_grad()
def test_a_bottleneck_is_its_formula_at_every_position_alone_and_starts_near_the_identity(case) -> None:
    found = features(case)
    hidden = found.exits[0]
    fresh = ExitBank(case.backbone, LAYERS, variant=SMALL["bottleneck"]).transformers[0]
    assert 0 < (fresh(hidden) - hidden).norm() < 0.02 * hidden.norm()
    exit_transformer = disturbed(ExitBank(case.backbone, LAYERS, variant=SMALL["bottleneck"])).transformers[0]
    assert isinstance(exit_transformer, BottleneckExit)
    ours = exit_transformer(hidden)
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * exit_transformer.norm.weight + exit_transformer.norm.bias
    inner = normed @ exit_transformer.down.weight.T + exit_transformer.down.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    wanted = hidden + inner @ exit_transformer.up.weight.T + exit_transformer.up.bias
    torch.testing.assert_close(ours, wanted, **EXACT)
    torch.testing.assert_close(exit_transformer(hidden, last_only=True), wanted[:, -1:], **EXACT)


def test_a_bottleneck_takes_a_residual_stream_wider_than_its_weights(make_case) -> None:
    bank = ExitBank(make_case("t5", torch.bfloat16).backbone, LAYERS, variant="bottleneck")
    hidden = torch.randn(1, 3, 32)
    assert bank.transformers[0](hidden).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("name", EXIT_VARIANTS)
def test_trained_weights_alone_make_another_bank_of_the_kind_the_same(case, name: str) -> None:
    found = features(case)
    bank = disturbed(ExitBank(case.backbone, LAYERS, variant=SMALL[name], init="same"))
    weights = copy.deepcopy(bank.trainable_state_dict())
    described = json.loads(json.dumps(dataclasses.asdict(bank.variant)))
    other = ExitBank(case.backbone, bank.exit_layers, variant=ExitVariant(**described), init=bank.init)
    assert not torch.equal(exit_logits(other, found), exit_logits(bank, found))
    other.load_trainable_state_dict(weights)
    assert torch.equal(exit_logits(other, found), exit_logits(bank, found))
    assert other.variant == bank.variant
    weights.pop(next(iter(weights)))
    with pytest.raises(ValueError, match="not the weights of these exits"):
        other.load_trainable_state_dict(weights)


def test_a_lora_export_is_small_and_a_bottlenecks_size_is_written_out(case) -> None:
    sizes = {
        name: sum(
            tensor.numel()
            for tensor in ExitBank(case.backbone, LAYERS, variant=SMALL[name]).trainable_state_dict().values()
        )
        for name in EXIT_VARIANTS
    }
    assert sizes["lora"] < sizes["full"] / 2
    assert sizes["bottleneck"] == len(LAYERS) * (2 * 32 + 32 * 5 + 5 + 5 * 32 + 32)
    assert ExitBank(case.backbone, LAYERS, variant="bottleneck").variant.bottleneck_size == 32 // 4


@torch.no_grad()
def test_a_classifier_starts_as_the_logit_lens_and_reads_the_hidden_state_with_its_own_matrix(case) -> None:
    backbone, found = case.backbone, features(case)
    lens = ExitBank(backbone, LAYERS, variant="lens")
    assert torch.equal(exit_features(lens, found), backbone.final_norm(torch.stack(list(found.exits))))
    assert not list(lens.transformers.parameters()) and not lens.trainable_state_dict()
    classifiers = ExitBank(backbone, LAYERS, variant="classifier")
    assert torch.equal(exit_features(classifiers, found), exit_features(lens, found))
    torch.testing.assert_close(exit_logits(classifiers, found), exit_logits(lens, found), **EXACT)
    before = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    moved = disturbed(classifiers)
    assert all(torch.equal(parameter, before[name]) for name, parameter in backbone.named_parameters())
    states = backbone.final_norm(torch.stack(list(found.exits)))
    for k, (exit_transformer, state) in enumerate(zip(moved.transformers, states, strict=True)):
        (weight,) = exit_transformer.parameters()
        torch.testing.assert_close(exit_logits(moved, found)[k], state @ weight.T, **case.tolerance)
        torch.testing.assert_close(moved.logits_of(k, state), exit_logits(moved, found)[k], **EXACT)
    assert torch.equal(moved.logits(found.final), backbone.lm_head(found.final)), "the full model keeps its head"


@pytest.mark.parametrize("parts", [None, 4])
def test_a_classifiers_loss_reaches_its_own_head_alone_however_many_parts_it_is_read_in(case, parts) -> None:
    found = features(case)
    targets = torch.arange(found.final.shape[1]) % 7
    gradients = []
    for loss in (cross_entropy_loss, distillation_loss):
        for k in range(len(LAYERS)):
            bank = ExitBank(case.backbone, LAYERS, variant="classifier")
            inputs = exit_features(bank, found).flatten(1, 2)
            assert not inputs.requires_grad
            # Where something before the features is trained too, as it may be one day, heads must not lose their part.
            inputs.requires_grad_(parts is not None)
            other = targets if loss is cross_entropy_loss else found.final[0]
            loss(bank, inputs, other, parts=parts)[k].backward()
            reached = [parameter.grad for parameter in bank.transformers.parameters()]
            assert [gradient is not None and bool(gradient.abs().sum() > 0) for gradient in reached] == [
                i == k for i in range(len(LAYERS))
            ]
            weight = next(bank.transformers[k].parameters())
            with torch.no_grad():
                states = inputs[k].detach()
                p = torch.softmax((states @ weight.T).float(), -1).double()
                if loss is cross_entropy_loss:
                    wanted = torch.nn.functional.one_hot(targets, p.shape[-1]).double()
                else:
                    wanted = torch.softmax(case.backbone.lm_head(found.final[0]).float(), -1).double()
                # The gradient of cross entropy, and of KL to a fixed teacher, in a linear map: (p - wanted)^T x / N.
                expected = (p - wanted).T @ states.double() / len(states)
            torch.testing.assert_close(reached[k].double(), expected, rtol=1e-4, atol=1e-6)
            gradients.append(reached[k])
    assert len(gradients) == 2 * len(LAYERS)


def test_sizes_and_names_that_cannot_be_are_refused_by_field(make_case) -> None:
    backbone = make_case("opt").backbone
    with pytest.raises(ConfigError, match=r"exits\.rank=33: want 1 to 32"):
        ExitBank(backbone, LAYERS, variant=ExitVariant(name="lora", rank=33))
    with pytest.raises(ConfigError, match=r"exits\.variant='lorra'.*full, lora, bottleneck, classifier"):
        ExitVariant(name="lorra")
    config = ExitsConfig(variant="bottleneck", rank=2, bottleneck_size=7)
    assert ExitVariant.from_config(config) == ExitVariant(name="bottleneck", rank=2, bottleneck_size=7)
