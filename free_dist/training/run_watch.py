"""Watches a training run from inside its loop: alarms, steps that were skipped and why, speed, slow ranks.

Everything a loop has to say about its health goes through one object, a line at a time.  Knows what is measured, agreed among
ranks and logged; does not know when a measured value is a failure (``free_dist.training.alarms``), nor how a step is made.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from free_dist.config import Recipe, RunFailed
from free_dist.data.quarantine import QUARANTINE, lost_records
from free_dist.data.samples import Batch
from free_dist.distributed import World, all_gather, all_reduce_sum
from free_dist.engines import DeepSpeedEngine, Engines
from free_dist.flops import FlopMeter, measured_peak, peak_source
from free_dist.gradients import GradientNorms
from free_dist.monitor import Monitor
from free_dist.training.alarms import Alarm, AlarmRules, owner
from free_dist.training.exit_health import ExitHealth
from free_dist.training.frozen_weights import FrozenWeights
from free_dist.training.rank_clock import RankClock

T = TypeVar("T")

SAMPLES = ("samples/blocks_over_claimed", "samples/length_ratio", "samples/kv_drift", "samples/kv_drift_growth")
"""What rank 0 may learn from sample texts."""

NAMED = 8
"""Parameters or samples that a message names; the rest is counted."""


@dataclass(kw_only=True)
class _Watched:
    """What a run trains, as far as it is watched."""

    applied: Callable[[], bool]
    """Whether the last optimizer step moved the weights."""
    gradients: GradientNorms
    frozen: Mapping[str, nn.Module]
    timed: nn.Module
    """Module whose forward pass holds each rank's own work."""
    dtype: torch.dtype
    exit_layers: Sequence[int] = ()
    joint: bool = False
    """Whether the step itself closes the gradients' account (``joint_step``)."""


