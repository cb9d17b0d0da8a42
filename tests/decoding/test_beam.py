"""Beam search against transformers' own: alone, and with exits computed for it by uncached forwards."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from free_dist.config import UserError
from free_dist.decoding import Decision, generate
from free_dist.decoding.beam import BeamOptions
from free_dist.exits.classifier import FeatureClassifiers
from free_dist.exits.gate import ExitChecks, FullHead, PrunedHead

N_TOKENS = 10
N_BEAMS = 5


def batch_of(cases, order):
    """Images [B, 3, 64, 64] with prompts of one length [B, T]: that of the first case."""
    prompt = cases[order[0]][1]
    return torch.cat([cases[i][0] for i in order]), prompt.expand(len(order), -1).clone()


def hugging_face(backbone, pixels, prompt, *, eos: int, processor: LogitsProcessor | None = None, **settings):
    """Answers, cut after ``eos``, and their scores."""
    output = backbone.model.generate(
        pixel_values=pixels.to(backbone.block(1).fc1.weight.dtype),
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=N_TOKENS,
        num_beams=N_BEAMS,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=1,
        return_dict_in_generate=True,
        output_scores=True,
        logits_processor=LogitsProcessorList([] if processor is None else [processor]),
        **settings,
    )
    answers = [row[prompt.shape[1] :].tolist() for row in output.sequences]
    answers = [row[: row.index(eos) + 1] if eos in row else row[:N_TOKENS] for row in answers]
    return answers, output.sequences_scores


def ours(backbone, bank, pixels, prompts, *, eos: int, thresholds=None, **settings):
    pixels = pixels.to(backbone.block(1).fc1.weight.dtype)
    return generate(
        backbone,
        bank,
        pixels,
        prompts,
        thresholds=thresholds,
        max_new_tokens=N_TOKENS,
        num_beams=N_BEAMS,
        eos_token_id=eos,
        **settings,
    )


def scores_of(generation) -> torch.Tensor:
    return torch.tensor([row.score for row in generation])


@pytest.fixture(scope="module")
def eos(backbone, cases) -> int:
    """A token that many beams choose halfway."""
    pixels, prompt = batch_of(cases, (1, 0, 2))
    answers, _ = hugging_face(backbone, pixels, prompt, eos=2)
    return answers[0][4]


@pytest.fixture(scope="module")
def sharp(in_float64):
    """A float64 pair whose exits are sometimes confident."""
    backbone, bank = copy.deepcopy(in_float64)
    bank.final_norm.weight.data.mul_(2.0)
    return backbone, bank


class ByThreshold:
    """The rule of ``MaxProbPolicy`` with a table, in one line."""

    def __init__(self, table) -> None:
        self.table = table

    def emits(self, exit_index: int, position: int, logits: torch.Tensor) -> bool:
        row = self.table[exit_index]
        return logits.softmax(-1).max().item() > row[min(position, len(row) - 1)]


class ByContent:
    """Emits by a rule of the exit's best token, so that beams go deeper at different times, some of them never."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def emits(self, exit_index: int, position: int, logits: torch.Tensor) -> bool:
        return (logits.argmax().item() * (7 + self.seed) + 3 * exit_index + position) % 5 > 1 + exit_index // 2

    def is_active(self, exit_index: int) -> bool:
        return True

    def is_active_at(self, exit_index: int, position: int) -> bool:
        return True

    def decide(self, exit_index, scores, positions, earlier):
        emit = [self.emits(exit_index, *row) for row in zip(positions, scores.logits, strict=True)]
        return Decision(scores.logits.argmax(-1), [0.5] * len(emit), emit)


