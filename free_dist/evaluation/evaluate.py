"""Sharded evaluation: every arm answers the same samples under the paired clock, and one run gives quality and time.

The full-depth decoder runs once per sample and serves every threshold and every bank as teacher and as baseline.  Rank
and world size are arguments, and so is the function that gathers results: samples are numbered over all ranks, so the
merged results are checked to hold each of them exactly once, and scores that need the whole corpus (CIDEr) see it
whole.

Does not know how results are printed or plotted, nor torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from free_dist.backbones import Backbone, Blip2Backbone
from free_dist.config import WITHHELD, Recipe
from free_dist.data.samples import Sample, SampleEncoder, image_numbers
from free_dist.data.stream import nothing_for_task, split_samples, withheld_samples
from free_dist.evaluation.benchmark import (
    Answer,
    Arm,
    exits_arm,
    full_arm,
    hf_arm,
    mean_with_interval,
    prompted,
    ratio_with_interval,
    run_interleaved,
)
from free_dist.evaluation.rows import Row
from free_dist.evaluation.tasks import Score, TaskScorer
from free_dist.exits import ExitBank

T = TypeVar("T")
Gather = Callable[[list[T]], list[list[T]]]
"""This rank's list -> every rank's lists, in rank order (``all_gather_object`` in a process group)."""


def alone(results: list[T]) -> list[list[T]]:
    """The gather of a single process."""
    return [results]


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """One sample's answers, in the order of the arms; small enough to send between ranks."""

    index: int
    """Place in the whole evaluation."""
    references: tuple[str, ...]
    texts: tuple[str | None, ...]
    """Decoded answers."""
    answers: tuple[Answer | None, ...]
    """None where an arm's stride leaves the sample out."""


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """Everything that was answered for one task."""

    task: str
    arms: tuple[Arm, ...]
    samples: tuple[Sample, ...]
    results: tuple[SampleResult, ...]
    """In the order of ``samples``."""
    rows: tuple[Row, ...]
    """One per arm."""


def evaluate_exits(
    backbone: Backbone,
    encoder: SampleEncoder,
    banks: Mapping[str, ExitBank],
    recipe: Recipe,
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather[Any] = alone,
    quiet: bool = False,
) -> list[Row]:
    """The rows of :func:`evaluate_tasks`."""
    found = evaluate_tasks(
        backbone, encoder, banks, recipe, rank=rank, world_size=world_size, gather=gather, quiet=quiet
    )
    return [row for task in found for row in task.rows]


def evaluate_tasks(
    backbone: Backbone,
    encoder: SampleEncoder,
    banks: Mapping[str, ExitBank],
    recipe: Recipe,
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather[Any] = alone,
    quiet: bool = False,
) -> list[TaskEvaluation]:
    """Every task of ``recipe.evaluation``, with the rows ``full``, ``hf``, and one per bank and threshold.

    ``banks``: method name -> exits, such as ``{"exits": bank}``; all share the interleaved run.  Hugging Face's own
    decoder, a slow reference, answers about ``evaluation.timing_samples`` of the samples, evenly spaced (0: none).
    Every rank returns the same; rank 0 scores, so that Java programs run once.  Raises ConfigError for unknown tasks and
    tasks without samples, ValueError for a bank named like a baseline, and what TaskScorer raises.
    """
    for method in banks:
        if method in ("full", "hf"):
            raise ValueError(f"banks: {method!r} is the name of a baseline; call exits something else, such as 'exits'")
    scorers = [TaskScorer(name, recipe.evaluation) for name in recipe.evaluation.tasks]
    evaluations: list[TaskEvaluation] = []
    for scorer in scorers:
        task = scorer.task.name
        samples = task_samples(recipe, task)
        if not samples:
            raise nothing_for_task(recipe.data, recipe.evaluation.split, task)
        arms = standard_arms(backbone, banks, recipe, n_samples=len(samples))
        mine = samples[rank::world_size]
        bar = tqdm(total=len(mine), desc=f"evaluate {task}", unit="sample", disable=quiet or rank != 0, mininterval=1.0)
        with bar:
            found = []
            for result in answer_samples(backbone, encoder, arms, mine, rank=rank, world_size=world_size):
                found.append(result)
                bar.update()
        merged = sorted((result for part in gather(found) for result in part), key=lambda result: result.index)
        assert [result.index for result in merged] == list(range(len(samples))), "a sample was dropped or counted twice"
        own: list[Row] = []
        if rank == 0:
            own = task_rows(
                task, arms, merged, n_blocks=backbone.n_blocks, world_size=world_size, samples=samples, scorer=scorer
            )
        rows = gather(own)[0]
        evaluations.append(
            TaskEvaluation(task=task, arms=tuple(arms), samples=tuple(samples), results=tuple(merged), rows=tuple(rows))
        )
    return evaluations


def task_samples(recipe: Recipe, task: str) -> list[Sample]:
    """The samples of one task that a recipe evaluates; of the withheld split, those without answers."""
    settings = recipe.evaluation
    read = withheld_samples if settings.split == WITHHELD else split_samples
    return read(recipe.data, settings.split, task, max_samples=settings.max_samples)


