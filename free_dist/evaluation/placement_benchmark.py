"""Placed exits under the paired clock: every placement answers the same test samples, interleaved with full depth.

All placements are cut from one bank with exits after all blocks.  Does not know how placements are found or where results are
written.

Shape letters: A arms, N samples, K exits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from free_dist.backbones import Blip2Backbone
from free_dist.config import ConfigError, Recipe
from free_dist.data.samples import SampleEncoder, image_numbers
from free_dist.data.stream import required_samples
from free_dist.evaluation.arms import ours
from free_dist.evaluation.benchmark import ratio_with_interval
from free_dist.evaluation.calibration import OFF
from free_dist.evaluation.operating_points import Model, timed
from free_dist.evaluation.tasks import TaskScorer
from free_dist.exits import ExitBank
from free_dist.exits.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One placement on the samples of one task."""

    seconds: tuple[float, ...]
    """[N], median over rounds."""
    scores: tuple[float, ...]
    """[N], the task's score of each answer."""
    identical: int
    """Answers with exactly the full model's tokens."""


@dataclass(frozen=True, kw_only=True)
class TaskMeasurement:
    """All placements on one task."""

    full: Measured
    placed: dict[str, Measured]
    """Name -> what was measured; placements that are the same share one measurement."""
    images: tuple[int, ...]
    """[N], which image each answer is about."""
    quality_name: str
    tokenizer: dict[str, Any]
    """``tokenizer``, where the quality depends on one."""


def bank_thresholds(bank: ExitBank, placement: Placement) -> tuple[float, ...]:
    """One threshold per exit of the bank, those that are not placed switched off; raises ConfigError for one it lacks."""
    missing = [layer for layer in placement.layers if layer not in bank.exit_layers]
    if missing:
        raise ConfigError(f"no exit after blocks {missing}: the bank has {list(bank.exit_layers)}")
    chosen = dict(zip(placement.layers, placement.thresholds, strict=True))
    return tuple(chosen.get(layer, OFF) for layer in bank.exit_layers)


def measure_task(
    backbone: Blip2Backbone,
    encoder: SampleEncoder,
    recipe: Recipe,
    task: str,
    placements: Mapping[str, tuple[ExitBank, Placement]],
    *,
    max_samples: int,
    rounds: int = 2,
    deadline: float | None = None,
    split: str = "test",
) -> TaskMeasurement:
    """Time full depth and every placement on a split of a task.

    No more samples are begun after ``deadline`` (``time.monotonic()``), nor rounds.  Raises ConfigError without samples.
    """
    samples = required_samples(recipe.data, split, task, max_samples=max_samples)
    keys = {name: (id(bank), bank_thresholds(bank, placement)) for name, (bank, placement) in placements.items()}
    limit = recipe.decoding.max_new_tokens
    arms = [ours(backbone, method="full", max_new_tokens=limit)]
    number: dict[tuple[int, tuple[float, ...]], int] = {}
    for name, (bank, _) in placements.items():
        if keys[name] not in number and any(value < 1 for value in keys[name][1]):
            number[keys[name]] = len(arms)
            # Exits that are switched off are not computed, but looked at once per answer, which a small model feels.
            used = [layer for layer, value in zip(bank.exit_layers, keys[name][1], strict=True) if value < 1]
            thresholds = [value for value in keys[name][1] if value < 1]
            arms.append(ours(backbone, bank.subset(used), method=name, max_new_tokens=limit, thresholds=thresholds))
    some_bank = next(iter(placements.values()))[0]
    model = Model(backbone=backbone, encoder=encoder, bank=some_bank, recipe=recipe)
    answers, times = timed(arms, list(model.prompted(samples)), rounds=rounds, deadline=deadline)
    scorer = TaskScorer(task, recipe.evaluation, only_quality=True)
    references = [sample.references for sample in samples[: len(answers)]]
    found = []
    tokenizer: dict[str, Any] = {}
    for place, seconds in enumerate(times):
        own = [row[place] for row in answers]
        score = scorer.score([encoder.decode(answer.tokens) for answer in own], references)
        tokenizer = score.tokenizer
        same = sum(answer.tokens == row[0].tokens for answer, row in zip(own, answers, strict=True))
        found.append(Measured(seconds=tuple(seconds), scores=score.per_sample, identical=same))
    return TaskMeasurement(
        full=found[0],
        placed={name: found[number.get(key, 0)] for name, key in keys.items()},
        images=tuple(image_numbers(samples[: len(answers)])),
        quality_name=scorer.task.quality_name,
        tokenizer=tokenizer,
    )


def measured_columns(tasks: Sequence[TaskMeasurement], name: str, *, against: str | None = None) -> dict[str, Any]:
    """Speed and quality of one placement over one or several tasks, for a JSON file.

    Over several tasks every task counts alike: times are taken relative to its full depth's mean, and so are qualities.
    Intervals are over the images of each task.
    ``against``: another placement whose time over this one's is given too.
    """
    full, own, other = [], [], []
    images: list[tuple[int, int]] = []
    ratios, qualities = [], []
    for number, task in enumerate(tasks):
        images += [(number, image) for image in task.images]
        mine, unit = task.placed[name], float(np.mean(task.full.seconds)) * len(task.full.seconds)
        full += [value / unit for value in task.full.seconds]
        own += [value / unit for value in mine.seconds]
        if against is not None:
            other += [value / unit for value in task.placed[against].seconds]
        quality, whole = float(np.mean(mine.scores)), float(np.mean(task.full.scores))
        qualities.append(quality)
        ratios.append(quality / whole if whole else 1.0)
    speed, interval = ratio_with_interval(full, own, images)
    columns: dict[str, Any] = {
        "measured_speed": speed,
        "measured_speed_interval": interval,
        "quality": float(np.mean(qualities)),
        "quality_ratio": float(np.mean(ratios)),
        "identical": sum(task.placed[name].identical for task in tasks),
        "n": sum(len(task.full.seconds) for task in tasks),
    }
    if against is not None:
        ratio, interval = ratio_with_interval(own, other, images)
        columns["slower_than_found"], columns["slower_than_found_interval"] = ratio, interval
    for task in tasks:
        columns |= task.tokenizer
    return columns