class RunWatch:
    """The health of one run; every rank has one and makes the same calls."""

    def __init__(
        self, recipe: Recipe, watched: _Watched, world: World, monitor: Monitor, *, health: ExitHealth | None = None
    ) -> None:
        """Use :meth:`of_exits` or :meth:`of_backbone`."""
        self._recipe, self._watched, self._world, self._monitor = recipe, watched, world, monitor
        watching = recipe.alarms.action != "off"
        self.health = health if watching else None
        """What measures exits at logged steps; None: nothing does."""
        total = recipe.training.max_steps
        self._rules = (
            AlarmRules(recipe.alarms, exit_layers=watched.exit_layers, total_steps=total) if watching else None
        )
        self._frozen = FrozenWeights(watched.frozen) if watching else None
        self._clock = RankClock(watched.timed, world)
        self._flops = FlopMeter()
        self._seen: set[str] = set()
        self._micro: list[tuple[Batch, Mapping[str, Tensor]]] = []
        self._skipped = self._in_a_row = 0
        self._sampled: dict[str, float] = {}
        self._since = time.perf_counter()
        self._raised: list[Alarm] = []
        given = recipe.training.peak_tflops
        self._peak = measured_peak(world.device, watched.dtype) if given is None else 1e12 * given
        monitor.text(0, "peak", f"{self._peak / 1e12:.3g} TFLOP/s, {peak_source(world.device, watched.dtype, given)}")

    @classmethod
    def of_exits(
        cls, recipe: Recipe, engines: Engines, world: World, monitor: Monitor, *, eos_token_id: int
    ) -> RunWatch:
        """A watch on stage 2."""
        watched = _Watched(
            applied=engines.exits.was_step_applied,
            gradients=engines.gradients,
            frozen={"backbone": engines.backbone, "exits": engines.exits.module},
            timed=engines.backbone,
            dtype=engines.dtype,
            exit_layers=engines.exits.module.exit_layers,
            joint=True,
        )
        health = ExitHealth(threshold=recipe.decoding.confidence_threshold, eos_token_id=eos_token_id)
        return cls(recipe, watched, world, monitor, health=health)

    @classmethod
    def of_backbone(cls, recipe: Recipe, engine: DeepSpeedEngine, world: World, monitor: Monitor) -> RunWatch:
        """A watch on stage 1."""
        watched = _Watched(
            applied=engine.was_step_applied,
            gradients=GradientNorms({"backbone": engine.module}, world.device),
            frozen={"backbone": engine.module},
            timed=engine.module,
            dtype=next(engine.module.parameters()).dtype,
        )
        return cls(recipe, watched, world, monitor)

    @property
    def stopped(self) -> bool:
        """Whether an alarm asks for the run's end; the same on every rank."""
        return bool(self._raised) and self._recipe.alarms.action == "stop"

    def next(self, batches: Iterator[T]) -> T:
        """The next of ``batches``; the time is booked as waiting for data."""
        return self._clock.next(batches)

    def around(
        self,
        step: Callable[..., dict[str, Tensor]],
        engines: Engines,
        batch: Batch,
        *arguments: Any,
        measure: bool,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Call ``step(engines, batch, *arguments, measure=, health=, **options)`` on one micro-batch; return its report."""
        # A measured step does more than train; it is counted only where every step is one.
        count = not self._flops.knows(batch.task) and (not measure or batch.task in self._seen)
        self._seen.add(batch.task)
        positions = batch.input_ids.numel()
        health = self.health if measure else None
        if count:
            with self._flops.counting(batch.task, positions):
                report = step(engines, batch, *arguments, measure=measure, health=health, **options)
        else:
            report = step(engines, batch, *arguments, measure=measure, health=health, **options)
        self._flops.add(batch.task, positions)
        self._micro.append((batch, report))
        return report

    def saw(self, batches: Sequence[Batch]) -> None:
        """The micro-batches of a step that did not go through :meth:`around`."""
        self._micro = [(batch, {}) for batch in batches]

    def step_done(self, step: int) -> None:
        """After an optimizer step: say on all ranks why it was skipped, if it was.

        Raises RunFailed after ``training.max_skipped_in_a_row`` steps in a row that were.
        """
        micro, self._micro = self._micro, []
        if not self._watched.joint:
            self._watched.gradients.close_step()
        if self._watched.applied():
            self._in_a_row = 0
            return
        self._skipped += 1
        self._in_a_row += 1
        found = [line for part in all_gather(self._why_skipped(micro)) for line in part]
        message = f"step {step} skipped on all ranks: " + ("; ".join(found) or "the global gradient norm is not finite")
        self._event(step, "skipped_step", message)
        limit = self._recipe.training.max_skipped_in_a_row
        if self._in_a_row > limit:
            raise RunFailed(
                f"{self._in_a_row} steps in a row were skipped, more than training.max_skipped_in_a_row={limit}; the last: "
                f"{message}. Lower the learning rates in --ds_config, look at the named samples, or train in float32"
            )

    def measured(self) -> dict[str, float]:
        """Values to log beside those of the step; all ranks call it at every logged step."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        sums = torch.tensor([self._flops.take(), self._peak], dtype=torch.float64, device=self._world.device)
        flops, peak = all_reduce_sum(sums).tolist()
        values = self._clock.read()
        if flops:
            values |= {"throughput/tflops": flops / seconds / 1e12, "throughput/mfu": flops / seconds / peak}
        values["skipped/steps"] = float(self._skipped)
        values["skipped/samples"] = float(lost_records(Path(self._recipe.run_dir) / QUARANTINE))
        sampled = torch.tensor(
            [self._sampled.get(name, float("nan")) for name in SAMPLES], dtype=torch.float64, device=self._world.device
        )
        known = sampled.isfinite() if self._world.is_main else torch.zeros_like(sampled, dtype=torch.bool)
        pair = all_reduce_sum(torch.stack([torch.where(known, sampled, 0.0), known.double()])).tolist()
        self._sampled.clear()
        return values | {name: value for name, value, told in zip(SAMPLES, *pair, strict=True) if told}

    def sampled(self, values: Mapping[str, float]) -> None:
        """What sample texts told rank 0 (names of SAMPLES); logged and judged at the next logged step."""
        self._sampled |= values

    def look(self, step: int, values: Mapping[str, float], *, last: bool = False) -> None:
        """Raise the alarms that logged values give; all ranks call it.  ``last``: look at every frozen weight."""
        if self._rules is None or self._frozen is None:
            return
        changed = self._frozen.look_at_all() if last else self._frozen.look()
        gradients = self._watched.gradients
        still = torch.tensor([float(len(changed))], device=self._world.device)
        agreed = all_reduce_sum(torch.cat([gradients.last, still]))
        if agreed[-1] > 0:
            changed = sorted({name for part in all_gather(changed) for name in part})
        unmoved = [name for name, total in zip(gradients.names, agreed.tolist(), strict=False) if total == 0]
        for alarm in self._rules.look(step, values, unmoved=unmoved, changed=changed):
            self._raised.append(alarm)
            self._event(step, alarm.name, alarm.message)

    def raise_if_stopped(self, saved: Path) -> None:
        """Raise RunFailed if an alarm asked for the end; ``saved`` is where the work was put."""
        if self.stopped:
            alarm = self._raised[0]
            raise RunFailed(
                f"alarms.action=stop: {alarm.name} at step {alarm.step}: {alarm.message}. What was learnt is in {saved}"
            )

    def _event(self, step: int, name: str, message: str) -> None:
        self._monitor.event(step, name, message)
        if self._world.is_main:
            sys.stderr.write(f"{name} at step {step}: {message}\n")
            sys.stderr.flush()

    def _why_skipped(self, micro: Sequence[tuple[Batch, Mapping[str, Tensor]]]) -> list[str]:
        """What was not finite on this rank, one line: engines, exits and samples; empty if all was."""
        parts, suspects = [], []
        layers = self._watched.exit_layers
        for batch, report in micro:
            bad = {
                f"{name} of exit {k}"
                for name in ("task_loss", "g_loss", "d_loss")
                if name in report
                for k, value in zip(layers, report[name].tolist(), strict=True)
                if not math.isfinite(value)
            }
            parts += sorted(bad)
            spoilt = [
                key
                for key, image in zip(batch.keys, batch.image_index.tolist(), strict=True)
                if not torch.isfinite(batch.pixel_values[image]).all()
            ]
            if spoilt:
                parts.append("pixels")
            if spoilt or bad:
                suspects += spoilt or list(batch.keys)
        parts += _by_engine(self._watched.gradients.not_finite(), layers)
        if not parts:
            return []
        suspects = suspects or [key for batch, _ in micro for key in batch.keys]
        return [f"rank {self._world.rank}: not finite: {', '.join(dict.fromkeys(parts))}; samples {_listed(suspects)}"]


def _by_engine(names: Sequence[str], exit_layers: Sequence[int]) -> list[str]:
    """Names of gradients, ``exits: transformers.1.fc1.weight``, told by engine and exit with a few examples each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(f"gradients of {owner(name, exit_layers)}", []).append(name.partition(": ")[2])
    return [
        f"{group} ({found[0]}{f' and {len(found) - 1} more' * (len(found) > 1)})" for group, found in groups.items()
    ]


def _listed(keys: Sequence[str]) -> str:
    return " ".join(keys[:NAMED]) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")
