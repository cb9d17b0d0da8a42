"""The tokens that come out, against transformers' own greedy generation."""

from __future__ import annotations

import copy

import pytest
import torch

from free_dist.config import UserError
from free_dist.decoding import generate
from free_dist.exits import ExitBank

N_TOKENS = 14


def hugging_face_tokens(backbone, pixels, prompt, **kwargs) -> list[int]:
    output = backbone.model.generate(
        pixel_values=pixels,
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=N_TOKENS,
        do_sample=False,
        num_beams=1,
        **kwargs,
    )
    # transformers returns the prompt, image placeholders included, before what it generated.
    assert torch.equal(output[:, : prompt.shape[1]], prompt)
    return output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("with_bank", [False, True])
def test_full_depth_gives_hugging_faces_greedy_tokens(backbone, bank, cases, case: int, with_bank: bool) -> None:
    pixels, prompt = cases[case]
    used = bank if with_bank else None
    result = generate(backbone, used, pixels, prompt, thresholds=1.1, max_new_tokens=N_TOKENS)[0]
    assert result.tokens == hugging_face_tokens(backbone, pixels, prompt)
    assert result.exit_layers == [None] * len(result.tokens)


def test_the_tokens_compared_are_not_all_the_same(backbone, cases) -> None:
    generated = [hugging_face_tokens(backbone, *case) for case in cases]
    assert len({tuple(tokens) for tokens in generated}) == len(cases)
    assert all(len(set(tokens)) > 3 for tokens in generated)


def test_generation_stops_after_the_end_of_sequence_token_as_hugging_face_does(backbone, cases) -> None:
    pixels, prompt = cases[3]
    free = generate(backbone, None, pixels, prompt, max_new_tokens=N_TOKENS, eos_token_id=-1)[0]
    eos = free.tokens[3]
    result = generate(backbone, None, pixels, prompt, max_new_tokens=N_TOKENS, eos_token_id=eos)[0]
    assert result.tokens == free.tokens[: free.tokens.index(eos) + 1]
    assert result.tokens == hugging_face_tokens(backbone, pixels, prompt, eos_token_id=eos, pad_token_id=1)


@pytest.mark.parametrize("case", range(4))
def test_exit_before_the_last_block_copied_from_it_is_the_identity_path(backbone, cases, case: int) -> None:
    pixels, prompt = cases[case]
    last = ExitBank(backbone, (backbone.n_blocks - 1,), init="next")
    full = generate(backbone, None, pixels, prompt, max_new_tokens=N_TOKENS, eos_token_id=-1)[0]
    early = generate(backbone, last, pixels, prompt, thresholds=0.0, max_new_tokens=N_TOKENS, eos_token_id=-1)[0]
    assert early.tokens == full.tokens
    assert early.blocks_executed == [backbone.n_blocks - 1] * N_TOKENS
    other = ExitBank(backbone, (backbone.n_blocks - 1,), init="same")
    assert (
        generate(backbone, other, pixels, prompt, thresholds=0.0, max_new_tokens=N_TOKENS, eos_token_id=-1)[0].tokens
        != full.tokens
    )


def test_tokens_emitted_at_full_depth_after_exits_are_those_of_a_full_forward(backbone, bank, cases, scripted) -> None:
    """A late token sees exact states of all the tokens that were emitted early."""
    pixels, prompt = cases[1]
    result = generate(backbone, bank, pixels, prompt, thresholds=scripted(11), max_new_tokens=20, eos_token_id=-1)[0]
    ids = torch.tensor([prompt[0].tolist() + result.tokens[:-1]])
    features = backbone(pixels, torch.zeros(1, dtype=torch.long), ids, ()).final
    wanted = backbone.lm_head(features)[0, prompt.shape[1] - 1 :].argmax(-1).tolist()
    late = [i for i, layer in enumerate(result.exit_layers) if layer is None]
    assert late and len(late) < 20
    assert [result.tokens[i] for i in late] == [wanted[i] for i in late]


def test_confidence_of_every_early_token_exceeds_its_threshold(backbone, bank, cases) -> None:
    pixels, prompt = cases[0]
    sharp = copy.deepcopy(bank)
    sharp.final_norm.weight.data.mul_(3.0)
    found = set()
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        result = generate(backbone, sharp, pixels, prompt, thresholds=threshold, max_new_tokens=20, eos_token_id=-1)[0]
        for layer, confidence in zip(result.exit_layers, result.confidences, strict=True):
            assert (layer is None) == (confidence is None)
            assert confidence is None or threshold < confidence <= 1.0
            found.add(layer is None)
    assert found == {True, False}


def test_list_of_ids_and_tensor_are_the_same_prompt(backbone, bank, cases) -> None:
    pixels, prompt = cases[2]
    as_list = generate(backbone, bank, pixels, prompt[0].tolist(), thresholds=0.0, max_new_tokens=5)[0]
    assert as_list == generate(backbone, bank, pixels, prompt, thresholds=0.0, max_new_tokens=5)[0]


def test_generation_fits_exactly_into_the_positions_of_the_backbone(backbone, bank, cases) -> None:
    pixels, prompt = cases[0]
    longest = backbone.max_positions - prompt.shape[1] + 1
    result = generate(backbone, bank, pixels, prompt, thresholds=0.0, max_new_tokens=longest, eos_token_id=-1)[0]
    assert len(result.tokens) == longest
    with pytest.raises(UserError, match="max_new_tokens"):
        generate(backbone, bank, pixels, prompt, thresholds=0.0, max_new_tokens=longest + 1, eos_token_id=-1)[0]


def test_wrong_calls_are_refused_with_what_to_do(backbone, bank, cases) -> None:
    pixels, prompt = cases[0]
    with pytest.raises(ValueError, match="one image per prompt"):
        generate(backbone, bank, pixels.expand(2, -1, -1, -1), prompt, thresholds=0.5, max_new_tokens=1)[0]
    with pytest.raises(ValueError, match="thresholds"):
        generate(backbone, bank, pixels, prompt, max_new_tokens=1)[0]
    with pytest.raises(UserError, match="thresholds"):
        generate(backbone, bank, pixels, prompt, thresholds=-1.0, max_new_tokens=1)[0]
    with pytest.raises(UserError, match="max_new_tokens"):
        generate(backbone, None, pixels, prompt, max_new_tokens=0)[0]
    with pytest.raises(ValueError, match=r"bank\.eval"):
        generate(backbone, copy.deepcopy(bank).train(), pixels, prompt, thresholds=0.5, max_new_tokens=1)[0]
    with pytest.raises(ValueError, match=r"\.to\(\)"):
        generate(backbone, copy.deepcopy(bank).double(), pixels, prompt, thresholds=0.5, max_new_tokens=1)[0]
