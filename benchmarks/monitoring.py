#!/usr/bin/env python
"""What watching a run costs: the same adversarial steps with and without alarms, counts and speeds, in turns.

    python benchmarks/monitoring.py --data data/easyvqa

CPU time of this process, so that other programs hardly count; on a GPU, elapsed time.  Prints one JSON line: ``overhead``, the
share of a step that watching adds at --log_every steps a logged one, as the median over pairs of turns, with its 95% interval;
and ``own_share``, the time inside the watch's own code over that of the steps it watched, which noise hardly moves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from free_dist.config import DataConfig, Recipe, TrainingConfig
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import Batch, SampleEncoder
from free_dist.data.stream import training_batches
from free_dist.distributed import World, all_reduce_sum, distributed_session, seed_everything
from free_dist.engines import Engines, build_engines
from free_dist.evaluation.benchmark import median_with_interval
from free_dist.exits import ExitBank, FeatureClassifiers
from free_dist.monitor import Monitor
from free_dist.training.run_watch import RunWatch
from free_dist.training.step import adversarial_step
from free_dist.training.trainer import _scalars
from free_dist.watchdog import Watchdog


def main() -> None:
    """Read the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("data/easyvqa"), help="directory of shards; default: %(default)s"
    )
    parser.add_argument("--rows", type=int, default=8, help="rows of a step; default: %(default)s")
    parser.add_argument("--turns", type=int, default=24, help="turns of each kind; default: %(default)s")
    parser.add_argument("--log_every", type=int, default=10, help="steps of a turn, the last of them logged")
    arguments = parser.parse_args()
    with distributed_session() as world, tempfile.TemporaryDirectory() as run_dir:
        print(json.dumps(measure(arguments, Path(run_dir), world)))


def measure(arguments: argparse.Namespace, run_dir: Path, world: World) -> dict[str, Any]:
    """Time both kinds of turns."""
    recipe = Recipe(
        run_dir=str(run_dir),
        data=DataConfig(root=str(arguments.data), tasks={"vqa": 1.0}),
        training=TrainingConfig(max_steps=10**6, log_every=arguments.log_every),
    )
    engines, encoder, fixed = embedded_engines(recipe, rows=arguments.rows, batches=arguments.log_every, world=world)
    exit_layers = engines.exits.module.exit_layers
    clock = time.perf_counter if world.device.type == "cuda" else time.process_time
    seconds: dict[bool, list[float]] = {True: [], False: []}
    inside = []

    def step(*values: Any, **options: Any) -> dict[str, torch.Tensor]:
        """The step itself, whose time is not the watch's own."""
        start = clock()
        result = adversarial_step(*values, **options)
        inside.append(clock() - start)
        return result

    with Watchdog.of(recipe, world), Monitor(run_dir, total_steps=1, description="", enabled=True) as monitor:
        watch = RunWatch.of_exits(recipe, engines, world, monitor, eos_token_id=encoder.layout.eos_token_id)
        assert watch.health is not None
        measure_health, health_seconds, own = watch.health.measure, [0.0], 0.0

        def timed_health(*values: Any) -> dict[str, torch.Tensor]:
            start = clock()
            result = measure_health(*values)
            health_seconds.append(clock() - start)
            return result

        watch.health.measure = timed_health
        for turn in range(2 * arguments.turns + 2):
            watched = turn % 4 in (1, 2)  # each kind is first in every other pair
            began = clock()
            for number, batch in enumerate(fixed, 1):
                measured = number == len(fixed)
                start = clock()
                if watched:
                    batch = watch.next(iter([batch]))
                    report = watch.around(step, engines, batch, recipe.loss, measure=measured)
                    watch.step_done(number)
                    own += clock() - start - inside[-1]
                else:
                    report = adversarial_step(engines, batch, recipe.loss, measure=measured)
                monitor.advance(samples=arguments.rows)
            values = _scalars(report, exit_layers, engines, batch.task)
            start = clock()
            if watched:
                values |= watch.measured()
                own += clock() - start
            monitor.scalars(number, values, tokens=int(all_reduce_sum(torch.ones(()))))
            start = clock()
            if watched:
                watch.look(number, values)
                own += clock() - start
            if turn == 1:
                own, inside[:], health_seconds[:] = 0.0, [], []
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # the first turn of each kind warms up, and counts operations
                seconds[watched].append((clock() - began) / len(fixed))
    with_it, without = (statistics.median(seconds[watched]) for watched in (True, False))
    pairs = [watched / plain - 1 for watched, plain in zip(seconds[True], seconds[False], strict=True)]
    overhead, interval = median_with_interval(pairs)
    return {
        "own_share": (own + sum(health_seconds)) / (sum(inside) - sum(health_seconds)),
        "overhead": overhead,
        "overhead_interval": interval,
        "ms_per_step_watched": 1e3 * with_it,
        "ms_per_step_plain": 1e3 * without,
        "turns": arguments.turns,
        "rows": arguments.rows,
        "log_every": arguments.log_every,
        "device": world.device.type,
    }


def embedded_engines(
    recipe: Recipe, *, rows: int, batches: int, world: World
) -> tuple[Engines, SampleEncoder, list[Batch]]:
    """Untrained exits of the embedded backbone on three engines, and some batches of training data for them."""
    seed_everything(0)
    backbone, encoder = load_pretrained(recipe.backbone.path)
    bank = ExitBank(backbone, recipe.exits.exit_layers)
    classifiers = FeatureClassifiers(len(bank.exit_layers), backbone.hidden_size, 256)
    engines = build_engines(backbone, bank, classifiers, sections(rows), lambda step: 1.0)
    engines.exits.train()
    stream = training_batches(recipe.data, encoder, seed=0, micro_batch_size=rows)
    return engines, encoder, [next(stream).to(world.device) for _ in range(batches)]


def sections(rows: int) -> dict[str, dict[str, Any]]:
    """A distribution in memory."""
    base: dict[str, Any] = {"train_micro_batch_size_per_gpu": rows, "gradient_accumulation_steps": 1}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}
    trained = base | {"optimizer": optimizer, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}
    return {"backbone": base | {"zero_optimization": {"stage": 0}}, "exits": trained, "discriminators": trained}


if __name__ == "__main__":
    main()
