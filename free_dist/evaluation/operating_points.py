"""Operating points of exits for one task: chosen on the calibration split, so that the test split can judge them.

Also what choosing and measuring share: a model with its exits, samples made ready, and times that are medians over rounds.
Does not know the test split, batches or results.

Shape letters: K exits, N samples, A arms.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from free_dist.backbones import Blip2Backbone
from free_dist.config import Recipe
from free_dist.data.samples import Sample, SampleEncoder
from free_dist.decoding.runners import StaticRunner
from free_dist.evaluation.arms import Contestant, ours
from free_dist.evaluation.benchmark import Answer, Prompted, prompted, run_interleaved
from free_dist.evaluation.calibration import OFF, CalibrationSet
from free_dist.exits import ExitBank
from free_dist.exits.gate import ExitChecks

LEAST = 3
"""Samples that are answered however late it is."""
FIRST_IMAGES = 4
"""Images on which all candidates are tried."""
SLACK = 0.1
"""Relative quality that a candidate may lack on few images and still be tried on more."""
MARGIN = 0.005
"""Relative quality wanted on the calibration split beyond what is wanted of the test split: the best of many candidates is
in part the luckiest.  All of it is the most that can be wanted: see :func:`wanted`."""
EXACT_THRESHOLDS = (0.5, 0.9)
"""Tried for lossless decoding, where a threshold decides speed alone."""


@dataclass(frozen=True, kw_only=True)
class Runners:
    """Runners of one name, kept from call to call."""

    full: StaticRunner
    """Without exits."""
    exits: StaticRunner


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is measured."""

    backbone: Blip2Backbone
    encoder: SampleEncoder
    bank: ExitBank
    recipe: Recipe
    checks: ExitChecks | None = None
    """Fitted cheap checks, one more decoder at the chosen operating point."""
    int8: Blip2Backbone | None = None
    """Quantised copy, one more decoder at full depth."""
    runners: Runners | None = None
    """Fixed shapes, compiled or not: full depth, lossy and lossless once more through these."""

    def prompted(self, samples: Iterable[Sample]) -> Iterator[Prompted]:
        """Samples ready for the clock."""
        return prompted(self.backbone, self.encoder, samples)


@dataclass(frozen=True, kw_only=True)
class Operating:
    """An operating point of the exits."""

    threshold: float
    """Of the exits in use."""
    thresholds: tuple[float, ...]
    """[K], switched off where an exit is not in use."""

    @property
    def used(self) -> tuple[int, ...]:
        """Indices into the bank of the exits in use."""
        return tuple(i for i, value in enumerate(self.thresholds) if value < 1)

    def layers(self, bank: ExitBank) -> tuple[int, ...]:
        """Layers of the exits in use."""
        return tuple(bank.exit_layers[i] for i in self.used)


def wanted(min_quality: float) -> float:
    """Relative quality that a chosen setting has on the calibration split, where ``min_quality`` is wanted of the test split."""
    return min(1.0, min_quality + MARGIN)


def operating(bank: ExitBank, threshold: float, used: Iterable[int] | None = None) -> Operating:
    """One threshold for the exits ``used`` (indices into the bank; None: all of them)."""
    n_exits = len(bank.exit_layers)
    chosen = set(range(n_exits) if used is None else used)
    return Operating(threshold=threshold, thresholds=tuple(threshold if i in chosen else OFF for i in range(n_exits)))


