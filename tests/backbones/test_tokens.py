"""Tokens of every backbone against transformers' ``generate``: greedy, beams, batches, exits that draft."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hugging_face import generated, generated_with_logits, load_reference

from free_dist.backbones import Blip2Backbone, Instruction
from free_dist.data.pretrained import load_pretrained
from free_dist.decoding import generate
from free_dist.exits import ExitBank

NEW_TOKENS = 12


def request(checkpoint, samples, dtype=torch.float32) -> dict:
    """The arguments of ``generate`` for samples of any tasks."""
    encoder = checkpoint.encoder
    return {
        "pixel_values": torch.stack([encoder.encode_image(sample.image) for sample in samples]).to(dtype),
        "prompt_ids": [encoder.encode_prompt(sample.turns) for sample in samples],
        "instruction": encoder.encode_instructions([sample.turns for sample in samples]),
    }


def mixed(checkpoint) -> list:
    """Prompts of very different lengths, two of them about one image."""
    return [*checkpoint.samples("vqa", 2), *checkpoint.samples("caption", 2)[1:], *checkpoint.samples("dialogue", 1)]


@pytest.fixture(scope="module")
def known() -> dict[str, list[list[int]]]:
    """What :func:`wanted` has computed so far."""
    return {}


@pytest.fixture
def wanted(checkpoint, known) -> list[list[int]]:
    """transformers' greedy tokens for ``mixed``, never ending."""
    if checkpoint.name not in known:
        model, settings = load_reference(checkpoint), {"max_new_tokens": NEW_TOKENS, "eos_token_id": -1}
        known[checkpoint.name] = [generated(checkpoint, model, sample, **settings) for sample in mixed(checkpoint)]
    return known[checkpoint.name]


def test_greedy_tokens_of_a_batch_equal_hugging_face_one_by_one(checkpoint, wanted) -> None:
    found = generate(
        checkpoint.backbone, None, **request(checkpoint, mixed(checkpoint)), max_new_tokens=NEW_TOKENS, eos_token_id=-1
    )
    assert [row.tokens for row in found] == wanted
    assert len({token for tokens in wanted for token in tokens}) > 4, "a model that repeats itself compares nothing"
    assert len({tuple(tokens) for tokens in wanted}) > 1, "an answer must depend on image or prompt"


def test_lossless_tokens_of_untrained_exits_equal_hugging_face(checkpoint, wanted) -> None:
    bank = ExitBank(checkpoint.backbone, (1, 3)).eval()
    found = generate(
        checkpoint.backbone,
        bank,
        **request(checkpoint, mixed(checkpoint)),
        thresholds=0.0,
        lossless=True,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=-1,
    )
    assert [row.tokens for row in found] == wanted
    assert sum(row.drafted for row in found) > 0


def test_greedy_tokens_end_where_hugging_face_ends(checkpoint, wanted) -> None:
    ends = [tokens[3] for tokens in wanted]  # a random model rarely says the real one
    model = load_reference(checkpoint)
    for end, sample in [*zip(ends, mixed(checkpoint), strict=True)][::3]:
        theirs = generated(checkpoint, model, sample, max_new_tokens=NEW_TOKENS, eos_token_id=end)
        (ours,) = generate(
            checkpoint.backbone, None, **request(checkpoint, [sample]), max_new_tokens=NEW_TOKENS, eos_token_id=end
        )
        assert ours.tokens == theirs
        assert len(theirs) < NEW_TOKENS


def test_beam_tokens_equal_hugging_face(checkpoint, wanted) -> None:
    model = load_reference(checkpoint)
    samples = [mixed(checkpoint)[row] for row in (0, 3)]
    lengths: set[int] = set()
    # Ends that come up among the likely tokens, so that finished hypotheses compete with growing ones; until some do finish, for
    # the tiny tokenizers, and with them the tokens, differ from one session to the next.
    for end, _ in Counter(token for tokens in wanted for token in tokens).most_common():
        for early_stopping, length_penalty in ((True, 1.0), (False, -1.0), ("never", 1.5)):
            settings = {"early_stopping": early_stopping, "length_penalty": length_penalty, "num_beams": 5}
            settings |= {"eos_token_id": end, "max_new_tokens": 8}
            theirs = [generated(checkpoint, model, sample, **settings) for sample in samples]
            found = generate(checkpoint.backbone, None, **request(checkpoint, samples), **settings)
            assert [row.tokens for row in found] == theirs
            lengths |= {len(tokens) for tokens in theirs}
        if len(lengths) > 1:
            break
    assert len(lengths) > 1, "no hypothesis ended"


