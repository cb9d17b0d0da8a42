#!/usr/bin/env python
"""How exits behave off the clean test split: noise, blur, thresholds carried elsewhere, calibration of confidences,
lengths.

Reads RUN/recipe.yaml and the exits of the run, decodes the recipe's evaluation samples clean and spoilt, and writes
RUN/robustness.json and RUN/traces.jsonl (every token with its exit, which launch/report.py shows), and plots. One
process; nothing is random but the noise, which follows --seed. Words after the run are recipe fields, such as
evaluation.max_samples=60."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

from free_dist.config import TASKS, ConfigError, UserError
from free_dist.recipe_io import add_device_arguments, fail_clearly, open_share, positive_integer
from free_dist.stopping import stop_clearly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run with exits, such as runs/quickstart")
    parser.add_argument("--exits", type=Path, metavar="DIR", help="an export to measure (default: the run's own)")
    parser.add_argument(
        "--noise", type=levels, default=None, metavar="STD,...",
        help="standard deviations of the noise, of a full range of 1 (default: 0.05,0.1,0.2)",
    )  # fmt: skip
    parser.add_argument(
        "--blur", type=levels, default=None, metavar="STD,...",
        help="standard deviations of the blur, of a shorter side of 1 (default: 0.01,0.02,0.04)",
    )  # fmt: skip
    parser.add_argument(
        "--thresholds", type=levels, metavar="THRESHOLD,...",
        help="confidence thresholds (default: those of the recipe's evaluation below 1)",
    )  # fmt: skip
    parser.add_argument(
        "--epsilon", type=open_share, default=0.05, help="loss that thresholds promise (default: %(default)s)"
    )
    parser.add_argument(
        "--delta", type=open_share, default=0.05, help="chance that they break it (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration-samples", type=positive_integer, metavar="N",
        help="samples per task that thresholds are chosen on (default: evaluation.max_samples)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add_device_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields")
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser), stop_clearly(at_once=True):
        run(arguments, command=shlex.join(["python", "launch/robustness.py", *sys.argv[1:]]))


def run(arguments: argparse.Namespace, *, command: str) -> None:
    """Measure, write the files and print the table."""
    from free_dist.evaluation.report_sources import RunDirectory

    directory = RunDirectory.open(arguments.run)
    recipe = directory.recipe(arguments.overrides)
    exports = {"exits": arguments.exits} if arguments.exits is not None else directory.exports()
    unknown = [name for name in recipe.evaluation.tasks if name not in TASKS]
    if unknown:
        raise ConfigError(f"evaluation.tasks: unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    thresholds = arguments.thresholds or [value for value in recipe.evaluation.thresholds if value < 1]
    if not thresholds:
        raise UserError("--thresholds: the recipe's evaluation.thresholds has none below 1; give some here")

    from transformers.utils.logging import disable_progress_bar

    from free_dist.data.pretrained import load_for_inference
    from free_dist.evaluation.report_costs import CostMeasure
    from free_dist.evaluation.report_figures import robustness_figures, save_pictures
    from free_dist.evaluation.report_traces import TRACES, traced, write_traces
    from free_dist.evaluation.robustness import (
        BLUR_LEVELS,
        NOISE_LEVELS,
        Corruption,
        length_rows,
        measure_corruptions,
        write_robustness,
    )
    from free_dist.evaluation.robustness_confidence import answer_transfer_rows, confidence_rows
    from free_dist.exits.export import load_exits
    from free_dist.training.runs import provenance

    disable_progress_bar()
    noise = NOISE_LEVELS if arguments.noise is None else arguments.noise
    blur = BLUR_LEVELS if arguments.blur is None else arguments.blur
    corruptions = [Corruption(kind="noise", level=level) for level in (0.0, *noise)]
    corruptions += [Corruption(kind="blur", level=level) for level in (0.0, *blur)]
    backbone, encoder = load_for_inference(recipe.backbone, device=arguments.device, dtype=arguments.dtype)
    banks = {method: load_exits(backbone, export) for method, export in exports.items()}
    first = next(iter(banks))
    rows, clean = measure_corruptions(
        backbone, encoder, banks, recipe, corruptions=corruptions, thresholds=thresholds, seed=arguments.seed
    )
    settings = recipe.evaluation
    calibration_samples = arguments.calibration_samples or settings.max_samples
    chances = {"calibration_samples": calibration_samples, "epsilon": arguments.epsilon, "delta": arguments.delta}
    ece, transfer = confidence_rows(backbone, encoder, banks, recipe, **chances)
    transfer += answer_transfer_rows(backbone, encoder, banks[first], recipe, clean, first, **chances)
    limit = recipe.decoding.max_new_tokens
    costs = CostMeasure(backbone=backbone, encoder=encoder, bank=banks[first], method=first, max_new_tokens=limit)
    about = {"provenance": provenance(), "recipe": asdict(replace(recipe, run_dir=str(arguments.run)))}
    content = {
        "format": 1,
        "command": command,
        **about,
        "settings": {"seed": arguments.seed, "exits": {name: str(path) for name, path in exports.items()}, **chances},
        "corruptions": rows,
        "transfer": transfer,
        "ece": ece,
        "length": length_rows(clean, eos_token_id=backbone.layout.eos_token_id),
        "costs": costs.rows(clean),
    }
    path = write_robustness(directory.path, content)
    traces = write_traces(
        directory.path / TRACES, traced(clean, encoder), n_blocks=backbone.n_blocks, command=command, extra=about
    )
    print(
        f"{'task':10}{'spoilt by':>10}{'level':>7}{'method':>10}{'threshold':>10}{'quality':>9}{'speed':>7}{'blocks':>8}"
    )
    for row in rows:
        threshold = "-" if row["threshold"] is None else f"{row['threshold']:g}"
        print(
            f"{row['task']:10}{row['kind']:>10}{row['level']:>7g}{row['method']:>10}{threshold:>10}{row['quality']:>9.3f}"
            f"{row['speed']:>7.2f}{row['mean_blocks']:>8.2f}"
        )
    plots = directory.path / "robustness_plots"
    plots.mkdir(exist_ok=True)
    pictures = save_pictures(robustness_figures(content, {}), plots)
    for written in (path, traces, *pictures):
        print(written)


def levels(text: str) -> list[float]:
    """Numbers from 0 up to and without 1, separated by commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: want numbers separated by commas") from error
    if not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: want numbers from 0 up to, and without, 1")
    return values


if __name__ == "__main__":
    main()
