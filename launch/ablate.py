#!/usr/bin/env python
"""Does the adversarial loss help?  Trains exits with CE+GAN and with CE only, at equal steps, over several seeds.

Reports teacher-forced accuracy at every exit on the test split, as mean and standard deviation over seeds, beside the same
blocks read without an exit transformer.  Runs that were made before are reused.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from free_dist.config import Recipe
from free_dist.recipe_io import add_device_arguments, add_recipe_arguments, fail_clearly, load_recipe
from free_dist.training.runs import add_launch_arguments, train_once

LAUNCH = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_launch_arguments(parser, ds_config=LAUNCH.parent / "ds_configs" / "cpu.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    add_device_arguments(parser)
    add_recipe_arguments(parser, default="launch/recipes/ablation.yaml")
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        recipe = load_recipe(arguments.config or LAUNCH / "recipes" / "ablation.yaml", arguments.overrides)
        run(
            recipe, arguments.seeds, arguments.ds_config, arguments.num_gpus, device=arguments.device, dtype=arguments.dtype
        )  # fmt: skip


def run(
    recipe: Recipe,
    seeds: list[int],
    ds_config: Path,
    num_processes: int,
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Train methods x seeds, probe them all at once on ``device``, write ``ablation.json`` and print the table."""
    from free_dist.backbones.embedded import resolve_backbone

    exports: dict[str, Path] = {}
    for seed in seeds:
        for method, weight in (("CE+GAN", recipe.loss.adversarial_weight), ("CE only", 0.0)):
            name = f"{method} seed {seed}"
            part = replace(
                recipe,
                run_dir=str(Path(recipe.run_dir) / name.lower().replace(" ", "-").replace("+", "-")),
                loss=replace(recipe.loss, adversarial_weight=weight),
                training=replace(recipe.training, seed=seed),
            )
            print(f"\n{name}", flush=True)
            exports[name], _ = train_once(
                part,
                script=LAUNCH / "train.py",
                ds_config=ds_config,
                num_processes=num_processes,
                backbone=resolve_backbone(recipe.backbone.path),
            )

    from free_dist.atomic import write_atomically
    from free_dist.data.pretrained import load_for_inference
    from free_dist.evaluation.probe import LENS, probe_exits
    from free_dist.exits.export import load_exits

    backbone, encoder = load_for_inference(recipe.backbone, device=device, dtype=dtype)
    banks = {name: load_exits(backbone, export) for name, export in exports.items()}
    probes = probe_exits(backbone, encoder, banks, recipe)
    table: list[dict[str, object]] = []
    for probe in probes:
        by_method: dict[str, list[dict[int, float]]] = defaultdict(list)
        for name in banks:
            by_method[name.split(" seed ")[0]].append(probe.accuracy(name))
        lens = probe.accuracy(LENS)
        for k in recipe.exits.exit_layers:
            row: dict[str, object] = {"task": probe.task, "exit": k, "tokens": probe.tokens, "no exit": lens[k]}
            row["full"] = lens[backbone.n_blocks]
            for method, runs in by_method.items():
                row[method] = [one[k] for one in runs]
            table.append(row)
    write_atomically(Path(recipe.run_dir) / "ablation.json", json.dumps(table, indent=1).encode())
    print(f"\nanswer-token accuracy, {len(seeds)} seeds, {recipe.training.max_steps} steps each")
    print(f"{'task':10} {'exit':>4} {'no exit transformer':>20} {'CE only':>16} {'CE+GAN':>16} {'full':>7}")
    for row in table:
        cells = [_mean_and_deviation(row[method]) for method in ("CE only", "CE+GAN")]
        print(
            f"{row['task']:10} {row['exit']:4} {row['no exit']:20.3f} {cells[0]:>16} {cells[1]:>16} {row['full']:7.3f}"
        )


def _mean_and_deviation(values: object) -> str:
    assert isinstance(values, list)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ±{deviation:.4f}"


if __name__ == "__main__":
    main()
