"""Every decoder type against transformers' own forward and generate, on small random BLIP-2 models."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from free_dist.backbones import BackboneFeatures, Blip2Backbone, llama_block, t5_block
from free_dist.config import UserError
from free_dist.decoding import generate
from free_dist.exits import ExitBank

CPU = torch.device("cpu")


@torch.no_grad()
def test_features_after_every_block_and_logits_equal_hugging_face(case) -> None:
    states, logits = case.reference(0)
    hidden, memory = case.inputs(0)
    backbone = case.backbone
    torch.testing.assert_close(hidden, states[0], **case.tolerance)
    span, held = backbone.new_span(0, hidden.shape[1], CPU), case.caches(1, memory)
    earlier = hidden
    for k in range(1, backbone.n_blocks + 1):
        hidden = backbone.run_blocks(hidden, k - 1, k, held, span)
        assert (hidden - earlier).abs().max() > 1e-2, "blocks must make a difference that the tolerance sees"
        earlier = hidden
        if k < backbone.n_blocks:
            torch.testing.assert_close(hidden, states[k], **case.tolerance)
    torch.testing.assert_close(backbone.lm_head(backbone.final_norm(hidden)), logits, **case.tolerance)


def test_training_forward_equals_hugging_face_and_gradients_reach_every_weight_of_an_exit(case) -> None:
    states, logits = case.reference(1)
    with torch.no_grad():
        features = training_forward(case)
    for k, ours in enumerate(features.exits, start=1):
        torch.testing.assert_close(ours, states[k], **case.tolerance)
    torch.testing.assert_close(case.backbone.lm_head(features.final), logits, **case.tolerance)
    bank = ExitBank(case.backbone, (1, 2))
    bank(features.exits, memory=features.memory, span=features.span).square().sum().backward()
    for name, parameter in bank.transformers.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def training_forward(case) -> BackboneFeatures:
    """Exits after blocks 1 and 2, on the second prompt and its answer."""
    prompt, answer = case.prompts[1], [*case.answer]
    ids = {"input_ids": torch.tensor([[*prompt, *answer]])}
    if case.is_t5:
        ids = {"input_ids": torch.tensor([prompt]), "decoder_ids": torch.tensor([[0, *answer]])}
    return case.backbone(case.pixels[1:2], torch.tensor([0]), exit_layers=(1, 2), **ids)


def test_exits_can_be_trained_after_the_backbone_has_decoded(case) -> None:
    generate(case.backbone, None, case.pixels, case.prompts, max_new_tokens=2)  # in inference mode
    with torch.no_grad():
        features = training_forward(case)
    ExitBank(case.backbone, (1, 2))(features.exits, memory=features.memory, span=features.span).sum().backward()


def test_greedy_tokens_equal_hugging_face_generate(case) -> None:
    model, wanted = case.backbone.model, []
    for row, prompt in enumerate(case.prompts):
        tokens = model.generate(
            pixel_values=case.pixels[row : row + 1],
            input_ids=torch.tensor([prompt]),
            max_new_tokens=20,
            eos_token_id=-1,
            do_sample=False,
            use_cache=False,  # its cache is sized by the encoder, which is shallower here
        )
        wanted.append(tokens[0].tolist()[-20:])
        assert case.greedy(row, 20) == wanted[-1]
    assert len({token for tokens in wanted for token in tokens}) > 5, "a model that repeats itself compares nothing"
    ours = generate(case.backbone, None, case.pixels, case.prompts, max_new_tokens=20, eos_token_id=-1)
    assert [row.tokens for row in ours] == wanted


def test_lossless_batches_give_the_tokens_of_full_depth_with_exits_that_disagree(case) -> None:
    bank = ExitBank(case.backbone, (1, 2)).eval()
    ours = generate(
        case.backbone,
        bank,
        case.pixels,
        case.prompts,
        thresholds=0.0,
        max_new_tokens=16,
        eos_token_id=-1,
        lossless=True,
    )
    assert [row.tokens for row in ours] == [case.greedy(row, 16) for row in range(3)]
    assert sum(row.drafted for row in ours) > sum(row.accepted for row in ours) > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "llama-grouped", "flan-t5", "t5"])
def test_bfloat16_features_equal_hugging_face(make_case, kind: str) -> None:
    case = make_case(kind, torch.float32)
    for parameter in case.backbone.model.parameters():  # as from_pretrained does it: buffers keep their precision
        parameter.data = parameter.data.bfloat16()
    states, _ = case.reference(1)
    ours = states[0]
    span = case.backbone.new_span(0, ours.shape[1], CPU)
    _, memory = dataclasses.replace(case, pixels=case.pixels.bfloat16()).inputs(1)
    ours = case.backbone.run_blocks(ours, 0, 2, case.caches(1, memory), span)
    assert ours.dtype == torch.bfloat16
    assert (ours - states[2]).float().abs().max() < 0.02 * states[2].float().abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_norms_equal_hugging_face_bit_by_bit_in_half_precision(make_case, kind: str) -> None:
    language_model = make_case(kind).backbone.model.language_model.bfloat16()
    norm = language_model.decoder.final_layer_norm if kind == "t5" else language_model.model.norm
    lean = t5_block.rms_norm if kind == "t5" else llama_block.rms_norm
    hidden = torch.randn(50, 32).bfloat16()
    assert torch.equal(lean(norm, hidden), norm(hidden))


def test_exits_register_the_weights_of_their_blocks_alone_and_the_backbone_those_of_its_model(case) -> None:
    bank = ExitBank(case.backbone, (1, 2), init="next")
    block = {name for name, _ in case.backbone.block(2).named_parameters()}
    assert {name for name, _ in bank.transformers[0].named_parameters()} == {f"block.{name}" for name in block}
    assert not list(bank.transformers.buffers())
    assert set(case.backbone.state_dict()) == {f"model.{name}" for name in case.backbone.model.state_dict()}


@torch.no_grad()
def test_a_deep_copy_follows_its_own_weights(case) -> None:
    other, bank = copy.deepcopy((case, ExitBank(case.backbone, (1,))))
    before = case.greedy(0, 6)
    assert other.greedy(0, 6) == before
    for parameter in other.backbone.model.language_model.parameters():
        parameter.copy_(torch.roll(parameter, 1, 0))
    assert other.greedy(0, 6) != before
    assert case.greedy(0, 6) == before
    assert (bank.final_norm, bank.lm_head) == other.backbone.shared_modules()


@torch.no_grad()
def test_an_exit_with_a_block_s_weights_gives_the_block_s_output_and_the_head_is_one_matrix(case) -> None:
    hidden, memory = case.inputs(0)
    backbone = case.backbone
    span = backbone.new_span(0, hidden.shape[1], CPU)
    bank = copy.deepcopy(ExitBank(backbone, (1,), init="next"))
    ours = bank.transformers[0](hidden, backbone.new_layer_cache(1, 40, memory), span)
    block = backbone.block_call(backbone.block(2), hidden, backbone.new_layer_cache(1, 40, memory), span)
    assert torch.equal(ours, block)
    assert torch.equal(bank.final_norm(ours), backbone.final_norm(block))
    assert isinstance(bank.lm_head, nn.Linear)


@pytest.mark.parametrize("kind", ["llama-grouped", "flan-t5", "t5"])
def test_a_checkpoint_loads_as_it_was_saved_with_a_head_of_its_own_or_a_tied_one(
    make_case, tmp_path, kind: str
) -> None:
    case = make_case(kind, torch.float32)
    case.backbone.model.save_pretrained(tmp_path)
    loaded = dataclasses.replace(case, backbone=Blip2Backbone.from_pretrained(tmp_path))
    for row in range(3):
        assert loaded.greedy(row, 12) == case.greedy(row, 12)
    embedding = loaded.backbone.model.get_input_embeddings()
    assert (loaded.backbone.shared_modules()[1].weight is embedding.weight) == (kind == "t5")
    features = torch.randn(4, 32)
    states = [backbone.lm_head(backbone.final_norm(features)) for backbone in (loaded.backbone, case.backbone)]
    torch.testing.assert_close(*states)


@torch.no_grad()
def test_casting_a_llama_does_not_round_its_angles(make_case) -> None:
    kept, cast = make_case("llama-grouped").backbone, make_case("llama-grouped").backbone
    cast.model.bfloat16()
    assert cast.model.language_model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    wanted, ours = (backbone.new_span(40, 20, CPU).shared.cos for backbone in (kept, cast))
    assert torch.equal(ours, wanted.bfloat16())


def test_ids_that_do_not_fit_the_kind_of_model_and_t5_in_float16_are_refused_clearly(make_case) -> None:
    for kind, more in (("flan-t5", {}), ("opt", {"decoder_ids": torch.tensor([[0]])})):
        case = make_case(kind)
        with pytest.raises(ValueError, match="decoder_ids"):
            case.backbone(case.pixels[:1], torch.tensor([0]), torch.tensor([case.prompts[0]]), (1,), **more)
    with pytest.raises(UserError, match="overflows in float16"):
        make_case("flan-t5", torch.float16)


def test_language_models_that_cannot_run_are_refused_clearly(make_case) -> None:
    model = make_case("llama").backbone.model
    model.config.text_config.rope_parameters["rope_type"] = "longrope"
    with pytest.raises(UserError, match="longrope"):
        Blip2Backbone(model)
    for kind in ("opt", "llama"):
        model = make_case(kind).backbone.model
        model.language_model.config._attn_implementation = "eager"
        with pytest.raises(UserError, match="sdpa"):
            Blip2Backbone(model)
    model = make_case("llama").backbone.model
    model.config.text_config.eos_token_id = [2, 3]
    with pytest.raises(UserError, match=r"eos_token_id=\[2, 3\]"):
        Blip2Backbone(model)
    model.language_model = nn.Linear(2, 2)
    model.language_model.config = model.config.vision_config
    with pytest.raises(UserError, match="want pre-norm OPT, LLaMA"):
        Blip2Backbone(model)
