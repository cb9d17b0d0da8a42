"""Rows of a batch are independent: lengths, padding and neighbours never change what a row says."""

from __future__ import annotations

import pytest
import torch

from free_dist.decoding import Decision, generate

N_TOKENS = 12


class EmitByContent:
    """Emits by a rule of the row's own logits, so a row decides the same alone and in a batch, at every depth."""

    def is_active(self, exit_index: int) -> bool:
        return True

    def is_active_at(self, exit_index: int, position: int) -> bool:
        return (exit_index + position) % 3 != 0

    def decide(self, exit_index, scores, positions, earlier) -> Decision:
        tokens = scores.logits.argmax(-1)
        emit = [(token + position) % 3 != 0 for token, position in zip(tokens.tolist(), positions, strict=True)]
        return Decision(tokens, [0.5] * len(emit), emit)


def batch_of(cases):
    return torch.cat([pixels for pixels, _ in cases]).double(), [prompt[0].tolist() for _, prompt in cases]


def everything(result):
    """A result with confidences and shared calls left out: tokens, exits, and the work of the row."""
    return [(record.token, record.exit_layer, record.block_positions) for record in result.records]


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1), (2, 2, 0)])
def test_a_batch_of_mixed_lengths_equals_its_rows_one_by_one(in_float64, cases, order, lossless: bool) -> None:
    backbone, bank = in_float64
    chosen = [cases[i] for i in order]
    pixels, prompts = batch_of(chosen)
    settings = {"thresholds": EmitByContent(), "max_new_tokens": N_TOKENS, "lossless": lossless}

    def one_by_one(eos: int):
        return [
            generate(backbone, bank, pixels[i : i + 1], prompts[i], eos_token_id=eos, **settings)[0]
            for i in range(len(order))
        ]

    # A token that some rows produce early, so that rows finish at different times.
    eos = one_by_one(-1)[0].tokens[4]
    alone = one_by_one(eos)
    together = generate(backbone, bank, pixels, prompts, eos_token_id=eos, **settings)
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    if not lossless:
        assert [everything(row) for row in together] == [everything(row) for row in alone]
        assert len({layer for row in together for layer in row.exit_layers}) > 2
    assert len(set(map(len, (row.tokens for row in alone)))) > 1 or len(set(order)) < 3


def test_full_depth_batch_of_mixed_lengths_equals_hugging_face_with_padding_on_the_left(backbone, cases) -> None:
    pixels, prompts = batch_of(cases)
    longest = max(map(len, prompts))
    padded = torch.tensor([[1] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    wanted = backbone.model.generate(
        pixel_values=pixels.float(),
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=N_TOKENS,
        do_sample=False,
        num_beams=1,
    )[:, longest:]
    ours = generate(backbone, None, pixels.float(), prompts, max_new_tokens=N_TOKENS)
    for row, theirs in zip(ours, wanted.tolist(), strict=True):
        assert row.tokens == theirs[: len(row.tokens)]


def test_rows_that_exit_do_not_pay_for_rows_that_go_deep(backbone, bank, cases, weight_watch) -> None:
    pixels, prompts = batch_of(cases)

    class FirstRowsPromptGoesDeep(EmitByContent):
        def is_active_at(self, exit_index: int, position: int) -> bool:
            return position > 0

        def decide(self, exit_index, scores, positions, earlier) -> Decision:
            return Decision(scores.logits.argmax(-1), [0.9] * len(positions), [True] * len(positions))

    with weight_watch:
        result = generate(
            backbone,
            bank,
            pixels.float(),
            prompts,
            thresholds=FirstRowsPromptGoesDeep(),
            max_new_tokens=5,
            eos_token_id=-1,
        )
    # All prompts run deep in one call; afterwards nothing does.
    assert [row.blocks_executed for row in result] == [[backbone.n_blocks, 1, 1, 1, 1]] * len(prompts)
    assert weight_watch.reads[id(backbone.block(backbone.n_blocks).fc1.weight)] == 1
    assert result.calls.block_calls == backbone.n_blocks + 4


def test_finished_rows_leave_the_caches(backbone, bank, cases) -> None:
    pixels, prompts = batch_of(cases)
    full = generate(backbone, None, pixels.float(), prompts, max_new_tokens=N_TOKENS, eos_token_id=-1)
    eos = full[0].tokens[2]
    early = generate(backbone, None, pixels.float(), prompts, max_new_tokens=N_TOKENS, eos_token_id=eos)
    wanted = [row.tokens[: row.tokens.index(eos) + 1] if eos in row.tokens else row.tokens for row in full]
    assert [row.tokens for row in early] == wanted
    assert sum(sum(record.block_positions for record in row.records) for row in early) == early.calls.block_positions
    assert early.sequences.shape == (len(prompts), max(map(len, wanted)))
