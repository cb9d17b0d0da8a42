"""The benchmark on trained exits: one task, all decoders, thresholds chosen on the calibration split and timed on the test split.

Per task: operating points from the calibration split; then, on the test split, natural lengths under the paired clock, the same
answers split into vision, prefill and decode, answers of forced equal length, batches, and the cost model's prediction.

Does not know how operating points are chosen, results printed or exits trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from free_dist.backbones import Instruction
from free_dist.config import ConfigError
from free_dist.data.samples import image_numbers
from free_dist.data.stream import required_samples
from free_dist.evaluation.arms import Contestant, Split, hugging_face, ours
from free_dist.evaluation.benchmark import Prompted, median_with_interval
from free_dist.evaluation.benchmark_rows import predicted_speedup, quality_columns, time_rows
from free_dist.evaluation.cost_model import DecodeCosts
from free_dist.evaluation.operating_points import Model, Operating, choose, operating, timed, within
from free_dist.evaluation.tasks import TaskScorer

LOSSY = ("lossy", "lossy, all exits")
"""Methods with exits that emit: the chosen operating point, and all exits at thresholds shown beside it."""
BATCH = 8
"""Samples of a batch."""


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much is run per task."""

    candidates: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    """Thresholds tried with every set of exits."""
    shown: tuple[float, ...] = (0.5, 0.8, 0.95)
    """Thresholds of all exits timed besides the chosen operating points."""
    calibration_samples: int = 120
    contest_samples: int = 20
    """Calibration samples on which the finalists are timed."""
    finalists: int = 6
    """Cheapest operating points, by weights read, that are timed before one is chosen."""
    samples: int = 120
    """Test samples."""
    rounds: int = 2
    split_samples: int = 40
    fixed_samples: int = 30
    fixed_tokens: int = 16
    """Length of forced equal answers."""
    batches: int = 8
    """Batches of eight samples."""
    compiled: bool = True
    """Also Hugging Face with static cache and compiled decoding step; compiling takes up to minutes."""
    seconds: float | None = None
    """About how long a task may take; what does not fit is left out, but every part answers a few samples."""


QUICK = Amounts(
    candidates=(0.0, 0.5, 0.9),
    shown=(0.8,),
    calibration_samples=40,
    contest_samples=5,
    finalists=3,
    samples=60,
    rounds=1,
    split_samples=8,
    fixed_samples=4,
    batches=2,
    compiled=False,
    seconds=14.0,
)
"""All three tasks within a minute."""

SHARES = {"choose": 0.3, "natural": 0.75, "split": 0.82, "fixed": 0.88, "batch": 1.0}
"""Part -> share of the time by which it ends."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What was measured on one task."""

    task: str
    lossy: dict[str, Any]
    """Chosen operating point: speed-up against the fastest exact full-depth decoder, quality, threshold."""
    lossless: dict[str, Any]
    batch8_ratio: float
    """Smallest speed-up in batches of eight against our own full depth, over the thresholds measured."""
    batch8_ratio_chosen: float
    """The same at the chosen operating point alone."""
    cost_model_error: float
    """Predicted over measured speed-up of the chosen operating point against our own full depth, less 1."""
    arms: list[dict[str, Any]]
    """One row per decoder and kind of length; the layer ratio in them is a count, not a speed."""


def benchmark_task(
    model: Model,
    task: str,
    amounts: Amounts,
    costs: DecodeCosts,
    *,
    min_quality: float = 0.99,
    progress: Callable[[str], None] = lambda _: None,
) -> TaskResult:
    """Measure one task; ``min_quality`` is relative to the full model's.  Raises ConfigError for a task without samples."""
    begin = time.monotonic()

    def until(part: str) -> float | None:
        return None if amounts.seconds is None else begin + amounts.seconds * SHARES[part]

    progress(f"{task}: choosing thresholds")
    lossy, lossless = choose(
        model,
        task,
        candidates=amounts.candidates,
        samples=amounts.calibration_samples,
        finalists=amounts.finalists,
        contest_samples=amounts.contest_samples,
        min_quality=min_quality,
        deadline=until("choose"),
    )
    samples = required_samples(model.recipe.data, "test", task, max_samples=amounts.samples)
    prompts = list(model.prompted(samples))
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    shown = [operating(model.bank, value) for value in amounts.shown]
    points = [lossy, *(point for point in shown if point.thresholds != lossy.thresholds)]

    def arms(length: int | None) -> list[Contestant]:
        return contestants(model, points, lossless, amounts, longest, length)

    progress(f"{task}: natural lengths")
    natural = arms(None)
    # Compiled programs are made when a shape first occurs, which must not happen under the clock: shapes depend on the answers.
    warmup = 2 if model.runners is None else len(prompts)
    answers, times = timed(natural, prompts, rounds=amounts.rounds, warmup=warmup, deadline=until("natural"))
    images = image_numbers(samples)
    rows = time_rows(natural, times, task=task, length="natural", images=images)
    texts = [[model.encoder.decode(answer.tokens) for answer in row] for row in answers]
    references = [sample.references for sample in samples[: len(answers)]]
    scorer = TaskScorer(task, model.recipe.evaluation, only_quality=True)
    worth = quality_columns(answers, texts, references, scorer=scorer, n_blocks=model.backbone.n_blocks)
    progress(f"{task}: splits, equal lengths, batches")
    splits = _splits(natural, prompts[: amounts.split_samples], until("split"))
    for row, columns, split in zip(rows, worth, splits, strict=True):
        row |= columns | {"split": split}
    fixed = arms(amounts.fixed_tokens)
    _, fixed_times = timed(
        fixed, prompts[: amounts.fixed_samples], rounds=amounts.rounds, warmup=warmup, deadline=until("fixed")
    )
    length = f"forced, {amounts.fixed_tokens} tokens"
    fixed_rows = time_rows(fixed, fixed_times, task=task, length=length, images=images)
    batched = [arm for arm in natural if arm.arm.method in ("full", *LOSSY)]
    _, batch_times = timed(batched, _in_batches(prompts, amounts.batches), rounds=3, deadline=until("batch"))
    batch_rows = time_rows(batched, batch_times, task=task, length="natural", batch_size=BATCH)
    number = 1  # the chosen operating point
    predicted = predicted_speedup(
        costs,
        lossy.layers(model.bank),
        [row[number] for row in answers],
        [model.backbone.layout.decoder_positions(prompt.prompt_ids) for prompt in prompts[: len(answers)]],
        vision=rows[0]["split"]["vision"][0],
    )
    measured = rows[number]["speedup_over_full"]
    rows[number]["predicted_speedup_over_full"] = predicted
    # Cheap checks may emit other tokens at the same thresholds: they count where that costs no quality.
    good = [row for row in rows if "cheap" not in row["method"] or (row["quality_ratio"] or 0) >= min_quality]
    chosen = _fastest(good, "lossy", "lossy, runner", "lossy, cheap checks")
    exact = _fastest(rows, "lossless", "lossless, runner", "lossless, cheap checks")
    quality = {"exits": lossy.layers(model.bank), "quality_ratio": chosen["quality_ratio"]}
    checked = {"exits": lossless.layers(model.bank), "identical": exact["identical"], "samples": exact["samples"]}
    return TaskResult(
        task=task,
        lossy=_summary(chosen) | quality,
        lossless=_summary(exact) | checked,
        batch8_ratio=min(row["speedup"] for row in batch_rows if row["method"] in LOSSY),
        batch8_ratio_chosen=next(row["speedup"] for row in batch_rows if row["method"] == LOSSY[0]),
        cost_model_error=predicted / measured - 1,
        arms=[*rows, *fixed_rows, *batch_rows],
    )


