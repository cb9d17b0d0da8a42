#!/usr/bin/env python
"""Time every decoder on the same samples, interleaved: full depth (ours, Hugging Face, compiled, int8), exits, lossless.

`--preset embedded` measures trained exits on the embedded backbone: thresholds are chosen on the calibration split and
reported on the test split; `--preset smollm2` does so on the backbone of launch/recipes/smollm2.yaml. `--preset
opt-2.7b-shape` measures the mechanism on random bfloat16 weights of BLIP-2 OPT-2.7B's shapes, with a scripted exit
distribution, against the cost model; it needs 9 GB of memory. The last line is one JSON object. The number of threads is
torch's own choice; OMP_NUM_THREADS sets it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from free_dist.config import EXIT_VARIANTS, RUNNERS, TASKS, MissingFileError, UserError
from free_dist.recipe_io import add_device_arguments, fail_clearly, load_recipe

if TYPE_CHECKING:
    from free_dist.backbones import Backbone
    from free_dist.exits import ExitBank
    from free_dist.exits.gate import ExitChecks

TRAINED = {
    "embedded": (None, Path("runs/quickstart/exits/export")),
    "smollm2": (Path(__file__).parent / "recipes" / "smollm2.yaml", Path("runs/smollm2/export")),
}
"""Presets with trained exits: recipe (None: the defaults), and where training leaves the exits."""
SHAPE_EXITS = (6, 12, 18)
"""Blocks that the exits of the shape preset follow."""
DISTRIBUTIONS = {
    "mostly shallow": {6: 0.8, 12: 0.1, 18: 0.05},
    "mixed": {6: 0.5, 12: 0.2, 18: 0.1},
    "mostly full depth": {6: 0.2, 12: 0.1, 18: 0.1},
}
"""Share of tokens per exit layer; the rest goes to full depth."""
QUICK_SECONDS = 45.0
"""What --quick plans with after loading, unless --seconds says so; the last answers of every part come on top."""
TIME_WEIGHTS = {"vqa": 1.0, "caption": 2.0, "dialogue": 1.0}
"""Shares of the time; captions are long."""
FALSE_OPEN = 0.2
"""Share of fruitless visits that a gate lets through, where no fitted gate tells."""
MIN_QUALITY = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=(*TRAINED, "opt-2.7b-shape"), required=True)
    parser.add_argument(
        "--quick", action="store_true", help="fewer samples, no compiling: about a minute after loading"
    )
    parser.add_argument(
        "--exits", type=Path, metavar="DIR", help="trained exits (default: those of the quickstart, or of the recipe)"
    )
    parser.add_argument("--tasks", type=tasks, default=TASKS, metavar="TASK,...", help="default: all of %(default)s")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out Hugging Face compiled, which takes minutes"
    )
    parser.add_argument(
        "--runner",
        choices=RUNNERS,
        help="trained exits: also decode through a runner of fixed shapes; compiling takes minutes",
    )
    parser.add_argument(
        "--vision", action="store_true", help="shape preset: also build and time the vision tower (2 GB)"
    )
    parser.add_argument(
        "--variant",
        choices=EXIT_VARIANTS,
        default="full",
        help="shape preset: kind of exits; a merged lora decodes as full does (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=QUICK_SECONDS, help="time that --quick plans with (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, help="answers per decoder and sample (default: 2; --quick 1)")
    parser.add_argument(
        "--tokens", type=int, default=16, help="shape preset: timed tokens per answer (default: %(default)s)"
    )
    parser.add_argument(
        "--false-open",
        type=float,
        default=FALSE_OPEN,
        metavar="SHARE",
        help="shape preset: share of fruitless visits that a gate lets through (default: %(default)s)",
    )
    add_device_arguments(parser)
    parser.add_argument("--save-costs", type=Path, metavar="FILE", help="write the measured costs for launch/plan.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields, such as data.root=DIR")
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        for name in ("rounds", "tokens"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: want at least 1")
        if not 20 <= arguments.seconds < math.inf:
            raise UserError(f"--seconds {arguments.seconds}: want at least 20")
        if not 0 <= arguments.false_open <= 1:
            raise UserError(f"--false-open {arguments.false_open}: want a share from 0 to 1")
        result = trained(arguments) if arguments.preset in TRAINED else shape(arguments)
    print(json.dumps({"preset": arguments.preset} | result))


def trained(arguments: argparse.Namespace) -> dict[str, Any]:
    """All tasks with trained exits."""
    config, exits = TRAINED[arguments.preset]
    exits = arguments.exits or exits
    if not (exits / "exits.json").is_file():
        raise MissingFileError(
            f"--exits {exits}: no trained exits there; run `make quickstart`, or train some with launch/train.py and "
            "give their export directory"
        )
    recipe = load_recipe(config, arguments.overrides)

    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from free_dist.data.pretrained import load_for_inference
    from free_dist.decoding.runners import make_runner
    from free_dist.evaluation.cost_model import ExitSetting, save_costs, visit_cost
    from free_dist.evaluation.int8 import int8_copy
    from free_dist.evaluation.measure_costs import CostMeter
    from free_dist.evaluation.operating_points import Model, Runners
    from free_dist.evaluation.shape import random_checks
    from free_dist.evaluation.task_benchmark import QUICK, Amounts, benchmark_task
    from free_dist.exits.export import load_exits

    disable_progress_bar()
    set_verbosity_error()  # it warns of forced lengths at every answer
    backbone, encoder = load_for_inference(recipe.backbone, device=arguments.device, dtype=arguments.dtype)
    bank = load_exits(backbone, exits)
    amounts = QUICK if arguments.quick else Amounts()
    ends = time.monotonic() + arguments.seconds
    changes: dict[str, Any] = {"compiled": amounts.compiled and not arguments.no_compile}
    if arguments.rounds is not None:
        changes["rounds"] = arguments.rounds
    amounts = replace(amounts, **changes)
    checks, false_open = fitted_checks(exits, backbone, bank)
    int8 = None if arguments.quick else int8_copy(backbone)
    runners = None
    if arguments.runner is not None:
        name = arguments.runner
        runners = Runners(full=make_runner(name, backbone), exits=make_runner(name, backbone, bank))
    model = Model(
        backbone=backbone, encoder=encoder, bank=bank, recipe=recipe, checks=checks, int8=int8, runners=runners
    )
    size = max(8, backbone.vocab_size // 12)  # the share that 4,096 rows are of OPT's vocabulary
    full = random_checks(backbone, bank, "full", gate=False, size=0)
    cheap = checks or random_checks(backbone, bank, "pruned", gate=True, size=size)
    meter = CostMeter(
        backbone,
        bank,
        {"full": full, "pruned": cheap},
        gated=cheap,
        positions=(1, 2, 4, 8, 16, 32),
        blocks_per_sample=backbone.n_blocks,
    )
    results = []
    weight = sum(TIME_WEIGHTS[task] for task in arguments.tasks)
    for task in arguments.tasks:
        # Costs are sampled all along the run, like everything they are compared with.
        for _ in range(10):
            meter.sample()
        if amounts.seconds is not None:
            amounts = replace(amounts, seconds=(ends - time.monotonic()) * TIME_WEIGHTS[task] / weight)
            weight -= TIME_WEIGHTS[task]
        results.append(benchmark_task(model, task, amounts, meter.costs(), min_quality=MIN_QUALITY, progress=_progress))
        _print_rows(results[-1].arms)
    costs = meter.costs(f"{arguments.preset}, {torch.get_num_threads()} threads")
    if arguments.save_costs is not None:
        save_costs(costs, arguments.save_costs)
    by_quality = sorted(results, key=lambda r: r.lossy["quality_ratio"] or 0)
    good = [r for r in results if (r.lossy["quality_ratio"] or 0) >= MIN_QUALITY] or by_quality[-1:]
    exact = [r for r in results if r.lossless["identical"] == r.lossless["samples"]] or results
    setting = ExitSetting(layers=bank.exit_layers, head="pruned", gate=True, false_open=false_open)
    return {
        "lossy": max((r.lossy for r in good), key=lambda row: row["speedup"]),
        "lossless": max((r.lossless for r in exact), key=lambda row: row["speedup"]),
        "batch8_ratio": min(r.batch8_ratio for r in results),
        "batch8_ratio_chosen": min(r.batch8_ratio_chosen for r in results),
        "check_blocks": visit_cost(costs, setting),
        "check_blocks_plain": visit_cost(costs, ExitSetting(layers=bank.exit_layers)),
        "false_open": false_open,
        "cost_model_error": max((r.cost_model_error for r in results), key=abs),
        "threads": torch.get_num_threads(),
        "per_task": [{"lossy": r.lossy, "lossless": r.lossless} for r in results],
        "arms": [row for r in results for row in r.arms],
    }


def fitted_checks(directory: Path, backbone: Backbone, bank: ExitBank) -> tuple[ExitChecks | None, float]:
    """Gate and pruned head beside the exits, and the share of fruitless visits the gate lets through on held-out rows."""
    from free_dist.exits.check_files import MANIFEST, load_checks, read_checks_manifest
    from free_dist.exits.gate import CheckOptions

    if not (directory / MANIFEST).is_file():
        return None, FALSE_OPEN
    options = CheckOptions(gate=True, head="pruned")
    checks = load_checks(directory, backbone, bank, options)
    fruitless = read_checks_manifest(directory).extra["held_out"]["everywhere"][options.setting]["fruitless_visit"]
    weights = checks.costs(backbone, bank.transformers[0])
    return checks, (fruitless - weights.gate) / (weights.exit_transformer + weights.head)


def shape(arguments: argparse.Namespace) -> dict[str, Any]:
    """Scripted exits on random weights of OPT-2.7B's shapes."""
    import torch

    from free_dist.evaluation.cost_model import save_costs
    from free_dist.evaluation.int8 import int8_copy
    from free_dist.evaluation.shape import OPT_2_7B, random_backbone
    from free_dist.evaluation.shape_benchmark import ShapePlan, run_shape, vision_seconds
    from free_dist.exits import ExitBank

    quick = arguments.quick
    # Reading 40 positions takes as long as decoding 40 tokens on a CPU without bfloat16 units; their number matters little here.
    sizes = replace(OPT_2_7B, n_queries=2) if quick else OPT_2_7B
    _progress("building")
    backbone = random_backbone(sizes, dtype=torch.bfloat16, vision=arguments.vision)
    bank = ExitBank(backbone, SHAPE_EXITS, variant=arguments.variant).merged().eval().requires_grad_(False)
    plan = ShapePlan(
        distributions=DISTRIBUTIONS,
        false_open=arguments.false_open,
        tokens=min(arguments.tokens, 8) if quick else arguments.tokens,
        prompt=sizes.n_queries + (2 if quick else 8),
        rounds=1 if quick else arguments.rounds or 2,
        plain=not quick,
        seconds=arguments.seconds - 10 if quick else None,
        blocks_per_sample=2 if quick else 4,
        positions=(1, 2, 4, 8) if quick else (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    )
    result = run_shape(backbone, bank, plan, int8=None if quick else int8_copy(backbone), progress=_progress)
    if arguments.save_costs is not None:
        save_costs(result.costs, arguments.save_costs)
    for row in result.arms:
        predicted = "" if row["predicted_speedup"] is None else f"{row['predicted_speedup']:8.2f}{row['error']:+8.1%}"
        print(f"{row['name']:<34}{1e3 * row['seconds_per_token']:9.1f} ms/token{row['speedup']:8.2f}{predicted}")
    exits = [row for row in result.arms if row["predicted_speedup"] is not None]
    best = max(exits, key=lambda row: row["speedup"])
    return {
        "lossy": {
            "speedup": best["speedup"],
            "quality_ratio": None,
            "threshold": None,
            "distribution": best["name"],
        },
        "lossless": {"speedup": None, "identical": None, "samples": 0},
        "batch8_ratio": None,
        "variant": arguments.variant,
        "check_blocks": result.check_blocks,
        "check_blocks_plain": result.check_blocks_plain,
        "cost_model_error": result.cost_model_error,
        "false_open": plan.false_open,
        "mechanism_overhead": result.mechanism_overhead,
        "vision_seconds": vision_seconds(backbone) if arguments.vision else None,
        "threads": torch.get_num_threads(),
        "costs": asdict(result.costs),
        "arms": result.arms,
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """A table of one task."""
    print(f"{'decoder':<20}{'threshold':>10}{'length':>20}{'batch':>6}{'n':>5}{'ms':>9}{'speed-up':>22}{'quality':>9}")
    for row in rows:
        threshold = "-" if row["threshold"] is None else f"{row['threshold']:g}"
        low, high = row["speedup_interval"]
        speed = f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]"
        quality = "" if row.get("quality_ratio") is None else f"{row['quality_ratio']:.1%}"
        print(
            f"{row['method']:<20}{threshold:>10}{row['length']:>20}{row['batch_size']:>6}{row['samples']:>5}"
            f"{1e3 * row['seconds'][0]:>9.1f}{speed:>22}{quality:>9}"
        )


def _progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def tasks(text: str) -> tuple[str, ...]:
    """Names of tasks, separated by commas."""
    names = tuple(text.split(","))
    for name in names:
        if name not in TASKS:
            raise argparse.ArgumentTypeError(f"{name!r}: want some of {', '.join(TASKS)}, separated by commas")
    return names


if __name__ == "__main__":
    main()