@torch.no_grad()
def test_bfloat16_tokens_are_the_most_likely_ones_of_hugging_face_up_to_rounding(checkpoint) -> None:
    model = load_reference(checkpoint, torch.bfloat16)
    backbone, _ = load_pretrained(str(checkpoint.directory), dtype=torch.bfloat16)
    samples = mixed(checkpoint)
    asked = request(checkpoint, samples, torch.bfloat16)
    found = generate(backbone, None, **asked, max_new_tokens=NEW_TOKENS, eos_token_id=-1)
    same = 0
    for row, sample in zip(found, samples, strict=True):
        theirs, rounded = generated_with_logits(checkpoint, model, sample, max_new_tokens=NEW_TOKENS, eos_token_id=-1)
        first = next(
            (n for n, pair in enumerate(zip(row.tokens, theirs, strict=True)) if len(set(pair)) > 1), NEW_TOKENS
        )
        same += first
        # As far as the texts go together, ours strays from float32 no further than transformers does, but for luck, ...
        answer = theirs[: min(first, NEW_TOKENS - 1)]
        exact = logits_of(checkpoint.backbone, checkpoint, sample, answer)
        noise = (rounded[: len(exact)] - exact).abs().max()
        assert (logits_of(backbone, checkpoint, sample, answer) - exact).abs().max() < 2.5 * noise
        # ... and they part where rounding moves the logits of transformers further than the two tokens lie apart.
        if first < NEW_TOKENS:
            gap = exact[first, theirs[first]] - exact[first, row.tokens[first]]
            assert gap.abs() < 2 * noise, (row.tokens, theirs)
    assert same > NEW_TOKENS * len(samples) / 3


@torch.no_grad()
def logits_of(backbone: Blip2Backbone, checkpoint, sample, answer: list[int]) -> torch.Tensor:
    """Logits before each token of an answer and after its last, float32 [N + 1, V]."""
    told = checkpoint.encoder.encode_instructions([sample.turns])
    ids, start = checkpoint.encoder.encode_prompt(sample.turns), backbone.layout.decoder_start_token_id
    read = {"input_ids": torch.tensor([[*ids, *answer]])}
    if start is not None:
        read = {"input_ids": torch.tensor([ids]), "decoder_ids": torch.tensor([[start, *answer]])}
    pixels = checkpoint.encoder.encode_image(sample.image)[None].to(next(backbone.parameters()).dtype)
    feature = backbone(pixels, torch.tensor([0]), exit_layers=(), instruction=told, **read).final[0]
    return backbone.lm_head(feature[-len(answer) - 1 :]).float()


@pytest.mark.parametrize("checkpoint", ["instructblip-vicuna", "instructblip-flan-t5"], indirect=True)
@torch.no_grad()
def test_padding_of_instructions_and_rows_that_share_an_image_change_no_row(checkpoint) -> None:
    backbone, samples = checkpoint.backbone, [*checkpoint.samples("dialogue", 1), *checkpoint.samples("vqa", 3)]
    asked = request(checkpoint, samples)
    instruction = asked["instruction"]
    lengths = instruction.mask.sum(1).tolist()
    assert min(lengths) < max(lengths)
    together = backbone.encode_prefix(asked["pixel_values"], None, instruction)
    for row, length in enumerate(lengths):
        own = Instruction(instruction.input_ids[row : row + 1, :length], instruction.mask[row : row + 1, :length])
        alone = backbone.encode_prefix(asked["pixel_values"][row : row + 1], None, own)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    first = samples[1].image
    index = torch.tensor([int(sample.image == first) for sample in samples])
    assert samples[0].image == first == samples[2].image
    shared = backbone.encode_prefix(asked["pixel_values"][:1], torch.zeros(4, dtype=torch.long), instruction)
    torch.testing.assert_close(shared[index == 1], together[index == 1], rtol=1e-5, atol=1e-5)
    assert (shared[1] - shared[2]).abs().max() > 1e-2, "two questions about one image must be seen differently"
