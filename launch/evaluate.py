#!/usr/bin/env python
"""Measure trained exits over a threshold sweep: quality, agreement, paired wall-clock; writes tables and plots to run_dir.

Without --exits it measures the backbone alone.

Starts as plain `python` (one process, no DeepSpeed needed) or under `deepspeed`, `torchrun`, `srun` or `mpirun`, where samples
are shared out. A signal ends it at once, with code 85 after SIGTERM or SIGUSR1 and 130 after Ctrl-C; it keeps nothing.
One process takes as many threads as torch likes; OMP_NUM_THREADS sets it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from free_dist.config import Recipe
from free_dist.launchers import is_launched
from free_dist.recipe_io import add_device_arguments, add_recipe_arguments, fail_clearly, load_recipe
from free_dist.stopping import stop_clearly

if TYPE_CHECKING:
    from free_dist.evaluation.report import ReportPaths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--exits", type=Path, metavar="DIR", help="exits.safetensors and exits.json (default: the backbone alone)"
    )
    parser.add_argument("--exits-ce", type=Path, metavar="DIR", help="exits trained without discriminators, to compare")
    add_device_arguments(parser)
    add_recipe_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    arguments = parser.parse_intermixed_args()
    given = {"exits": arguments.exits, "exits_ce": arguments.exits_ce}
    directories = {method: path for method, path in given.items() if path is not None}
    with fail_clearly(parser), stop_clearly(at_once=True):
        recipe = load_recipe(arguments.config, arguments.overrides)
        if not is_launched(os.environ):
            paths = run(recipe, directories, device=arguments.device, dtype=arguments.dtype)
            if paths is not None:
                show(paths)
            return
        from free_dist.distributed import distributed_session

        with distributed_session() as world:
            paths = run(
                recipe, directories, rank=world.rank, world_size=world.size, device=str(world.device),
                dtype=arguments.dtype,
            )  # fmt: skip
            if paths is not None:
                show(paths)


def run(
    recipe: Recipe,
    directories: dict[str, Path],
    *,
    labels: dict[str, str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
) -> ReportPaths | None:
    """Evaluate the exits in ``directories`` (method name -> export) and let rank 0 write the report.

    ``labels``: method name -> what it is called in the plots' legends.  ``dtype``: of backbone and exits.
    """
    from transformers.utils.logging import disable_progress_bar

    from free_dist.data.pretrained import load_for_inference
    from free_dist.distributed import all_gather
    from free_dist.evaluation.evaluate import evaluate_exits
    from free_dist.evaluation.probe import probe_exits
    from free_dist.evaluation.report import write_report
    from free_dist.exits.export import load_exits
    from free_dist.monitor import log_pictures

    disable_progress_bar()
    backbone, encoder = load_for_inference(recipe.backbone, device=device, dtype=dtype)
    banks = {method: load_exits(backbone, export) for method, export in directories.items()}
    rows = evaluate_exits(backbone, encoder, banks, recipe, rank=rank, world_size=world_size, gather=all_gather)
    probes = probe_exits(backbone, encoder, banks, recipe, rank=rank, world_size=world_size, gather=all_gather)
    if rank != 0:
        return None
    paths = write_report(rows, probes, recipe.run_dir, labels=labels)
    log_pictures(Path(recipe.run_dir), paths.plots)
    return paths


def show(paths: ReportPaths) -> None:
    """Print the table and where everything lies."""
    from free_dist.evaluation.report import terminal_table
    from free_dist.evaluation.rows import read_results

    print(terminal_table(read_results(paths.results)))
    for path in (paths.results, paths.report, *paths.plots.values()):
        print(path)


if __name__ == "__main__":
    main()
