#!/usr/bin/env python
"""What does each setting bring?  Trains exits with one thing changed at a time, over several seeds at equal steps.

Every file of launch/recipes/ablations changes the base recipe in one thing: no adversarial loss, no task loss, KL instead of
labels, other starting blocks, numbers of exits, discriminators, exit variants.  Measures teacher-forced accuracy behind every
exit on the test split, with 95% intervals over seeds and differences paired by seed.  Runs that were made before are reused.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

from free_dist.config import Recipe, UserError, nearest
from free_dist.recipe_io import add_device_arguments, add_recipe_arguments, fail_clearly, load_recipe
from free_dist.training.run_directory import differing_fields
from free_dist.training.runs import SETTINGS, add_launch_arguments, provenance, train_once

LAUNCH = Path(__file__).resolve().parent
BASE_RECIPE = LAUNCH / "recipes" / "ablation.yaml"
ABLATIONS = {path.stem: path for path in sorted((LAUNCH / "recipes" / "ablations").glob("*.yaml"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_launch_arguments(parser, ds_config=LAUNCH.parent / "ds_configs" / "cpu.json")
    parser.add_argument(
        "--only", metavar="NAME,...", help=f"ablations beside the base; default: all of {', '.join(ABLATIONS)}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    add_device_arguments(parser)
    add_recipe_arguments(parser, default="launch/recipes/ablation.yaml")
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        names = arguments.only.split(",") if arguments.only else list(ABLATIONS)
        for name in names:
            if name not in ABLATIONS:
                raise UserError(f"--only {name}: no such ablation; did you mean {nearest(name, ABLATIONS)!r}?")
        configs = arguments.config or [str(BASE_RECIPE)]
        recipes = {"base": load_recipe(configs, arguments.overrides)}
        recipes |= {name: load_recipe([*configs, str(ABLATIONS[name])], arguments.overrides) for name in names}
        for name in names:
            if not differing_fields(recipes["base"], recipes[name], SETTINGS):
                raise UserError(
                    f"{name} and the base are the same run: {ABLATIONS[name]} changes what an override or --config sets; leave "
                    f"that out, or choose other ablations with --only"
                )
        run(
            recipes, arguments.seeds, arguments.ds_config, arguments.num_gpus, device=arguments.device, dtype=arguments.dtype
        )  # fmt: skip


def run(
    recipes: dict[str, Recipe],
    seeds: list[int],
    ds_config: Path,
    num_processes: int,
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Train settings x seeds, probe them all at once on ``device``, write ``ablation.json`` and print the table."""
    from free_dist.backbones.embedded import resolve_backbone

    base = recipes["base"]
    exports: dict[tuple[str, int], Path] = {}
    for number, (name, recipe) in enumerate(recipes.items()):
        for place, seed in enumerate(seeds):
            print(f"\n[{number * len(seeds) + place + 1}/{len(recipes) * len(seeds)}] {name}, seed {seed}", flush=True)
            part = replace(
                recipe,
                run_dir=str(Path(base.run_dir) / f"{name}-seed-{seed}"),
                training=replace(recipe.training, seed=seed),
            )
            exports[name, seed], _ = train_once(
                part,
                script=LAUNCH / "train.py",
                ds_config=ds_config,
                num_processes=num_processes,
                backbone=resolve_backbone(recipe.backbone.path),
            )

    from free_dist.atomic import write_atomically
    from free_dist.data.pretrained import load_for_inference
    from free_dist.evaluation.ablation import ablation_rows, ablation_table
    from free_dist.evaluation.probe import LENS, probe_exits
    from free_dist.evaluation.report import aligned
    from free_dist.exits.export import load_exits
    from free_dist.exits.transformer import trained_parameters

    backbone, encoder = load_for_inference(base.backbone, device=device, dtype=dtype)
    banks = {f"{name} {seed}": load_exits(backbone, export) for (name, seed), export in exports.items()}
    parameters = {name: trained_parameters(banks[f"{name} {seeds[0]}"]) for name in recipes}
    rows = []
    for probe in probe_exits(backbone, encoder, banks, base):
        accuracies = defaultdict(list)
        for name, seed in exports:
            accuracies[name].append(probe.accuracy(f"{name} {seed}"))
        full = probe.accuracy(LENS)[backbone.n_blocks]
        rows += ablation_rows(accuracies, task=probe.task, full=full, tokens=probe.tokens, parameters=parameters)
    found = {
        "format": 1,
        "command": shlex.join(["python", *sys.argv]),
        "provenance": provenance(),
        "recipe": asdict(base),
        "seeds": seeds,
        "changes": {
            name: ABLATIONS[name].read_text().splitlines()[0].lstrip("# ") for name in recipes if name != "base"
        },
        "rows": [row.to_json() for row in rows],
    }
    path = Path(base.run_dir) / "ablation.json"
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    steps = base.training.max_steps
    print(f"\nanswer-token accuracy, {len(seeds)} seeds, {steps} steps each; in brackets the difference to the base\n")
    print(aligned(ablation_table(rows)))
    full_model = {row.task: row.full for row in rows}
    print(f"\nfull model: {', '.join(f'{task} {accuracy:.3f}' for task, accuracy in full_model.items())}")
    print("* not 0 with 95% confidence, paired by seed, no correction for the number of comparisons")
    print(path)


if __name__ == "__main__":
    main()
