"""Placing exits on real models: record, search, and find what other placements would do.

Every placement, whether it was searched, named or drawn, gets its thresholds and its variant by the same search restricted to its
blocks, on the calibration split, and may switch exits off for a task; so placements differ in their blocks alone.  Each task has
thresholds of its own; all share the exits.  Does not know how banks are trained or results written.

Shape letters: K exits, L blocks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from free_dist.backbones import Blip2Backbone
from free_dist.config import Recipe, UserError
from free_dist.data.samples import SampleEncoder
from free_dist.decoding.generate import generate
from free_dist.evaluation.arms import ours
from free_dist.evaluation.benchmark import Prompted, wait_for_device
from free_dist.evaluation.calibration import EXIT_GRID, OFF, RecordingPolicy
from free_dist.evaluation.measure_costs import CostMeter
from free_dist.evaluation.operating_points import Model
from free_dist.evaluation.recording import RecordedAnswers, Timed, anchored_costs, calibration_samples, record_answers
from free_dist.exits import ExitBank
from free_dist.exits.export import load_exits
from free_dist.exits.gate import ExitChecks, FullHead
from free_dist.exits.placement import Choice, Placement, PlacementCosts, Table, best_set, on_set, search

Say = Callable[[str], None]
LEVELS = (*EXIT_GRID, 0.0)
"""Thresholds of an exit that the search tries; at 0 every token leaves."""
BOUNDS = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05)
"""Bounds on harm whose best sets are listed beside the one that was asked for."""
POSITIONS = (1, 2, 4, 8, 16, 32, 64)
"""New positions in a call at which blocks are timed."""
COST_SAMPLES = 20
"""Answers at full depth that are timed before each task is recorded, and as many samples of the pieces' times between them."""
HAND_PICKED = {"authors' paper": (3, 6, 9), "authors' code": (3, 5, 18, 21, 27)}
"""Layers of the 32 of OPT-2.7B, in arXiv 2506.06884 and in its public code."""
HAND_PICKED_OF = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is searched, and how much is measured; see the flags of launch/place_exits.py."""

    max_exits: int = 3
    max_parameters: float | None = None
    max_harm: float = 0.01
    min_speed: float | None = None
    harm: str = "agreement"
    record: int = 150
    random_sets: int = 20
    random_measured: int = 20
    samples: int = 100
    rounds: int = 2
    seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kind of exit, trained after all candidate blocks."""

    name: str
    bank: ExitBank
    """As it decodes."""
    parameters: Mapping[int, int]
    """Exit layer -> trainable parameters."""

    @classmethod
    def load(cls, name: str, backbone: Blip2Backbone, export: Path) -> Variant:
        """Raises what :func:`~free_dist.exits.export.load_exits` raises."""
        bank = load_exits(backbone, export)
        counts = dict(zip(bank.exit_layers, bank.parameters_per_exit, strict=True))
        return cls(name=name, bank=bank, parameters=counts)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A variant's exits on the calibration split."""

    variant: Variant
    answers: dict[str, RecordedAnswers]
    """By task."""
    costs: dict[str, PlacementCosts]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A set of exits of one variant, with thresholds for every task."""

    variant: Variant
    choice: Choice


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search found, and what it is compared with."""

    tasks: tuple[str, ...]
    chosen: Placed
    named: dict[str, Placed]
    drawn: dict[str, Placed]
    """Random sets, fastest first."""
    points: list[dict[str, Any]]
    bound: float
    search_seconds: float
    recorded: list[Recorded] = field(repr=False)


