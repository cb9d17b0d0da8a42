"""Recordings for placing exits: the full model answers every sample while all exits of a bank are asked and none emits.

What is recorded is what the decoder itself would see behind the full model's own tokens.  Once an exit has emitted another token
than the full model, the rest of its answer goes on from that token and was never recorded: predictions hold where exits seldom
disagree, which is where exits are used.  Also turns measured costs into the numbers that the search takes.
Does not know how exits are placed (:mod:`free_dist.exits.placement`) or answers timed.

Shape letters: C candidate exits, T tokens, N answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from free_dist.backbones import Backbone
from free_dist.config import ConfigError, Recipe
from free_dist.data.samples import Sample, SampleEncoder
from free_dist.data.stream import required_samples
from free_dist.decoding.generate import generate
from free_dist.evaluation.arms import Split
from free_dist.evaluation.calibration import RecordingPolicy
from free_dist.evaluation.cost_model import DecodeCosts, ExitSetting, at_positions, token_costs
from free_dist.exits import ExitBank
from free_dist.exits.placement import PlacementCosts, Recording

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

UNKNOWN = -1
"""Label of a token behind which the answer had already left the label."""
HARMS = ("agreement", "labels")


@dataclass(frozen=True, kw_only=True)
class RecordedAnswers:
    """The full model's answers to the samples of a task, and every exit's opinion on each of their tokens."""

    task: str
    exit_layers: tuple[int, ...]
    n_blocks: int
    answers: Integers
    """[T], which answer a token belongs to."""
    places: Integers
    """[T], 0-based place in its answer."""
    prompts: Integers
    """[N], positions that the blocks had before the answer."""
    tokens: Integers
    """[T], the full model's."""
    labels: Integers
    """[T], the label's token at that place, ``UNKNOWN`` from where the answer has left the label."""
    confidences: Floats
    """[C, T]."""
    named: Integers
    """[C, T], the token that the exit would have emitted."""

    @property
    def agrees(self) -> NDArray[np.bool_]:
        """[C, T], whether the exit names the full model's token."""
        return self.named == self.tokens

    @property
    def right(self) -> NDArray[np.bool_]:
        """[C, T], whether the exit names the label's token; false where the label is unknown."""
        return self.named == self.labels

    def harm(self, kind: str = "agreement") -> Floats:
        """[C, T], what is lost where a token leaves at an exit.

        ``agreement``: the exit's token is not the full model's.  ``labels``: nor was the full model's wrong, as far as the
        label tells.  Weights: in captions the share of all tokens; elsewhere one per answer, so that the sum is at least the
        share of answers that change.
        """
        if kind not in HARMS:
            raise ValueError(f"harm {kind!r}: want one of {', '.join(HARMS)}")
        weight = 1 / len(self.tokens) if self.task == "caption" else 1 / len(self.prompts)
        lost = ~self.agrees
        if kind == "labels":
            lost &= (self.tokens == self.labels) | (self.labels == UNKNOWN)
        return np.where(lost, weight, 0.0)

    def recording(self, kind: str = "agreement") -> Recording:
        """What the search takes: exits after the last block, which save nothing, are left out."""
        rows = [i for i, layer in enumerate(self.exit_layers) if layer < self.n_blocks]
        return Recording(
            n_blocks=self.n_blocks,
            blocks=tuple(self.exit_layers[i] for i in rows),
            answers=self.answers,
            reach=self.prompts[self.answers] + self.places,
            confidences=self.confidences[rows],
            harm=self.harm(kind)[rows],
        )


@torch.inference_mode()
def record_answers(
    backbone: Backbone,
    encoder: SampleEncoder,
    bank: ExitBank,
    task: str,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    progress: Callable[[Sequence[Sample]], Iterable[Sample]] = iter,
) -> RecordedAnswers:
    """Answer every sample at full depth, asking all exits; ``progress`` may show how far it is.

    Raises ConfigError without samples, and what ``generate`` raises.
    """
    if not samples:
        raise ConfigError(f"evaluation.tasks: no samples of task {task!r} to record")
    n_exits = len(bank.exit_layers)
    device = next(backbone.parameters()).device
    tokens: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    prompts: list[int] = []
    said: list[tuple[Floats, Integers]] = []
    for sample in progress(samples):
        policy = RecordingPolicy((2.0,) * n_exits, emit=False)
        prompt = encoder.encode_prompt(sample.turns)
        (answer,) = generate(
            backbone,
            bank,
            encoder.encode_image(sample.image)[None].to(device),
            prompt,
            instruction=encoder.encode_instruction(sample.turns, device),
            thresholds=policy,
            max_new_tokens=max_new_tokens,
        )
        confidences = np.zeros((n_exits, len(answer.tokens)))
        named = np.zeros((n_exits, len(answer.tokens)), dtype=np.int64)
        for position, exit_index, confidence, token in policy.checks:
            confidences[exit_index, position], named[exit_index, position] = confidence, token
        said.append((confidences, named))
        tokens += answer.tokens
        labels += _labels(encoder, sample, answer.tokens)
        lengths.append(len(answer.tokens))
        prompts.append(backbone.layout.decoder_positions(prompt))
    return RecordedAnswers(
        task=task,
        exit_layers=bank.exit_layers,
        n_blocks=backbone.n_blocks,
        answers=np.repeat(np.arange(len(lengths)), lengths),
        places=np.concatenate([np.arange(n) for n in lengths]),
        prompts=np.array(prompts),
        tokens=np.array(tokens),
        labels=np.array(labels),
        confidences=np.concatenate([one for one, _ in said], axis=1),
        named=np.concatenate([one for _, one in said], axis=1),
    )


