#!/usr/bin/env python
"""Stage 2: train adversarial early exits on a frozen backbone with three DeepSpeed engines; an interrupted run goes on.

    deepspeed launch/train.py --ds_config ds_configs/cpu.json
    deepspeed --num_gpus 2 launch/train.py --ds_config ds_configs/cpu.json training.max_steps=100
    torchrun --nproc_per_node 2 launch/train.py --ds_config ds_configs/cpu.json
    srun --ntasks 2 python launch/train.py --ds_config ds_configs/cpu.json
    mpirun -n 2 python launch/train.py --ds_config ds_configs/cpu.json
    python launch/train.py --ds_config ds_configs/cpu.json

Without a GPU the deepspeed launcher starts one process unless --num_gpus names another number.
After SIGTERM or SIGUSR1 to any process all end together with code 85, after Ctrl-C with 130.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from free_dist.config import DataConfig, Recipe
from free_dist.ds_config import gradient_accumulation_steps, read_ds_config, rows_per_step, with_rows_per_step
from free_dist.recipe_checks import check_discriminator_steps, check_rows_per_step
from free_dist.recipe_io import add_recipe_arguments, fail_clearly, load_recipe, save_recipe
from free_dist.stopping import stop_clearly
from free_dist.training.run_directory import CHECKPOINTS, DISTRIBUTION, RECIPE, left_nothing
from free_dist.training.runs import check_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ds_config",
        required=True,
        metavar="FILE",
        help="how the run is distributed: DeepSpeed JSON with the sections "
        "backbone, exits and discriminators; see ds_configs/",
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # passed by some launchers
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser), stop_clearly():
        recipe = load_recipe(arguments.config, arguments.overrides)
        ds_config = read_ds_config(arguments.ds_config)
        run(recipe, ds_config, Path(arguments.ds_config))


def run(recipe: Recipe, ds_config: dict[str, dict[str, Any]], ds_config_path: Path) -> None:
    """Train as the recipe says, or go on with it; raises Interrupted on all ranks when one was asked to stop."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from free_dist.distributed import distributed_session, settle_accelerator

    settle_accelerator()  # before what follows imports deepspeed
    from free_dist.atomic import write_atomically
    from free_dist.data import easyvqa
    from free_dist.training.checkpoint_files import saved_rows_per_step
    from free_dist.training.trainer import train

    disable_progress_bar()
    run_dir = Path(recipe.run_dir)
    if told := left_nothing(lambda: check_run(recipe, ds_config)):
        print(told, flush=True)
        return
    with distributed_session(expected_world_size=recipe.training.expected_world_size) as world:
        processes = "1 process" if world.size == 1 else f"{world.size} processes"
        ds_config = with_rows_per_step(ds_config, saved_rows_per_step(run_dir / CHECKPOINTS), world.size)
        rows = rows_per_step(ds_config, world.size)
        check_rows_per_step(recipe, rows, f"{ds_config_path} on {processes}")
        check_discriminator_steps(recipe, gradient_accumulation_steps(ds_config), f"{ds_config_path} on {processes}")
        if world.is_main:
            print(
                f"{processes} on {world.device.type}, {rows} rows per step; deepspeed --num_gpus N starts N", flush=True
            )
            if recipe.data.root == DataConfig().root:
                easyvqa.prepare(Path(recipe.data.root))
            run_dir.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, run_dir / RECIPE)
            write_atomically(run_dir / DISTRIBUTION, ds_config_path.read_bytes())
        torch.distributed.barrier()  # the other ranks read the data that rank 0 has just prepared
        tell = functools.partial(print, flush=True) if world.is_main else lambda _line: None
        export = train(recipe, ds_config, world, tell)
        if world.is_main:
            print(f"exits in {export}, curves for TensorBoard in {run_dir}")


if __name__ == "__main__":
    main()