def record(
    backbone: Blip2Backbone, encoder: SampleEncoder, recipe: Recipe, variants: Sequence[Variant], settings: Settings, say: Say
) -> list[Recorded]:  # fmt: skip
    """Record every task of ``recipe.evaluation`` with every variant, and measure costs all along."""
    answers: list[dict[str, RecordedAnswers]] = [{} for _ in variants]
    meters = [
        CostMeter(
            backbone, v.bank, {"full": ExitChecks(FullHead(v.bank.lm_head))}, positions=POSITIONS,
            blocks_per_sample=backbone.n_blocks,
        )
        for v in variants
    ]  # fmt: skip
    for meter in meters:
        meter.sample()
        meter.forget()
    limit = recipe.decoding.max_new_tokens
    full = ours(backbone, method="full", max_new_tokens=limit)
    middle = [v.bank.exit_layers[len(v.bank.exit_layers) // 2] for v in variants]
    timed: list[dict[str, list[Timed]]] = [{} for _ in variants]
    for task in recipe.evaluation.tasks:
        samples = calibration_samples(recipe, task, settings.record)
        say(f"{task}: measuring costs")
        model = Model(backbone=backbone, encoder=encoder, bank=variants[0].bank, recipe=recipe)
        prompts = list(model.prompted(samples[:COST_SAMPLES]))
        full.split(prompts[0].pixel_values, prompts[0].prompt_ids, prompts[0].instruction)
        for prompt in prompts:
            split = full.split(prompt.pixel_values, prompt.prompt_ids, prompt.instruction)
            for variant, layer, meter, own in zip(variants, middle, meters, timed, strict=True):
                meter.sample()
                asked = asked_in_vain(backbone, variant.bank.subset((layer,)), prompt, limit)
                own.setdefault(task, []).append(Timed(split, asked))
        for variant, kept in zip(variants, answers, strict=True):
            say(
                f"{task}: recording {len(samples)} answers, {variant.name} exits after {len(variant.bank.exit_layers)} blocks"
            )
            kept[task] = record_answers(
                backbone, encoder, variant.bank, task, samples, max_new_tokens=limit,
                progress=lambda rows: tqdm(rows, unit="sample", mininterval=1.0),
            )  # fmt: skip
    found = []
    for variant, kept, meter, own, layer in zip(variants, answers, meters, timed, middle, strict=True):
        costs = anchored_costs(meter.costs(), kept, own, exit_layer=layer)
        found.append(Recorded(variant=variant, answers=kept, costs=costs))
    return found


@torch.inference_mode()
def asked_in_vain(backbone: Blip2Backbone, bank: ExitBank, prompt: Prompted, limit: int) -> float:
    """Seconds of an answer, without its vision tower, while the exits of ``bank`` are asked at every token and none emits."""
    prefix = backbone.encode_prefix(prompt.pixel_values, None, prompt.instruction)
    policy = RecordingPolicy((OFF,) * len(bank.exit_layers), emit=False)
    wait_for_device(prefix.device)
    start = time.perf_counter()
    generate(backbone, bank, None, prompt.prompt_ids, prefix=prefix, thresholds=policy, max_new_tokens=limit)
    wait_for_device(prefix.device)
    return time.perf_counter() - start


def search_all(recorded: list[Recorded], recipe: Recipe, settings: Settings, say: Say) -> Found:
    """The best set within the budget, the placements that it is compared with, and the best sets under other bounds on harm.

    Raises UserError where no placement is predicted to reach ``settings.min_speed``.
    """
    tasks = tuple(recorded[0].answers)
    bounds = sorted({*BOUNDS, settings.max_harm})
    started = time.perf_counter()
    tables = [_tables(one, bounds, settings, settings.max_exits) for one in recorded]
    points = []
    best: dict[int, Placed] = {}
    for h, bound in enumerate(bounds):
        for one, own in zip(recorded, tables, strict=True):
            for n_exits in range(1, settings.max_exits + 1):
                choice = best_set(
                    own, bound=h, max_exits=n_exits, max_parameters=settings.max_parameters,
                    parameters=one.variant.parameters,
                )  # fmt: skip
                points.append(_point(one.variant, choice, bound, tasks))
                if h not in best or choice.relative_seconds < best[h].choice.relative_seconds:
                    best[h] = Placed(variant=one.variant, choice=choice)
    h = bounds.index(settings.max_harm)
    if settings.min_speed is not None:
        fast = [i for i in range(len(bounds)) if 1 / best[i].choice.relative_seconds >= settings.min_speed]
        if not fast:
            most = max(1 / placed.choice.relative_seconds for placed in best.values())
            raise UserError(
                f"--min-speed {settings.min_speed}: the fastest placement with harm up to {bounds[-1]} is predicted at {most:.2f}"
            )
        h = fast[0]
    search_seconds = time.perf_counter() - started
    say(f"searched {sum(len(table) for own in tables for table in own)} sets in {search_seconds:.1f} s")
    blocks = recorded[0].answers[tasks[0]].recording().blocks
    n_blocks = recorded[0].answers[tasks[0]].n_blocks

    def restricted(layers: Sequence[int]) -> Placed:
        usable = [layer for layer in layers if layer in blocks]
        size = max(1, len(usable))
        choices = []
        for one in recorded:
            own, counts = _tables(one, bounds, settings, size, usable), one.variant.parameters
            if settings.max_parameters is None or sum(counts[layer] for layer in usable) <= settings.max_parameters:
                choice = on_set(own, usable, bound=h)._replace(layers=tuple(usable))
            else:  # what of it fits
                choice = best_set(
                    own, bound=h, max_exits=size, max_parameters=settings.max_parameters, parameters=counts
                )
            choices.append(Placed(variant=one.variant, choice=choice))
        return min(choices, key=lambda placed: placed.choice.relative_seconds)

    named = {}
    for name, layers in named_sets(n_blocks, settings.max_exits, recipe).items():
        if set(layers) & set(blocks):
            named[name] = restricted(layers)
        else:
            say(f"{name}: no exit before the last of {n_blocks} blocks, so it saves nothing and is left out")
    draw = random.Random(0)
    sets: set[tuple[int, ...]] = set()
    n_exits = min(settings.max_exits, len(blocks))
    for _ in range(100 * settings.random_sets):  # few candidates may have fewer sets than were asked for
        if len(sets) < settings.random_sets:
            sets.add(tuple(sorted(draw.sample(blocks, n_exits))))
    drawn = sorted((restricted(layers) for layers in sorted(sets)), key=lambda placed: placed.choice.relative_seconds)
    return Found(
        tasks=tasks, chosen=best[h], named=named, points=points, bound=bounds[h], search_seconds=search_seconds,
        drawn={f"random {number}": placed for number, placed in enumerate(drawn, start=1)}, recorded=recorded,
    )  # fmt: skip


def is_adversarial(recipe: Recipe, variant: str) -> bool:
    """Whether exits of a variant are trained against discriminators; classifiers have no features to judge."""
    return recipe.loss.adversarial_weight > 0 and variant != "classifier"


def named_sets(n_blocks: int, max_exits: int, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Placements that nobody searched for, by name: uniform ones, the authors' scaled to L blocks, and the recipe's own."""
    even = {max(1, _nearest(i * n_blocks / (max_exits + 1))) for i in range(1, max_exits + 1)}
    sets = {"uniform": tuple(sorted(even))}
    for name, layers in HAND_PICKED.items():
        scaled = sorted({max(1, _nearest(layer * n_blocks / HAND_PICKED_OF)) for layer in layers})
        sets[f"{name}, {list(layers)} of {HAND_PICKED_OF}"] = tuple(scaled)
    sets["recipe"] = tuple(recipe.exits.exit_layers)
    return sets


def add_retrained(
    found: Found, alone: Variant, backbone: Blip2Backbone, encoder: SampleEncoder, recipe: Recipe, settings: Settings, say: Say
) -> Found:  # fmt: skip
    """The set that was found as exits trained alone, thresholds chosen in the same way on recordings of their own."""
    (own,) = record(backbone, encoder, recipe, [alone], settings, say)
    bounds = sorted({*BOUNDS, settings.max_harm})
    tables = _tables(own, bounds, settings, len(found.chosen.choice.layers))
    choice = on_set(tables, found.chosen.choice.layers, bound=bounds.index(found.bound))
    placed = Placed(variant=alone, choice=choice._replace(layers=found.chosen.choice.layers))
    return replace(found, named=found.named | {"found, trained alone": placed})


def shared_thresholds(choice: Choice) -> tuple[float, ...]:
    """One threshold per layer of the choice: the highest of any recording's, ``OFF`` where any of them switches the exit off."""
    return tuple(
        max(values) for values in zip(*(set_thresholds(p, choice.layers) for p in choice.placements), strict=True)
    )


def _tables(
    one: Recorded, bounds: Sequence[float], settings: Settings, max_exits: int, layers: Sequence[int] | None = None
) -> list[Table]:
    found = []
    for task, answers in one.answers.items():
        recording = answers.recording(settings.harm)
        if layers is not None:
            recording = recording.only(layers)
        found.append(search(recording, one.costs[task], LEVELS, max_exits=max_exits, max_harm=bounds))
    return found


def set_thresholds(placement: Placement, layers: Sequence[int]) -> list[float]:
    """One threshold per layer, ``OFF`` where the placement does without it."""
    chosen = dict(zip(placement.layers, placement.thresholds, strict=True))
    return [chosen.get(layer, OFF) for layer in layers]


def _point(variant: Variant, choice: Choice, bound: float, tasks: Sequence[str]) -> dict[str, Any]:
    return {
        "variant": variant.name,
        "max_harm": bound,
        "layers": list(choice.layers),
        "thresholds": {
            task: set_thresholds(placement, choice.layers)
            for task, placement in zip(tasks, choice.placements, strict=True)
        },
        "parameters": sum(variant.parameters[layer] for layer in choice.layers),
        "predicted_shares": list(choice.shares),
        "harm": max(placement.harm for placement in choice.placements),
    }


def _nearest(value: float) -> int:
    """Halves go up."""
    return int(value + 0.5)