def calibration_samples(recipe: Recipe, task: str, count: int) -> list[Sample]:
    """``count`` samples of the calibration split (0: all), evenly spaced; raises ConfigError where there are none."""
    return required_samples(recipe.data, "calibration", task, max_samples=count)


def placement_costs(costs: DecodeCosts, *, positions: int, answer: float, head: str = "full") -> PlacementCosts:
    """Measured costs as tables for up to ``positions`` positions in a call; ``answer``: seconds per answer beside decoding."""
    calls = range(positions + 1)
    return PlacementCosts(
        block=np.array([at_positions(costs.block, n) for n in calls]),
        last_block=np.array([at_positions(costs.last_block, n) for n in calls]),
        exit_transformer=np.array([costs.exit_at(n) for n in calls]),
        exit_head=costs.exit_heads[head],
        head=costs.head,
        token=costs.token,
        segment=costs.segment,
        answer=answer,
    )


class Timed(NamedTuple):
    """Seconds of one answer at full depth by part, and of the same answer with one exit asked in vain at every token."""

    split: Split
    asked: float
    """Prefill and decode."""


def anchored_costs(
    costs: DecodeCosts, answers: Mapping[str, RecordedAnswers], timed: Mapping[str, Sequence[Timed]], *, exit_layer: int
) -> dict[str, PlacementCosts]:
    """Costs per task, scaled so that they give what the decoder itself took on the first answers of every task.

    Pieces measured alone and whole answers differ: by caches, by what starting an answer takes, and unlike on a busy machine.  So
    blocks are scaled to full depth's tokens after the first, what its first token takes beyond that is charged per answer,
    and an exit's head and decision are at least what asking the exit after ``exit_layer`` in vain really added.  No exit emits
    in any of these answers, so speeds with exits remain predictions.
    """
    setting = ExitSetting(layers=(exit_layer,))
    firsts = rests = plain = checked = 0.0
    n_answers = n_tokens = 0
    for task, own in timed.items():
        recorded = answers[task]
        for number in range(len(own)):
            script = [recorded.n_blocks] * int((recorded.answers == number).sum())
            prompt = int(recorded.prompts[number])
            tokens = [sum(parts.values()) for parts in token_costs(costs, None, script, prompt=prompt)]
            firsts, rests = firsts + tokens[0], rests + sum(tokens[1:])
            plain += sum(tokens)
            checked += sum(sum(parts.values()) for parts in token_costs(costs, setting, script, prompt=prompt))
            n_answers, n_tokens = n_answers + 1, n_tokens + len(script)
    every = [one for own in timed.values() for one in own]
    prefill, decode = (sum(getattr(one.split, name) for one in every) for name in ("prefill", "decode"))
    scale = decode / rests if rests else prefill / firsts
    start = max(0.0, prefill - scale * firsts) / n_answers
    extra = sum(one.asked for one in every) - prefill - decode - scale * (checked - plain)
    # Never less than the pieces say: the difference of two whole answers is a noisy measure.
    exit_head = scale * costs.exit_heads["full"] + max(0.0, extra) / n_tokens
    vision = sum(one.split.vision for one in every) / n_answers
    found = {}
    for task in timed:
        recorded = answers[task]
        positions = int((recorded.prompts[recorded.answers] + recorded.places).max())
        pieces = vars(placement_costs(costs, positions=positions, answer=0.0))
        scaled = {name: value * scale for name, value in pieces.items()}
        found[task] = PlacementCosts(**scaled | {"exit_head": exit_head, "answer": vision + start})
    return found


def _labels(encoder: SampleEncoder, sample: Sample, tokens: Sequence[int]) -> list[int]:
    """The label's token for every place of an answer, as long as the answer has followed the label."""
    _, targets = encoder.encode_text(sample.turns)
    wanted = targets[len(encoder.encode_prompt(sample.turns)) - 1 :] if _is_one_text(encoder) else targets
    found = []
    follows = True
    for i, token in enumerate(tokens):
        follows = follows and i < len(wanted)
        found.append(wanted[i] if follows else UNKNOWN)
        follows = follows and wanted[i] == token
    return found


def _is_one_text(encoder: SampleEncoder) -> bool:
    """Whether prompt and answer stand in one sequence, rather than in encoder and decoder."""
    return encoder.layout.decoder_start_token_id is None
