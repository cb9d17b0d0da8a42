#!/usr/bin/env python
"""Stage 1: train parts of a backbone on task data and save it as a Hugging Face directory; an interrupted run goes on.

    deepspeed --num_gpus 2 launch/finetune.py --ds_config FILE --config RECIPE
    torchrun --nproc_per_node 2 launch/finetune.py --ds_config FILE --config RECIPE
    srun --ntasks 2 python launch/finetune.py --ds_config FILE --config RECIPE
    mpirun -n 2 python launch/finetune.py --ds_config FILE --config RECIPE
    python launch/finetune.py --config RECIPE

The one engine takes batch size, precision, ZeRO stage and gradient clipping from the section exits of --ds_config (a file
without sections is that section); learning rate and weight decay are the recipe's.  Without --ds_config: float32, ZeRO 1,
finetune.batch_size rows per step.  After SIGTERM or SIGUSR1 to any process all save and end with code 85, after Ctrl-C with 130.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from free_dist.config import DataConfig, Recipe
from free_dist.ds_config import read_ds_config, rows_per_step, with_rows_per_step
from free_dist.recipe_checks import check_rows_per_step
from free_dist.recipe_io import add_recipe_arguments, fail_clearly, load_recipe
from free_dist.stopping import stop_clearly
from free_dist.training.run_directory import CHECKPOINTS, left_nothing
from free_dist.training.stage1_run import check_run, engine_section, write_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ds_config", metavar="FILE", help="DeepSpeed JSON; see above and ds_configs/")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # passed by some launchers
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser), stop_clearly():
        recipe = load_recipe(arguments.config, arguments.overrides)
        ds_config = None if arguments.ds_config is None else read_ds_config(arguments.ds_config)
        run(recipe, ds_config)


def run(recipe: Recipe, ds_config: dict[str, dict[str, Any]] | None) -> None:
    """Train as the recipe says, or go on with it; raises Interrupted on all ranks when one was asked to stop."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from free_dist.distributed import distributed_session, settle_accelerator

    settle_accelerator()  # before what follows imports deepspeed
    from free_dist.data import easyvqa
    from free_dist.training.checkpoint_files import saved_rows_per_step
    from free_dist.training.finetune import finetune
    from free_dist.training.stage1_start import make_start, start_directory

    disable_progress_bar()
    with distributed_session(expected_world_size=recipe.training.expected_world_size) as world:
        if ds_config is not None:
            rows_before = saved_rows_per_step(Path(recipe.run_dir) / CHECKPOINTS)
            ds_config = with_rows_per_step(ds_config, rows_before, world.size)
        section = engine_section(recipe, ds_config, world.size)
        if told := left_nothing(lambda: check_run(recipe, section)):
            print(told, flush=True)
            return
        torch.distributed.barrier()  # nothing is written until every rank has looked
        processes = "1 process" if world.size == 1 else f"{world.size} processes"
        rows = rows_per_step({"exits": section}, world.size)
        if ds_config is None:
            check_rows_per_step(recipe, rows, "without --ds_config, finetune.batch_size", fields="finetune.batch_size")
        else:
            check_rows_per_step(recipe, rows, f"the distribution on {processes}")
        if world.is_main:
            print(f"{processes} on {world.device.type}, {rows} rows per step", flush=True)
            if recipe.data.root == DataConfig().root:
                easyvqa.prepare(Path(recipe.data.root))
            write_run(recipe, section)
            make_start(recipe)
        torch.distributed.barrier()  # the other ranks read what rank 0 has just made
        tell = functools.partial(print, flush=True) if world.is_main else lambda _line: None
        result = finetune(recipe, section, start_directory(recipe), world, tell)
        if world.is_main:
            print(f"saved: {result}")


if __name__ == "__main__":
    main()