def contestants(
    model: Model,
    points: Sequence[Operating],
    lossless: Operating,
    amounts: Amounts,
    longest: int,
    length: int | None,
) -> list[Contestant]:
    """Every decoder, our full depth first, the chosen operating point second; ``length`` forces answers of so many tokens."""
    limit = model.recipe.decoding.max_new_tokens if length is None else length
    eos = None if length is None else -1
    backbone, bank = model.backbone, model.bank

    def exits(method: str, point: Operating, **more: Any) -> Contestant:
        return ours(backbone, bank, method=method, max_new_tokens=limit, thresholds=point.thresholds, eos=eos, **more)

    made = [ours(backbone, method="full", max_new_tokens=limit, eos=eos)]
    made += [exits(LOSSY[min(number, 1)], point) for number, point in enumerate(points)]
    made.append(exits("lossless", lossless, lossless=True))
    if model.checks is not None:
        made.append(exits("lossy, cheap checks", points[0], checks=model.checks))
        made.append(exits("lossless, cheap checks", lossless, lossless=True, checks=model.checks))
    if model.runners is not None:
        made += [
            ours(backbone, method="full, runner", max_new_tokens=limit, eos=eos, runner=model.runners.full),
            exits("lossy, runner", points[0], runner=model.runners.exits),
            exits("lossless, runner", lossless, lossless=True, runner=model.runners.exits),
        ]
    made.append(hugging_face(backbone, max_new_tokens=limit, eos=eos))
    if amounts.compiled:
        # The same cache for both lengths, so that one graph serves both.
        room = model.recipe.decoding.max_new_tokens - limit
        made.append(hugging_face(backbone, max_new_tokens=limit, eos=eos, compiled_for=longest + room))
    if model.int8 is not None:
        made.append(ours(model.int8, method="int8", max_new_tokens=limit, eos=eos))
    return made


def _splits(
    arms: Sequence[Contestant], prompts: Sequence[Prompted], deadline: float | None
) -> list[dict[str, tuple[float, tuple[float, float]]]]:
    """Per arm: part -> median seconds and interval."""
    found: list[list[Split]] = [[] for _ in arms]
    for prompt in within(prompts, deadline):
        for own, arm in zip(found, arms, strict=True):
            own.append(arm.split(prompt.pixel_values, prompt.prompt_ids, prompt.instruction))
    return [
        {name: median_with_interval([getattr(split, name) for split in own]) for name in Split._fields} for own in found
    ]


def _in_batches(prompts: Sequence[Prompted], batches: int) -> list[Prompted]:
    """At most so many batches, at least one; samples that fill no batch are left out."""
    if len(prompts) < BATCH:
        raise ConfigError(f"evaluation.max_samples: {len(prompts)} samples are no batch of {BATCH}")
    groups = [prompts[i : i + BATCH] for i in range(0, len(prompts) - BATCH + 1, BATCH)]
    return [
        Prompted(
            index=i,
            pixel_values=torch.cat([prompt.pixel_values for prompt in group]),
            prompt_ids=[prompt.prompt_ids for prompt in group],  # type: ignore[arg-type]
            instruction=_joined([prompt.instruction for prompt in group]),
        )
        for i, group in enumerate(groups[:batches])
    ]


def _joined(parts: Sequence[Instruction | None]) -> Instruction | None:
    known = [part for part in parts if part is not None]
    return Instruction.joined(known) if known else None


def _fastest(rows: Sequence[dict[str, Any]], *methods: str) -> dict[str, Any]:
    """One operating point may run in several ways, with the same tokens."""
    return max((row for row in rows if row["method"] in methods), key=lambda row: row["speedup"])


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("task", "method", "speedup", "speedup_interval", "speedup_over", "threshold")}
