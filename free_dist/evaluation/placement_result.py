"""What a placement search found, under the clock: full depth and every placement on the test split, as ``placement.json``.

Knows the search's outcome and how placements are timed; does not know how they were searched, trained or recorded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from free_dist.backbones import Blip2Backbone
from free_dist.config import Recipe
from free_dist.data.samples import SampleEncoder
from free_dist.evaluation.placement_benchmark import TaskMeasurement, measure_task, measured_columns
from free_dist.evaluation.placement_run import Found, Placed, Say, Settings, set_thresholds
from free_dist.exits.placement import PlacementCosts

LEAST_SAVING = 0.05
"""Predicted saving below which what is really saved is too noisy to correct it by."""
LARGEST_SCALE = 1.5
"""A correction and its inverse are no larger; more is noise."""
ANCHOR_SHARE = 0.1
"""Of the time for measuring, at most so much goes to each task's correction."""


def saving_scales(
    backbone: Blip2Backbone, encoder: SampleEncoder, recipe: Recipe, found: Found, settings: Settings, say: Say
) -> tuple[float, ...]:  # fmt: skip
    """Per task, what the found set really saves of full depth's time over what the costs say, on the recorded answers themselves.

    Costs are anchored on answers that no exit shortens; what a skipped block saves inside an answer is a few percent more or
    less than what a block takes alone.  Every placement's predicted saving is multiplied by it; the test split has no part in it.
    """
    scales = []
    for number, task in enumerate(found.tasks):
        expected = 1 - found.chosen.choice.shares[number]
        if expected < LEAST_SAVING:
            scales.append(1.0)
            continue
        say(f"{task}: timing what was found on the recorded answers")
        placements = {"found": (found.chosen.variant.bank, found.chosen.choice.placements[number])}
        timed = measure_task(
            backbone, encoder, recipe, task, placements, max_samples=settings.record, rounds=1, split="calibration",
            deadline=time.monotonic() + ANCHOR_SHARE * settings.seconds,
        )  # fmt: skip
        saved = 1 - sum(timed.placed["found"].seconds) / sum(timed.full.seconds)
        scales.append(min(LARGEST_SCALE, max(1 / LARGEST_SCALE, saved / expected)))
    return tuple(scales)


def measure(
    backbone: Blip2Backbone, encoder: SampleEncoder, recipe: Recipe, found: Found, settings: Settings, say: Say
) -> dict[str, Any]:  # fmt: skip
    """Everything of ``placement.json`` but where it comes from."""
    names = list(found.drawn)
    wanted = min(settings.random_measured, len(names))
    picked = {names[round(i * (len(names) - 1) / max(1, wanted - 1))] for i in range(wanted)}
    timed = {"found": found.chosen, **found.named, **{name: found.drawn[name] for name in names if name in picked}}
    measured: list[TaskMeasurement] = []
    ends = time.monotonic() + settings.seconds
    for number, task in enumerate(found.tasks):
        left = (ends - time.monotonic()) / (len(found.tasks) - number)
        say(f"{task}: measuring full depth and {len(timed)} placements, at most {left:.0f} s")
        placements = {name: (p.variant.bank, p.choice.placements[number]) for name, p in timed.items()}
        measured.append(
            measure_task(
                backbone, encoder, recipe, task, placements,
                max_samples=settings.samples, rounds=settings.rounds, deadline=time.monotonic() + left,
            )
        )  # fmt: skip

    scales = saving_scales(backbone, encoder, recipe, found, settings, say)

    def entries(numbers: Sequence[int]) -> dict[str, Any]:
        columns = {}
        for name, placed in ({"found": found.chosen} | found.named | found.drawn).items():
            columns[name] = _entry(placed, found, numbers, scales)
            if name in timed:
                columns[name] |= measured_columns([measured[i] for i in numbers], name, against="found")
        chosen = columns.pop("found")
        error = chosen["measured_speed"] / chosen["predicted_speed"] - 1
        return {"predicted": chosen, "measured": chosen, "baselines": columns, "prediction_error": error}

    rows = sorted(found.drawn.values(), key=lambda placed: placed.choice.relative_seconds)
    return entries(range(len(found.tasks))) | {
        "budget": {
            "max_exits": settings.max_exits, "max_parameters": settings.max_parameters, "min_speed": settings.min_speed,
            "max_harm": found.bound, "harm": settings.harm,
        },
        "search_seconds": found.search_seconds,
        "points": [
            {**point, "predicted_speed": _speed(point["predicted_shares"], scales)} for point in found.points
        ],
        "random_predicted_speeds": [_speed(placed.choice.shares, scales) for placed in rows],
        "saving_scales": dict(zip(found.tasks, scales, strict=True)),
        "note": (
            f"all {len(rows)} random sets are predicted, {len(picked)} measured (from the fastest to the slowest by the costs); "
            "every set's thresholds and variant come from the same search restricted to its blocks; several tasks count alike, "
            "each relative to its own full depth; a threshold above 1 switches an exit off"
        ),
        "costs": {one.variant.name: {task: _milliseconds(own) for task, own in one.costs.items()} for one in found.recorded},
        "tasks": {task: entries([i]) for i, task in enumerate(found.tasks)},
    }  # fmt: skip


def _speed(shares: Sequence[float], scales: Sequence[float]) -> float:
    """Predicted speed over full depth, every task counting alike.

    ``shares``: time over full depth's by the costs; a corrected one is never below half of it, so it stays above 0.
    """
    corrected = [max(share / 2, 1 - scale * (1 - share)) for share, scale in zip(shares, scales, strict=True)]
    return len(corrected) / sum(corrected)


def _entry(placed: Placed, found: Found, numbers: Sequence[int], scales: Sequence[float]) -> dict[str, Any]:
    """Prediction alone; ``numbers``: which tasks."""
    layers = placed.choice.layers
    own = [placed.choice.placements[i] for i in numbers]
    shares, scales = ([values[i] for i in numbers] for values in (placed.choice.shares, scales))
    thresholds = {found.tasks[i]: set_thresholds(placed.choice.placements[i], layers) for i in numbers}
    return {
        "layers": list(layers),
        "variant": placed.variant.name,
        "thresholds": thresholds if len(numbers) > 1 else thresholds[found.tasks[numbers[0]]],
        "parameters": sum(placed.variant.parameters[layer] for layer in layers),
        "predicted_speed": _speed(shares, scales),
        "predicted_harm": max(placement.harm for placement in own),
        "measured_speed": None,
        "measured_speed_interval": None,
        "quality": None,
        "quality_ratio": None,
        "n": 0,
    }


def _milliseconds(costs: PlacementCosts) -> dict[str, float]:
    """What the search took for granted, for whoever reads the file."""
    pieces = {"block": costs.block[1], "exit_transformer": costs.exit_transformer[1]}
    pieces |= {name: getattr(costs, name) for name in ("exit_head", "head", "token", "segment", "answer")}
    return {f"{name}_ms": 1e3 * float(seconds) for name, seconds in pieces.items()}
