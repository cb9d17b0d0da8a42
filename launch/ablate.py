#!/usr/bin/env python
"""What does each setting bring?  Trains exits with one thing changed at a time, over several seeds at equal steps.

Every file of launch/recipes/ablations changes the base recipe in one thing: no adversarial loss, no task loss, KL instead of
labels, CapFilt's captions, other starting blocks, numbers of exits, discriminators, exit variants.  Measures teacher-forced
accuracy behind every exit on the test split, with 95% intervals over seeds and differences paired by seed.  Runs that were made
before are reused.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from free_dist.config import DataConfig, Recipe, UserError, nearest
from free_dist.recipe_io import add_device_arguments, add_recipe_arguments, fail_clearly, load_recipe, positive_integer
from free_dist.training.run_directory import differing_fields
from free_dist.training.runs import SETTINGS, add_launch_arguments, provenance, run_program, train_all

LAUNCH = Path(__file__).resolve().parent
BASE_RECIPE = LAUNCH / "recipes" / "ablation.yaml"
CAPFILT = "capfilt"
"""The ablation whose data is made first."""
CAPFILT_IMAGES = 500
"""Images whose captions its captioner and its filter learn from."""
MOST_JOBS = 4
"""Runs that train at a time where nothing is said: each takes 1 to 2 GB of memory."""
ABLATIONS = {path.stem: path for path in sorted((LAUNCH / "recipes" / "ablations").glob("*.yaml"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_launch_arguments(parser, ds_config=LAUNCH.parent / "ds_configs" / "cpu.json")
    parser.add_argument(
        "--only", metavar="NAME,...", help=f"ablations beside the base; default: all of {', '.join(ABLATIONS)}"
    )
    parser.add_argument(
        "--jobs", type=positive_integer, metavar="N",
        help=f"runs that train at a time (default: 1 where CUDA is found, else cores / --num_gpus, at most {MOST_JOBS})",
    )  # fmt: skip
    parser.add_argument(
        "--blip-steps", type=positive_integer, default=600,
        help="training steps of CapFilt's captioner and of its filter (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=seeds, default="0,1,2", metavar="N,...", help="default: %(default)s")
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
            recipes, arguments.seeds, arguments.ds_config, arguments.num_gpus, device=arguments.device, dtype=arguments.dtype,
            blip_steps=arguments.blip_steps, jobs=arguments.jobs,
        )  # fmt: skip


def run(
    recipes: dict[str, Recipe],
    seeds: list[int],
    ds_config: Path,
    num_processes: int,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    blip_steps: int = 600,
    jobs: int | None = None,
) -> None:
    """Train settings x seeds, ``jobs`` at a time, probe them all at once on ``device``, write ``ablation.json`` and print the
    table."""
    from free_dist.backbones.embedded import resolve_backbone
    from free_dist.data import easyvqa

    base = recipes["base"]
    if base.data.root == DataConfig().root:
        easyvqa.prepare(Path(base.data.root))  # before several runs do so at once
    parts = {}
    for name, recipe in recipes.items():
        if name == CAPFILT:
            recipe = replace(recipe, data=replace(recipe.data, root=str(captioned(base, blip_steps))))
        for seed in seeds:
            parts[name, seed] = replace(
                recipe,
                run_dir=str(Path(base.run_dir) / f"{name}-seed-{seed}"),
                training=replace(recipe.training, seed=seed),
            )
    trained = train_all(
        {f"{name}, seed {seed}": part for (name, seed), part in parts.items()},
        jobs=jobs or usual_jobs(num_processes),
        script=LAUNCH / "train.py",
        ds_config=ds_config,
        num_processes=num_processes,
        backbone=lambda recipe: resolve_backbone(recipe.backbone.path),
        tell=partial(print, flush=True),
    )
    exports = dict(zip(parts, trained.values(), strict=True))

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


def seeds(text: str) -> list[int]:
    """``0,1,2`` -> [0, 1, 2]; argparse shows the error."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise argparse.ArgumentTypeError(f"{text}: want different whole numbers from 0 on, such as 0,1,2")
    return [int(part) for part in parts]


def usual_jobs(num_processes: int) -> int:
    """Runs of so many processes that train at a time unless the user says otherwise: a small model leaves cores idle."""
    from torch import cuda

    return 1 if cuda.is_available() else max(1, min(len(os.sched_getaffinity(0)) // num_processes, MOST_JOBS))


def captioned(base: Recipe, steps: int) -> Path:
    """The base recipe's data with CapFilt's captions, by models trained on some of its own; made once."""
    made = Path(base.run_dir) / f"capfilt-{steps}-steps"
    source, data = base.data.root, made / "data"
    train = ["--images", CAPFILT_IMAGES, "--out", made, "--backbone", base.backbone.path, "--steps", steps]
    write = ["--out", data, "--captioner", made / "captioner", "--filter", made / "filter", "--min-length", 6]
    programs: list[list[object]] = [
        ["train_blip.py", "--data", source, *train],
        ["capfilt.py", "--source", source, *write, "--max-length", 35],
    ]
    for name, *words in programs:
        print(f"\n{name} in {made}", flush=True)
        if run_program([sys.executable, LAUNCH / str(name), *words], run_dir=made):
            raise UserError(f"launch/{name} failed: see its messages above, or leave {CAPFILT} out with --only")
    return data


if __name__ == "__main__":
    main()
