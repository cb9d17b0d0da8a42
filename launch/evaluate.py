#!/usr/bin/env python
"""Measure trained exits over a threshold sweep: quality, agreement, paired wall-clock; writes tables and plots to run_dir.

Without --exits it measures the backbone alone. --submission DIR also writes the files that the official servers take
(COCO, NoCaps, VQAv2, OK-VQA, GQA, VisDial); where answers are withheld (evaluation.split=withheld) nothing is scored.

Starts as plain `python` (one process, no DeepSpeed needed) or under `deepspeed`, `torchrun`, `srun` or `mpirun`, where samples
are shared out. A signal ends it at once, with code 85 after SIGTERM or SIGUSR1 and 130 after Ctrl-C; it keeps nothing.
One process takes as many threads as torch likes; OMP_NUM_THREADS sets it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from free_dist.config import WITHHELD, Recipe
from free_dist.launchers import is_launched
from free_dist.recipe_io import add_device_arguments, add_recipe_arguments, fail_clearly, load_recipe
from free_dist.stopping import stop_clearly

if TYPE_CHECKING:
    from free_dist.evaluation.report import ReportPaths
    from free_dist.evaluation.rows import About


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--exits", type=Path, metavar="DIR", help="exits.safetensors and exits.json (default: the backbone alone)"
    )
    parser.add_argument("--exits-ce", type=Path, metavar="DIR", help="exits trained without discriminators, to compare")
    parser.add_argument(
        "--submission", type=Path, metavar="DIR", help="write official submission files below DIR, one per decoder"
    )
    parser.add_argument(
        "--submission-questions",
        type=Path,
        metavar="FILE",
        help="official VQA questions to submit answers to, such as test-dev's, which are a part of test2015's; default: all",
    )
    add_device_arguments(parser)
    add_recipe_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    arguments = parser.parse_intermixed_args()
    given = {"exits": arguments.exits, "exits_ce": arguments.exits_ce}
    directories = {method: path for method, path in given.items() if path is not None}
    if arguments.submission_questions is not None and arguments.submission is None:
        parser.error("--submission-questions needs --submission DIR")
    submission = {"submission": arguments.submission, "submission_questions": arguments.submission_questions}
    with fail_clearly(parser), stop_clearly(at_once=True):
        recipe = load_recipe(arguments.config, arguments.overrides)
        if not is_launched(os.environ):
            paths = run(recipe, directories, device=arguments.device, dtype=arguments.dtype, **submission)
            if paths is not None:
                show(paths)
            return
        from free_dist.distributed import distributed_session

        with distributed_session() as world:
            paths = run(
                recipe, directories, rank=world.rank, world_size=world.size, device=str(world.device),
                dtype=arguments.dtype, **submission,
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
    submission: Path | None = None,
    submission_questions: Path | None = None,
) -> ReportPaths | None:
    """Evaluate the exits in ``directories`` (method name -> export) and let rank 0 write the report.

    ``labels``: method name -> what it is called in the plots' legends.  ``dtype``: of backbone and exits.  ``submission``: where
    files for official servers go; ``submission_questions``: an official file of the questions they answer.
    """
    from transformers.utils.logging import disable_progress_bar

    from free_dist.data.pretrained import load_for_inference
    from free_dist.data.shards import read_manifest
    from free_dist.distributed import all_gather
    from free_dist.evaluation.evaluate import evaluate_tasks
    from free_dist.evaluation.probe import probe_exits
    from free_dist.evaluation.ranking import rank_candidates
    from free_dist.evaluation.report import write_report
    from free_dist.evaluation.submission import check_submission, question_ids, write_submissions
    from free_dist.exits.export import load_exits
    from free_dist.monitor import log_pictures

    disable_progress_bar()
    dataset = None if submission is None else check_submission(recipe, part=submission_questions is not None)
    questions = None if submission_questions is None else question_ids(submission_questions)
    backbone, encoder = load_for_inference(recipe.backbone, device=device, dtype=dtype)
    banks = {method: load_exits(backbone, export) for method, export in directories.items()}
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size, "gather": all_gather}
    evaluations = evaluate_tasks(backbone, encoder, banks, recipe, **ranks)
    ranking = None
    if "dialogue" in recipe.evaluation.tasks:
        ranking = rank_candidates(backbone, encoder, banks, recipe, **ranks)
    # Where nothing is known to be right, no accuracy can be read from any block.
    probes = [] if recipe.evaluation.split == WITHHELD else probe_exits(backbone, encoder, banks, recipe, **ranks)
    if rank != 0:
        return None
    rows = [row for evaluation in evaluations for row in evaluation.rows]
    ranked = [] if ranking is None else ranking.rows()
    paths = write_report(rows, probes, recipe.run_dir, labels=labels, ranking=ranked, about=about(recipe))
    if submission is not None and dataset is not None:
        split = read_manifest(recipe.data.root, recipe.evaluation.split, timeout=recipe.data.read_timeout)
        paths.submissions.extend(
            write_submissions(submission, dataset, evaluations, ranking, questions=questions, records=split.samples)
        )
    log_pictures(Path(recipe.run_dir), paths.plots)
    return paths


def about(recipe: Recipe) -> About:
    """The command that this process was started by, the code and packages behind it, and the recipe."""
    import numpy

    from free_dist.evaluation.metrics_java import package_versions
    from free_dist.evaluation.rows import About
    from free_dist.training.runs import provenance

    words = [word for word in sys.argv if not word.startswith("--local_rank")]
    versions = provenance() | {"numpy": numpy.__version__} | package_versions()
    return About(command=shlex.join(["python", *words]), provenance=versions, recipe=asdict(recipe))


def show(paths: ReportPaths) -> None:
    """Print the table and where everything lies."""
    from free_dist.evaluation.report import terminal_metrics, terminal_table
    from free_dist.evaluation.rows import read_all_results

    results = read_all_results(paths.results)
    print(terminal_table(results.rows))
    print(terminal_metrics(results.rows, results.ranking))
    for path in (paths.results, paths.report, *paths.plots.values(), *paths.submissions):
        print(path)


if __name__ == "__main__":
    main()
