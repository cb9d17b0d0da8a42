#!/usr/bin/env python
"""Where should exits stand?  Searches exit sets, variants and thresholds under a budget, and measures what was found.

    python launch/place_exits.py launch/recipes/quickstart.yaml run_dir=runs/placement
    python launch/place_exits.py runs/mine --max-exits 2 --min-speed 1.5

Takes a run directory or a recipe.  Exits after every block are trained once per variant (a finished bank in RUN/placement is
reused), their opinions on the calibration split's answers recorded, and the sets searched with measured costs.  Then the set that
was found, named placements and random ones, with thresholds chosen in the same way, answer the test split under one interleaved
clock.  Writes placement.json and placement.png to the run directory, and the found exits to RUN/placement/found.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from free_dist.config import EXIT_VARIANTS, Recipe
from free_dist.recipe_io import add_device_arguments, fail_clearly, positive_integer, recipe_help
from free_dist.training.bank_runs import BANKS, add_bank_arguments, recipe_of, train_bank
from free_dist.training.runs import provenance

if TYPE_CHECKING:
    from free_dist.backbones import Blip2Backbone
    from free_dist.data.samples import SampleEncoder
    from free_dist.evaluation.placement_run import Found

LAUNCH = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=recipe_help()
    )
    add_bank_arguments(parser, ds_config=LAUNCH.parent / "ds_configs" / "cpu.json")
    parser.add_argument(
        "--variants", nargs="+", choices=EXIT_VARIANTS, default=["full", "bottleneck"],
        help="kinds of exits to choose among, each trained once after every block (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-exits", type=positive_integer, default=3, help="most exits of a set (default: %(default)s)"
    )
    parser.add_argument(
        "--max-parameters", type=float, metavar="N", help="most trainable parameters of a set (default: no limit)"
    )
    parser.add_argument(
        "--max-harm", type=float, default=0.01, metavar="SHARE",
        help="tokens that may differ from the full model's: per answer, in captions per token (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--min-speed", type=float, metavar="RATIO",
        help="instead of --max-harm: the least harm at which this speed over full depth is predicted by the costs alone",
    )  # fmt: skip
    parser.add_argument(
        "--harm", choices=("agreement", "labels"), default="agreement",
        help="what counts as harm: any token but the full model's, or only where that one was right (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--record",
        type=int,
        default=150,
        metavar="N",
        help="calibration samples per task; 0: all (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=positive_integer, default=100, help="test samples per task (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive_integer, default=2, help="answers per placement and sample (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        help="time for measuring; what comes later is left out (default: %(default)s)",
    )
    parser.add_argument("--random-sets", type=int, default=20, help="default: %(default)s")
    parser.add_argument(
        "--random-measured",
        type=int,
        default=20,
        help="random sets that are timed, from best to worst (default: %(default)s)",
    )
    parser.add_argument(
        "--retrain", action="store_true", help="also train the set that was found alone, with the recipe's own steps"
    )
    add_device_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        recipe = recipe_of(arguments.source, arguments.overrides)
        run(recipe, arguments)


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Train, record, search, measure, write."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from free_dist.atomic import write_atomically
    from free_dist.data.pretrained import load_for_inference
    from free_dist.evaluation.placement_plot import placement_picture
    from free_dist.evaluation.placement_result import measure
    from free_dist.evaluation.placement_run import (
        Settings,
        Variant,
        is_adversarial,
        record,
        search_all,
        shared_thresholds,
    )
    from free_dist.exits.export import load_exits, save_exits

    disable_progress_bar()
    set_verbosity_error()
    backbone, encoder = load_for_inference(recipe.backbone, device=arguments.device, dtype=arguments.dtype)
    variants, exports = [], {}
    for name in arguments.variants:
        adversarial = is_adversarial(recipe, name)
        exports[name] = train_bank(
            recipe, range(1, backbone.n_blocks), name=f"{name}-{'gan' if adversarial else 'ce'}", variant=name,
            adversarial=adversarial, steps=arguments.bank_steps, script=LAUNCH / "train.py", ds_config=arguments.ds_config,
            num_processes=arguments.num_gpus, say=say,
        )  # fmt: skip
        variants.append(Variant.load(name, backbone, exports[name]))
    settings = Settings(
        max_exits=arguments.max_exits,
        max_parameters=arguments.max_parameters,
        max_harm=arguments.max_harm,
        min_speed=arguments.min_speed,
        harm=arguments.harm,
        record=arguments.record,
        random_sets=arguments.random_sets,
        random_measured=arguments.random_measured,
        samples=arguments.samples,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )
    started = time.perf_counter()
    recorded = record(backbone, encoder, recipe, variants, settings, say)
    recording_seconds = time.perf_counter() - started
    found = search_all(recorded, recipe, settings, say)
    if arguments.retrain and not found.chosen.choice.layers:
        say("--retrain: full depth was found, so there are no exits to train alone")
    elif arguments.retrain:
        found = retrained(found, recipe, arguments, backbone, encoder, settings)
    result = measure(backbone, encoder, recipe, found, settings, say)
    run_dir = Path(recipe.run_dir)
    content: dict[str, Any] = {
        "format": 1,
        "command": shlex.join(["python", "launch/place_exits.py", *sys.argv[1:]]),
        "provenance": provenance(),
        "recipe": json.loads(json.dumps(recipe, default=vars)),
        "settings": vars(settings),
        "bank": f"exits after blocks 1 to {backbone.n_blocks - 1}, {arguments.bank_steps} steps each variant",
        "recording_seconds": recording_seconds,
        **result,
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "placement.json", json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
    picture = placement_picture(content, run_dir / "placement.png")
    show(content)
    print(f"{run_dir / 'placement.json'}\n{picture}")
    chosen = found.chosen.choice
    if chosen.layers:
        exits = load_exits(backbone, exports[found.chosen.variant.name], merged=False).subset(chosen.layers)
        directory = run_dir / BANKS / "found"
        thresholds = shared_thresholds(chosen)
        save_exits(
            exits, directory, thresholds=thresholds, backbone=backbone,
            extra={"placement": content["measured"]["thresholds"], "steps": arguments.bank_steps},
        )  # fmt: skip
        off = [layer for layer, threshold in zip(chosen.layers, thresholds, strict=True) if threshold > 1]
        kept = f" (exits after {off} off, as some task has them off)" if off else ""
        print(
            f"exits {directory}: thresholds safe for every task in exits.json{kept}, those of each task in placement.json"
        )


def retrained(
    found: Found, recipe: Recipe, arguments: argparse.Namespace, backbone: Blip2Backbone, encoder: SampleEncoder, settings: Any
) -> Found:  # fmt: skip
    """The set that was found, trained alone with the recipe's own steps, as one more placement."""
    from free_dist.evaluation.placement_run import Variant, add_retrained, is_adversarial

    layers, variant = found.chosen.choice.layers, found.chosen.variant
    export = train_bank(
        recipe, layers, name="alone", variant=variant.name, adversarial=is_adversarial(recipe, variant.name),
        steps=recipe.training.max_steps, script=LAUNCH / "train.py", ds_config=arguments.ds_config,
        num_processes=arguments.num_gpus, say=say,
    )  # fmt: skip
    return add_retrained(found, Variant.load(variant.name, backbone, export), backbone, encoder, recipe, settings, say)


def show(content: dict[str, Any]) -> None:
    """A table of what was found and what it is compared with."""
    print(
        f"\n{'placement':<34}{'exits after':<20}{'variant':<12}{'predicted':>10}{'measured':>24}{'quality':>9}{'/ found':>9}"
    )
    rows = {"found": content["predicted"] | content["measured"]} | content["baselines"]
    for name, row in rows.items():
        speed = ""
        if row["measured_speed"] is not None:
            low, high = row["measured_speed_interval"]
            speed = f"{row['measured_speed']:.2f} [{low:.2f}, {high:.2f}]"
        quality = "" if row["quality_ratio"] is None else f"{row['quality_ratio']:.1%}"
        slower = row.get("slower_than_found")
        print(
            f"{name:<34}{' '.join(map(str, row['layers'])):<20}{row['variant']:<12}{row['predicted_speed']:>10.2f}{speed:>24}"
            f"{quality:>9}{'' if slower is None else f'{slower:.3f}':>9}"
        )
    print(f"\nsearched in {content['search_seconds']:.1f} s; measured over predicted speed of what was found: "
          f"{content['prediction_error']:+.1%}")  # fmt: skip


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    main()