def standard_arms(backbone: Backbone, banks: Mapping[str, ExitBank], recipe: Recipe, *, n_samples: int) -> list[Arm]:
    """The full-depth decoder, Hugging Face's (where the model is one of theirs), and every bank at every threshold."""
    limit = recipe.decoding.max_new_tokens
    timed = recipe.evaluation.timing_samples
    arms = [full_arm(backbone, max_new_tokens=limit)]
    if timed > 0 and isinstance(backbone, Blip2Backbone):
        arms.append(hf_arm(backbone, max_new_tokens=limit, stride=max(1, n_samples // timed)))
    for place, (method, bank) in enumerate(banks.items()):
        for threshold in recipe.evaluation.thresholds:
            # No exit fires from 1 up, whichever bank it is: one such arm is enough as a control of the clock.
            if threshold >= 1 and place > 0:
                continue
            arms.append(exits_arm(backbone, bank, threshold=threshold, max_new_tokens=limit, method=method))
    return arms


def answer_samples(
    backbone: Backbone,
    encoder: SampleEncoder,
    arms: Sequence[Arm],
    samples: Sequence[Sample],
    *,
    rank: int,
    world_size: int,
) -> Iterator[SampleResult]:
    """Run this rank's samples through all arms."""
    ready = prompted(backbone, encoder, samples, first=rank, step=world_size)
    for i, answers in enumerate(run_interleaved(arms, ready)):
        yield SampleResult(
            index=rank + i * world_size,
            references=samples[i].references,
            texts=tuple(None if answer is None else encoder.decode(answer.tokens) for answer in answers),
            answers=tuple(answers),
        )


def task_rows(
    task_name: str,
    arms: Sequence[Arm],
    results: Sequence[SampleResult],
    *,
    n_blocks: int,
    world_size: int = 1,
    samples: Sequence[Sample] = (),
    scorer: TaskScorer | None = None,
) -> list[Row]:
    """One row per arm from the merged results of a task; ``arms[0]`` is the full-depth decoder, the teacher.

    ``samples``: all that ``results`` number; with them, qualities are broken down by what the data set says of a sample, and
    intervals are over images.
    """
    assert (arms[0].method, arms[0].stride) == ("full", 1)
    scorer = scorer or TaskScorer(task_name)
    hf = next((i for i, arm in enumerate(arms) if arm.method == "hf"), None)
    return [_row(scorer, arm, i, hf, results, n_blocks, world_size, samples) for i, arm in enumerate(arms)]


def _row(
    scorer: TaskScorer,
    arm: Arm,
    i: int,
    hf: int | None,
    results: Sequence[SampleResult],
    n_blocks: int,
    world_size: int,
    samples: Sequence[Sample],
) -> Row:
    seen = [result for result in results if result.answers[i] is not None]
    numbers = image_numbers(samples) if samples else range(len(results))
    images = [numbers[result.index] for result in seen]
    own, full = _answers(seen, i), _answers(seen, 0)
    score, score_full = _score(scorer, seen, i), _score(scorer, seen, 0)
    n_tokens = sum(len(answer.tokens) for answer in own)
    mean_blocks = sum(answer.blocks for answer in own) / n_tokens
    wall, wall_interval = ratio_with_interval([a.seconds for a in full], [a.seconds for a in own], images)
    extras: dict[str, object] = {
        "quality_name": scorer.task.quality_name,
        "token_agreement": _token_agreement(own, full),
        "wall_ratio_interval": wall_interval,
        "seconds_per_sample": sum(answer.seconds for answer in own) / len(own),
        "tokens_per_sample": n_tokens / len(own),
        "exit_shares": _exit_shares(own),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        **score.extras,
    }
    parts = {}
    if score.per_sample:
        _, extras["quality_interval"] = mean_with_interval(score.per_sample, images)
    if samples and score.per_sample and not scorer.only_quality:
        origins = [samples[result.index].origin for result in seen]
        parts = scorer.breakdown(_texts(seen, i), [result.references for result in seen], origins)
    if parts:
        extras["breakdown"] = parts
    if score_full.quality > 0:
        _, extras["quality_ratio_interval"] = ratio_with_interval(score.per_sample, score_full.per_sample, images)
    wall_hf = None
    if hf is not None:
        shared = [result for result in seen if result.answers[hf] is not None]
        wall_hf, extras["wall_ratio_hf_interval"] = ratio_with_interval(
            [a.seconds for a in _answers(shared, hf)],
            [a.seconds for a in _answers(shared, i)],
            [numbers[result.index] for result in shared],
        )
        extras["n_hf"] = len(shared)
    return Row(
        task=scorer.task.name,
        method=arm.method,
        threshold=arm.threshold,
        quality=score.quality,
        quality_full=score_full.quality,
        agreement=float(np.mean([a.tokens == b.tokens for a, b in zip(own, full, strict=True)])),
        mean_blocks=mean_blocks,
        layer_ratio=n_blocks / mean_blocks,
        wall_ratio=wall,
        wall_ratio_hf=wall_hf,
        n=len(seen),
        extras=extras,
    )


def _answers(results: Sequence[SampleResult], i: int) -> list[Answer]:
    answers = [result.answers[i] for result in results]
    return [answer for answer in answers if answer is not None]


def _score(scorer: TaskScorer, results: Sequence[SampleResult], i: int) -> Score:
    return scorer.score(_texts(results, i), [result.references for result in results])


def _texts(results: Sequence[SampleResult], i: int) -> list[str]:
    texts = [result.texts[i] for result in results]
    return [text for text in texts if text is not None]


def _token_agreement(own: Sequence[Answer], full: Sequence[Answer]) -> float:
    same = total = 0
    for a, b in zip(own, full, strict=True):
        same += sum(x == y for x, y in zip(a.tokens, b.tokens, strict=False))
        total += max(len(a.tokens), len(b.tokens))
    return same / total


def _exit_shares(answers: Sequence[Answer]) -> dict[str, float]:
    layers = [layer for answer in answers for layer in answer.exits]
    return {str(layer): layers.count(layer) / len(layers) for layer in sorted(set(layers))}
