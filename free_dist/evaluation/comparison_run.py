"""One task of a comparison, measured: every method at its operating point, and its sweep, on the same test samples in one
interleaved run, from pixels to tokens.

Does not know how operating points are chosen, what training cost, or files.

Shape letters: A arms, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from free_dist.backbones import Blip2Backbone
from free_dist.config import Recipe
from free_dist.data.samples import Sample, SampleEncoder, image_numbers
from free_dist.data.stream import required_samples
from free_dist.evaluation.benchmark import (
    Answer,
    Arm,
    full_arm,
    hf_arm,
    mean_with_interval,
    prompted,
    ratio_with_interval,
    run_interleaved,
)
from free_dist.evaluation.comparison import OURS, Contest, Method, Setting, method_arm
from free_dist.evaluation.comparison_choice import Chosen
from free_dist.evaluation.tasks import TaskScorer

BASELINES = {"full": "full model, our decoder", "hf": "full model, Hugging Face"}
"""The two full-depth decoders; the faster one is the baseline of speeds."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One arm and what it stands for."""

    arm: Arm
    method: Method | None
    setting: Setting | None
    chosen: Chosen | None
    in_table: bool
    in_sweep: bool


def compare_task(
    backbone: Blip2Backbone,
    encoder: SampleEncoder,
    methods: Contest,
    chosen: Mapping[str, Chosen],
    recipe: Recipe,
    task: str,
    *,
    min_quality: float,
    costs: Mapping[str, Mapping[str, float | None]],
    quiet: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of the table, rows of the sweep) of a task on ``recipe.evaluation``'s samples.

    ``costs``: training -> ``training_seconds`` and ``training_flops_per_sample``.  Raises ConfigError for a task without samples.
    """
    settings = recipe.evaluation
    scorer = TaskScorer(task, settings, only_quality=True)
    samples = required_samples(recipe.data, settings.split, task, max_samples=settings.max_samples)
    entries = list(_entries(backbone, methods, chosen, recipe))
    arms = [entry.arm for entry in entries]
    answers: list[list[Answer]] = []
    run = run_interleaved(arms, prompted(backbone, encoder, samples))
    for found in tqdm(run, desc=f"compare {task}", total=len(samples), unit="sample", disable=quiet, mininterval=1.0):
        answers.append([answer for answer in found if answer is not None])
    columns = list(zip(*answers, strict=True))
    measured = _measure(scorer, samples, columns, encoder.decode, backbone.n_blocks)
    ours = next(
        i
        for i, entry in enumerate(entries)
        if entry.method is not None and entry.method.name == OURS and entry.chosen is not None
    )
    seconds = [[answer.seconds for answer in column] for column in columns]
    images = image_numbers(samples)
    baselines = [i for i, entry in enumerate(entries) if entry.method is None]
    fastest = min(baselines, key=lambda i: sum(seconds[i]))
    table, sweep = [], []
    for i, entry in enumerate(entries):
        speed, interval = ratio_with_interval(seconds[fastest], seconds[i], images)
        against, against_interval = ratio_with_interval(seconds[i], seconds[ours], images)
        row = _described(entry, task, costs, min_quality)
        row |= measured[i] | {
            "speed": speed,
            "speed_interval": list(interval),
            "speed_over": arms[fastest].method,
            "ours_over_this": against,
            "ours_over_this_interval": list(against_interval),
        }
        unknown = "trained elsewhere, operations not known" if row["training_flops_per_sample"] is None else ""
        row["note"] = "; ".join(part for part in (_remark(entry, min_quality), row["note"], unknown) if part)
        if entry.in_table:
            table.append(row)
        if entry.in_sweep:
            sweep.append(row)
    return table, sweep


def _entries(
    backbone: Blip2Backbone, methods: Contest, chosen: Mapping[str, Chosen], recipe: Recipe
) -> Iterator[_Entry]:
    """Full depth, then every method at the settings that are shown, each of them once."""
    limit = recipe.decoding.max_new_tokens
    for arm in (full_arm(backbone, max_new_tokens=limit), hf_arm(backbone, max_new_tokens=limit)):
        yield _Entry(arm=arm, method=None, setting=None, chosen=None, in_table=True, in_sweep=False)
    for method in methods:
        point = chosen[method.name]
        for setting in dict.fromkeys((point.setting, *method.shown, *method.sweep)):
            yield _Entry(
                arm=method_arm(backbone, method, setting, max_new_tokens=limit),
                method=method,
                setting=setting,
                chosen=point if setting == point.setting else None,
                in_table=setting == point.setting or setting in method.shown,
                in_sweep=setting in method.sweep,
            )


def _measure(
    scorer: TaskScorer,
    samples: Sequence[Sample],
    columns: Sequence[Sequence[Answer]],
    decode: Callable[[Sequence[int]], str],
    n_blocks: int,
) -> list[dict[str, Any]]:
    """Per arm what its answers are worth and how many blocks they took; ``columns`` [A][N], arm 0 is the full model."""
    references, images = [sample.references for sample in samples], image_numbers(samples)
    found = []
    quality_full = 0.0
    for i, column in enumerate(columns):
        score = scorer.score([decode(answer.tokens) for answer in column], references)
        if i == 0:
            quality_full = score.quality
        n_tokens = sum(len(answer.tokens) for answer in column)
        mean_blocks = sum(answer.blocks for answer in column) / n_tokens
        same = [a.tokens == b.tokens for a, b in zip(column, columns[0], strict=True)]
        _, interval = mean_with_interval(score.per_sample, images)
        found.append(
            {
                "quality_name": scorer.task.quality_name,
                "quality": score.quality,
                "quality_interval": list(interval),
                "quality_full": quality_full,
                "agreement": float(np.mean(same)),
                "layer_ratio": n_blocks / mean_blocks,
                "mean_blocks": mean_blocks,
                "seconds_per_sample": sum(answer.seconds for answer in column) / len(column),
                "tokens_per_sample": n_tokens / len(column),
                "n": len(column),
            }
            | score.tokenizer
        )
    return found


def _described(
    entry: _Entry, task: str, costs: Mapping[str, Mapping[str, float | None]], min_quality: float
) -> dict[str, Any]:
    """What a row says of its method and setting."""
    method, setting = entry.method, entry.setting
    row: dict[str, Any] = {"task": task, "method": entry.arm.method, "threshold": entry.arm.threshold}
    free = {"training_seconds": 0.0, "training_flops_per_sample": 0.0}
    if method is None or setting is None:
        label = BASELINES[entry.arm.method]
        return row | free | {"label": label, "policy": "none", "setting": "", "trainable_parameters": 0, "note": ""}
    return (
        row
        | (free if method.trained is None else dict(costs[method.trained]))
        | {
            "label": method.label,
            "policy": method.policy,
            "setting": setting.text(method.bank),
            "exit_layers": [method.bank.exit_layers[i] for i in setting.used],
            "patience": setting.patience,
            "lossless": method.lossless,
            "state_propagation": method.state_propagation,
            "chosen": entry.chosen is not None,
            "calibration_quality_ratio": None if entry.chosen is None else entry.chosen.quality_ratio,
            "trainable_parameters": method.trainable_parameters,
            "note": method.note,
        }
    )


def _remark(entry: _Entry, min_quality: float) -> str:
    if entry.method is None:
        return ""
    if entry.chosen is None:
        return "not chosen, shown for comparison"
    if entry.chosen.keeps is None:
        return "never ran on calibration"
    return "" if entry.chosen.keeps else f"kept {min_quality:.0%} at no setting on calibration: its best"
