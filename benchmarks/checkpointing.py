#!/usr/bin/env python
"""How long a checkpoint holds up training: in the background, beside a synchronous save of the same state.

    python benchmarks/checkpointing.py --data data/easyvqa

Turns of --steps adversarial steps with a save after the first, of each kind and of none, in one process.  Prints one JSON line:
``stall_ratio``, time for which the loop waits, in calls that save and before the next optimizer step, in the background over
synchronous, medians over turns; ``turn_ratio``, what a save adds to a whole turn, likewise, which also has what the writing
thread takes from training (on a free core, nothing); ``bytes_over_trained``, the checkpoint's bytes over those of what is
trained, weights and optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from monitoring import embedded_engines

from free_dist.config import DataConfig, LossConfig, Recipe, TrainingConfig
from free_dist.distributed import World, distributed_session
from free_dist.training.checkpoint import Checkpoints
from free_dist.training.checkpoint_state import EngineState
from free_dist.training.step import adversarial_step

KINDS = ("none", "background", "synchronous")


def main() -> None:
    """Read the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/easyvqa"), help="directory of shards")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step; default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn; default: %(default)s")
    parser.add_argument("--turns", type=int, default=15, help="turns of each kind; default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with distributed_session() as world, tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(arguments, Path(directory), world)))


def measure(arguments: argparse.Namespace, directory: Path, world: World) -> dict[str, Any]:
    """Time the three kinds of turns."""
    recipe = Recipe(data=DataConfig(root=str(arguments.data), tasks={"vqa": 1.0}), loss=LossConfig())
    engines, _, fixed = embedded_engines(recipe, rows=arguments.rows, batches=arguments.steps, world=world)
    assert engines.discriminators is not None
    trained = {"exits": engines.exits, "discriminators": engines.discriminators}
    savers = {
        kind: Checkpoints(
            directory / kind,
            trained,
            world=world,
            training=TrainingConfig(
                save_every=0 if kind == "none" else arguments.steps,
                save_in_background=kind == "background",
                keep_last=1,
                keep_best=0,
            ),
            rows_per_step=arguments.rows,
            tasks=recipe.data.tasks,
            backbone="",
            facts={"recipe": asdict(recipe)},
        )
        for kind in KINDS
    }
    stalls: dict[str, list[float]] = {kind: [] for kind in KINDS}
    turns: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(arguments.turns + 1):
        for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:
            began, stalled = time.perf_counter(), savers[kind].stalled
            for place, batch in enumerate(fixed):
                loss = adversarial_step(engines, batch, recipe.loss)["task_loss"].mean()
                savers[kind].after_step((turn + 1) * arguments.steps + place, loss, last=False)
            turns[kind].append(time.perf_counter() - began)
            stalls[kind].append(savers[kind].stalled - stalled)
            savers[kind].finish()  # what a short turn left to write
    stall_of, turn_of = ({kind: statistics.median(found[kind][1:]) for kind in KINDS} for found in (stalls, turns))
    size = sum(path.stat().st_size for path in (directory / "background").rglob("*") if path.is_file())
    state = sum(
        tensor.numel() * tensor.element_size()
        for name, engine in trained.items()
        for tensor in EngineState(name, engine).pieces().values()
    )
    return {
        "stall_ratio": stall_of["background"] / stall_of["synchronous"],
        "turn_ratio": (turn_of["background"] - turn_of["none"]) / (turn_of["synchronous"] - turn_of["none"]),
        "synchronous_over_step": stall_of["synchronous"] / (turn_of["none"] / arguments.steps),
        "bytes_over_trained": size / state,
        "turns": arguments.turns,
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
