#!/usr/bin/env python
"""The whole path on the embedded model and data: shards, adversarial training on three engines, decoding, measuring.

Trains the recipe's exits twice, with the adversarial loss and without, and measures both against the full model and against
exits without any training.  A second run reuses what the first one made with the same settings.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from free_dist.config import Recipe
from free_dist.recipe_io import add_recipe_arguments, fail_clearly, load_recipe, save_recipe
from free_dist.training.runs import EXPORT_MANIFEST, add_launch_arguments, same_recipe, train_once

LAUNCH = Path(__file__).resolve().parent
METHODS = {"exits": "CE+GAN", "exits_ce": "CE only"}
"""Method in results.json -> what it is called on screen."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_launch_arguments(parser, ds_config=LAUNCH.parent / "ds_configs" / "cpu.json")
    add_recipe_arguments(parser, default="launch/recipes/quickstart.yaml")
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        recipe = load_recipe(arguments.config or str(LAUNCH / "recipes" / "quickstart.yaml"), arguments.overrides)
        run(recipe, arguments.ds_config, arguments.num_gpus)


def run(recipe: Recipe, ds_config: Path, num_processes: int) -> None:
    """Do whatever of the five stages is not done yet, then print the table and the paths."""
    started = time.perf_counter()
    root = Path(recipe.run_dir)
    _stage(1, f"data: {recipe.data.root}")
    from free_dist.backbones.embedded import resolve_backbone
    from free_dist.data import easyvqa

    easyvqa.prepare(Path(recipe.data.root))
    exports = {}
    for number, (method, name) in enumerate(METHODS.items(), start=2):
        weight = recipe.loss.adversarial_weight if method == "exits" else 0.0
        part = replace(recipe, run_dir=str(root / method), loss=replace(recipe.loss, adversarial_weight=weight))
        _stage(number, f"training exits after blocks {recipe.exits.exit_layers}: {name} (starting takes half a minute)")
        exports[method], reused = train_once(
            part,
            script=LAUNCH / "train.py",
            ds_config=ds_config,
            num_processes=num_processes,
            backbone=resolve_backbone(recipe.backbone.path),
        )
        if reused:
            print("reusing", exports[method])
    _stage(4, "evaluation: quality, agreement and paired wall-clock")
    from evaluate import run as evaluate

    from free_dist.evaluation.report import terminal_table
    from free_dist.evaluation.rows import best_row, read_results, tasks_of

    stamp = root / "recipe.yaml"
    results = root / "results.json"
    if same_recipe(recipe, stamp) and results.is_file() and _older(exports.values(), results):
        print("reusing", results)
    else:
        evaluate(recipe, exports, labels=METHODS)
        save_recipe(recipe, stamp)
    rows = read_results(results)
    _stage(5, "result")
    print(terminal_table(rows))
    print("\n" + ", ".join(f"{method}: {name}" for method, name in METHODS.items()) + "\n")
    for task in tasks_of(rows):
        best = best_row(rows, task)
        if best is None:
            print(f"{task}: no threshold keeps 99% of the full model's quality")
        else:
            low, high = best.extras["wall_ratio_interval"]
            print(
                f"{task}: {best.speed:.2f} times as fast as the faster of our full-depth decoder [{low:.2f}, {high:.2f}] and "
                f"Hugging Face generate, at {best.quality_ratio:.1%} of the full model's quality ({METHODS[best.method]}, "
                f"threshold {best.threshold:g}, n={best.n})"
            )
    print("Each threshold was chosen on the samples it is reported on; brackets are 95% intervals.")
    print(f"\nresults       {results}\nreport        {root / 'report.html'}, {root / 'report.md'}")
    print(f"              to fill its other sections: python launch/report.py {root} --complete")
    for picture in sorted(root.glob("*.png")):
        print(f"plot          {picture}")
    print(f"TensorBoard   {Path(sys.executable).parent / 'tensorboard'} --logdir {root}")
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")


def _stage(number: int, title: str) -> None:
    print(f"\n[{number}/5] {title}", flush=True)


def _older(exports: Iterable[Path], results: Path) -> bool:
    return all((export / EXPORT_MANIFEST).stat().st_mtime <= results.stat().st_mtime for export in exports)


if __name__ == "__main__":
    main()
