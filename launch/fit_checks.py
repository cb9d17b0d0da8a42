#!/usr/bin/env python
"""Fit cheap checks to trained exits, on the training split; writes checks.safetensors and checks.json beside them.

Prints what gates, discriminators and smaller heads do, alone and together, on training images that they were not fitted to.
Block counts are weights read under teacher forcing, not times: launch/benchmark.py has the clock. Numbers differ from decoding
where an early token changes the answer.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from free_dist.config import ConfigError, MissingFileError, Recipe
from free_dist.recipe_io import add_device_argument, add_recipe_arguments, fail_clearly, load_recipe

if TYPE_CHECKING:
    from free_dist.exits.check_files import FittedChecks
    from free_dist.exits.check_replay import CheckReport

SETTINGS = (
    "full",
    "gate+full",
    "discriminator+full",
    "pruned",
    "low_rank",
    "gate+pruned",
    "gate+low_rank",
    "gate+discriminator+pruned",
)
"""Rows of the printed table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exits", type=Path, required=True, metavar="DIR", help="exits.safetensors and exits.json")
    parser.add_argument("--samples", type=int, default=600, help="training samples per task (default: %(default)s)")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="CONFIDENCE",
        help="of every exit, for which gates are fitted; default: as exported",
    )
    parser.add_argument(
        "--recall", type=float, default=0.98, help="share of right emissions let through (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=256, help="largest rank of the screen (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the gates (default: %(default)s)")
    add_device_argument(parser)
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        recipe = load_recipe(arguments.config, arguments.overrides)
        if not arguments.exits.is_dir():
            raise MissingFileError(f"--exits {arguments.exits}: no such directory")
        if arguments.samples < 1:
            raise ConfigError(f"--samples {arguments.samples}: want at least 1")
        if arguments.threshold is not None and not 0 <= arguments.threshold < 1:
            raise ConfigError(f"--threshold {arguments.threshold}: want at least 0 and below 1, where exits emit")
        run(recipe, arguments)


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Collect rows, fit, save, print."""
    from transformers.utils.logging import disable_progress_bar

    from free_dist.data.pretrained import load_for_inference
    from free_dist.exits.check_files import MANIFEST, WEIGHTS, save_checks
    from free_dist.exits.check_fitting import CHOOSE, MEASURE, FitSettings, fit_checks
    from free_dist.exits.check_replay import ask_all, measure, with_positions
    from free_dist.exits.export import load_exits, read_exits_manifest
    from free_dist.training.check_rows import collect_rows, training_token_counts

    disable_progress_bar()
    settings = FitSettings(
        recall=arguments.recall, rank=arguments.rank, steps=arguments.steps, seed=recipe.training.seed
    )
    exported = read_exits_manifest(arguments.exits).thresholds
    thresholds = exported if arguments.threshold is None else (arguments.threshold,) * len(exported)
    backbone, encoder = load_for_inference(recipe.backbone, device=arguments.device)
    bank = load_exits(backbone, arguments.exits)
    counts = training_token_counts(recipe.data, encoder, backbone.vocab_size)
    rows = collect_rows(
        backbone, encoder, bank, recipe.data, samples_per_task=arguments.samples, seed=recipe.training.seed
    )
    backbone.to("cpu")
    bank.to("cpu")

    fitted = fit_checks(
        rows, bank, thresholds=thresholds, token_counts=counts, eos=backbone.layout.eos_token_id, settings=settings
    )
    chosen, held_out = rows.part(CHOOSE), rows.part(MEASURE)
    fitted = with_positions(
        fitted,
        ask_all(bank, fitted, chosen, backbone),
        chosen,
        exit_layers=bank.exit_layers,
        n_blocks=backbone.n_blocks,
        n_positions=settings.n_positions,
    )
    report = measure(fitted, bank, backbone, held_out)
    extra = {
        "data": recipe.data.root,
        "tasks": recipe.data.tasks,
        "samples_per_task": arguments.samples,
        "settings": asdict(settings),
        "held_out": asdict(report),
    }
    save_checks(arguments.exits, fitted, extra)
    print(f"{len(rows.parts)} answer tokens of the training split, {report.rows} of them held out for this table\n")
    show(report, fitted)
    print(f"\n{arguments.exits / WEIGHTS}\n{arguments.exits / MANIFEST}")


def show(report: CheckReport, fitted: FittedChecks) -> None:
    """Print gates, heads, and outcomes alone and together."""
    print(f"{'':14} {'exit':>4} {'emits rightly':>14} {'let through':>12} {'recall':>7} {'precision':>10}")
    for name, entries in (("gate", report.gates), ("discriminator", report.discriminators)):
        for one in entries:
            cells = f"{one.rate:14.3f} {one.passed:12.3f} {one.recall:7.3f} {one.precision:10.3f}"
            print(f"{name:14} {one.exit_layer:4} {cells}")
    print("\npruned head, rows: share of the full model's tokens that it holds")
    print("  " + "   ".join(f"{size}: {share:.4f}" for size, share in report.coverage.items()))
    print(f"  as fitted: {fitted.pruned_size} rows")
    print("low-rank screen, rank: share of exit features read as the full head reads them")
    print("  " + "   ".join(f"{rank}: {share:.4f}" for rank, share in report.screen.items()))
    print(f"  as fitted: rank {fitted.screen_rank}")
    columns = f"{'emitted':>8} {'agree':>7} {'blocks':>7} {'+ checks':>9} {'= total':>8} {'fruitless visit':>16}"
    print(f"\n{'asked':10} {'checks':26} {columns}")
    for asked, outcomes in (("everywhere", report.everywhere), ("if it pays", report.where_it_pays)):
        for name in SETTINGS:
            result = outcomes[name]
            cells = f"{result.emitted:8.3f} {result.agreement:7.4f} {result.backbone_blocks:7.2f}"
            cells += f" {result.check_blocks:9.2f} {result.total_blocks:8.2f} {result.fruitless_visit:16.2f}"
            print(f"{asked:10} {name:26} {cells}")


if __name__ == "__main__":
    main()