class UncachedExits(LogitsProcessor):
    """Gives transformers' beam search the exits' log-probabilities, each from a whole forward without any cache."""

    def __init__(self, backbone, bank, pixels, n_prompt, rule, ids=None) -> None:
        self.backbone, self.bank, self.n_prompt, self.rule = backbone, bank, n_prompt, rule
        self.prefix = backbone.encode_prefix(pixels.double())
        self.ids = slice(None) if ids is None else ids
        self.exit_of: dict[tuple[int, ...], int | None] = {}
        """(item, *ids) -> block after which the token that follows these ids was scored."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        images = torch.arange(len(input_ids)) // (len(input_ids) // len(self.prefix))
        layers = self.bank.exit_layers
        hidden = [self.backbone.embed(input_ids, self.prefix[images])]
        for start, stop in itertools.pairwise((0, *layers)):
            hidden.append(self.backbone.run_blocks(hidden[-1], start, stop))
        exit_logits = self.bank.logits(self.bank(hidden[1:]))[:, :, -1, self.ids]
        for row, ids in enumerate(input_ids.tolist()):
            self.exit_of[images[row].item(), *ids] = None
            for k, layer in enumerate(layers):
                logits = exit_logits[k, row]
                if self.rule.emits(k, input_ids.shape[1] - self.n_prompt, logits):
                    scores[row] = -torch.inf
                    scores[row, self.ids] = logits.log_softmax(-1).float()
                    self.exit_of[images[row].item(), *ids] = layer
                    break
        return scores


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("order", "length_penalty"), [((1,), 1.0), *(((1, 0, 2), p) for p in (1.0, 0.0, -1.0, 2.5))])
def test_full_depth_gives_hugging_faces_sequences_and_scores(
    backbone, bank, cases, eos, order, early_stopping, length_penalty
) -> None:
    pixels, prompt = batch_of(cases, order)
    settings = {"early_stopping": early_stopping, "length_penalty": length_penalty, "eos": eos}
    wanted, scores = hugging_face(backbone, pixels, prompt, **settings)
    for used, thresholds in ((None, None), (bank, 1.1)):
        found = ours(backbone, used, pixels, prompt, thresholds=thresholds, **settings)
        assert [row.tokens for row in found] == wanted
        torch.testing.assert_close(scores_of(found), scores, rtol=1e-5, atol=1e-5)


def test_the_settings_compared_give_different_answers(backbone, cases, eos) -> None:
    """So agreement over all of them is agreement about what they mean."""
    pixels, prompt = batch_of(cases, (1, 0, 2))
    lengths, answers = set(), set()
    for early_stopping, length_penalty in itertools.product((False, True, "never"), (0.0, 2.5)):
        rows, _ = hugging_face(
            backbone, pixels, prompt, eos=eos, early_stopping=early_stopping, length_penalty=length_penalty
        )
        lengths |= {len(row) for row in rows}
        answers.add(str(rows))
    assert len(answers) > 2
    assert N_TOKENS in lengths and min(lengths) < N_TOKENS - 3


def test_mixed_lengths_in_float64_equal_hugging_face_one_by_one(in_float64, cases, eos) -> None:
    backbone, bank = in_float64
    pixels, prompts = torch.cat([case[0] for case in cases]), [case[1][0].tolist() for case in cases]
    found = ours(backbone, bank, pixels, prompts, thresholds=1.1, eos=eos)
    for row, (one, prompt) in zip(found, cases, strict=True):
        wanted, score = hugging_face(backbone, one, prompt, eos=eos)
        assert row.tokens == wanted[0]
        torch.testing.assert_close(row.score, score.item(), rtol=1e-6, atol=1e-6)


FLAT = ((0.5,), (0.4,), (0.3,))
HIGH = ((0.8,), (0.75,), (0.7,))
"""A pruned head spreads its probability over fewer tokens."""
LATE = ((2.0, 2.0, 2.0, 0.4), (2.0, 2.0, 0.4, 0.4), (0.2, 2.0, 0.3, 0.3))
"""Shallow exits are asked only when the beams have parted, so they read the prompt last."""

CASES = {
    "content 0": (ByContent(0), False, False),
    "content 1": (ByContent(1), False, "never"),
    "content 2": (ByContent(2), False, True),
    "pruned head": (ByThreshold(HIGH), True, "never"),
    "shallow exits late": (ByThreshold(LATE), False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_beams_that_exit_equal_hugging_face_fed_with_uncached_exits(sharp, cases, name) -> None:
    backbone, bank = sharp
    pixels, prompt = batch_of(cases, (1, 0, 2))
    rule, pruned, early_stopping = CASES[name]
    ids = torch.arange(0, backbone.vocab_size, 3) if pruned else None
    settings = {"early_stopping": early_stopping, "length_penalty": 0.7}
    with_exits = settings | {
        "thresholds": rule if isinstance(rule, ByContent) else rule.table,
        "checks": ExitChecks(FullHead(bank.lm_head) if ids is None else PrunedHead(bank.lm_head, ids)),
    }
    eos = ours(backbone, bank, pixels, prompt, eos=-1, **with_exits)[0].tokens[5]
    reference = UncachedExits(backbone, bank, pixels, prompt.shape[1], rule, ids)
    wanted, scores = hugging_face(backbone, pixels, prompt, eos=eos, processor=reference, **settings)
    found = ours(backbone, bank, pixels, prompt, eos=eos, **with_exits)
    assert [row.tokens for row in found] == wanted
    torch.testing.assert_close(scores_of(found), scores, rtol=1e-6, atol=1e-6)
    for item, row in enumerate(found):
        prefixes = [prompt[item].tolist() + row.tokens[:n] for n in range(len(row.tokens))]
        assert row.exit_layers == [reference.exit_of[item, *prefix] for prefix in prefixes]
        assert all((layer is None) == (c is None) for layer, c in zip(row.exit_layers, row.confidences, strict=True))
    # Every exit scores some beam, and so does the full model.
    assert set(reference.exit_of.values()) == {*bank.exit_layers, None}


def test_a_closed_gate_leaves_the_full_model_and_an_open_one_changes_nothing(sharp, cases) -> None:
    backbone, bank = sharp
    pixels, prompt = batch_of(cases, (1, 0))
    gates = FeatureClassifiers(3, backbone.hidden_size, 4)

    def gated(threshold: float):
        checks = ExitChecks(FullHead(bank.lm_head), gates=gates, gate_thresholds=[threshold] * 3)
        return ours(backbone, bank, pixels, prompt, eos=-1, thresholds=FLAT, checks=checks)

    closed, full = gated(1.0), ours(backbone, None, pixels, prompt, eos=-1)
    assert [row.tokens for row in closed] == [row.tokens for row in full]
    assert closed.calls.exit_calls == 0
    assert closed.calls == full.calls
    assert gated(0.0) == ours(backbone, bank, pixels, prompt, eos=-1, thresholds=FLAT)
    assert gated(0.0).calls.exit_calls > 0


def test_a_head_with_fewer_tokens_than_candidates_still_gives_an_answer(in_float64, cases) -> None:
    """Tokens that the head leaves out have no probability: they neither end an answer nor count as one."""
    backbone, bank = in_float64
    pixels, prompt = batch_of(cases, (1, 0))

    def answered(ids: list[int], eos: int):
        checks = ExitChecks(PrunedHead(bank.lm_head, torch.tensor(ids)))
        return ours(backbone, bank, pixels, prompt, eos=eos, thresholds=0.0, checks=checks, early_stopping=True)

    for row in answered([7, 300], eos=7):
        assert set(row.tokens) <= {7, 300} and 7 not in row.tokens[:-1]
        assert row.score > -100
    for row in answered([300], eos=4):
        assert row.tokens == [300] * N_TOKENS
        assert row.score == 0.0


def test_wrong_calls_are_refused_with_what_to_do(backbone, cases) -> None:
    pixels, prompt = cases[0]
    for settings in ({"do_sample": True}, {"stopping_criteria": []}):
        with pytest.raises(UserError, match="num_beams=1"):
            ours(backbone, None, pixels, prompt, eos=-1, **settings)
    for name, value in (("num_beams", 0), ("early_stopping", "soon"), ("length_penalty", float("nan"))):
        with pytest.raises(UserError, match=name):
            BeamOptions(**{"num_beams": 2, "max_new_tokens": 1, "eos": -1, name: value})
    with pytest.raises(UserError, match="half the vocabulary"):
        generate(backbone, None, pixels, prompt, max_new_tokens=2, num_beams=backbone.vocab_size)