def choose(
    model: Model,
    task: str,
    *,
    candidates: Sequence[float],
    samples: int,
    finalists: int,
    contest_samples: int,
    min_quality: float,
    deadline: float | None = None,
) -> tuple[Operating, Operating]:
    """Operating points for lossy and for lossless decoding of a task.

    Lossy: every set of exits at every threshold of ``candidates`` answers up to ``samples`` calibration samples; of those that
    keep ``min_quality`` of the full model's, with a small margin, the ``finalists`` cheapest by weights read are timed, and the
    fastest wins.  Where none keeps it, the one of highest quality is taken.  Lossless keeps all quality: single exits and all
    together are timed.
    From ``deadline`` on (``time.monotonic()``) no more samples are answered than a few, and quality is that of fewer.
    """
    evaluation = replace(model.recipe.evaluation, split="calibration", max_samples=samples)
    recipe = replace(model.recipe, evaluation=evaluation)
    backbone, bank = model.backbone, model.bank
    calibration = CalibrationSet(backbone, model.encoder, bank, recipe, task, quiet=True)
    n_exits = len(bank.exit_layers)
    sets = [s for size in range(1, n_exits + 1) for s in itertools.combinations(range(n_exits), size)]
    # At 0 the shallowest exit always emits: those behind it would change nothing.
    points = [operating(bank, value, used) for used in sets for value in candidates if value > 0 or len(used) == 1]
    lossy = _cheapest(calibration, points, finalists, min_quality, deadline)
    few = [used for used in sets if len(used) in (1, n_exits)]
    lossless = [operating(bank, value, used) for used in few for value in EXACT_THRESHOLDS]
    limit = recipe.decoding.max_new_tokens
    arms = [
        ours(backbone, bank, method=method, max_new_tokens=limit, thresholds=point.thresholds, lossless=exact)
        for method, exact, group in (("lossy", False, lossy), ("lossless", True, lossless))
        for point in group
    ]
    step = -(-len(calibration.samples) // contest_samples)
    _, times = timed(arms, list(model.prompted(calibration.samples[::step])), deadline=deadline)
    sums = [sum(own) for own in times]
    first, second = sums[: len(lossy)], sums[len(lossy) :]
    return lossy[first.index(min(first))], lossless[second.index(min(second))]


def _cheapest(
    calibration: CalibrationSet, points: list[Operating], finalists: int, min_quality: float, deadline: float | None
) -> list[Operating]:
    """The ``finalists`` cheapest of ``points`` that keep ``min_quality``.

    Images are added in steps, each twice as many as the last.  Points far below the quality are dropped on the way, and so is the
    dearer half of the others.
    """
    n_images = min(FIRST_IMAGES, calibration.n_images)
    while True:
        table = calibration.tabulate([point.thresholds for point in points], range(n_images))
        shares = table.quality / table.full_quality if table.full_quality else np.ones(len(points))
        cheap = sorted(range(len(points)), key=lambda i: (table.costs[i], len(points[i].used)))
        late = deadline is not None and time.monotonic() > deadline
        if late or n_images == calibration.n_images:
            break
        n_images = min(2 * n_images, calibration.n_images)
        near = [i for i in cheap if shares[i] >= min_quality - SLACK]
        # The cheapest that lost nothing so far stays, in case that those cheaper than it prove too bad.
        safe = next((i for i in cheap if shares[i] >= 1), int(shares.argmax()))
        left = near[: max(2 * finalists, len(near) // 2)]
        points = [points[i] for i in (left if safe in left else [*left, safe])]
    kept = [i for i in cheap if shares[i] >= wanted(min_quality)] or [int(shares.argmax())]
    return [points[i] for i in kept[:finalists]]


def timed(
    arms: Sequence[Contestant],
    prompts: Sequence[Prompted],
    *,
    rounds: int = 1,
    warmup: int = 1,
    deadline: float | None = None,
) -> tuple[list[list[Answer]], list[list[float]]]:
    """Answers [N][A] of the samples reached by ``deadline`` (``time.monotonic()``), and median seconds over rounds [A][N]."""
    answers: list[list[Answer]] = []
    seconds: list[list[list[float]]] = []  # [N][A][rounds]
    for number in range(rounds):
        if number and deadline is not None and time.monotonic() > deadline:
            break
        todo = within(prompts, deadline) if number == 0 else prompts[: len(answers)]
        for i, found in enumerate(run_interleaved([arm.arm for arm in arms], todo, warmup=0 if number else warmup)):
            row = [answer for answer in found if answer is not None]
            if number == 0:
                answers.append(row)
                seconds.append([[] for _ in arms])
            for j, answer in enumerate(row):
                seconds[i][j].append(answer.seconds)
    return answers, [[median(sample[j]) for sample in seconds] for j in range(len(arms))]


def within(prompts: Iterable[Prompted], deadline: float | None) -> Iterator[Prompted]:
    """The samples until a ``time.monotonic()``, but at least a few."""
    for i, prompt in enumerate(prompts):
        if i >= LEAST and deadline is not None and time.monotonic() > deadline:
            return
        yield prompt
