#!/usr/bin/env python
"""One table like the paper's: our exits and the baselines a reviewer expects, on one frozen backbone and one decoder.

    python launch/compare.py launch/recipes/compare.yaml
    python launch/compare.py runs/quickstart

Trains what is not trained yet (exit transformers with CE+GAN, CE alone and KL alone, and independent classifiers; finished
runs below --reuse that learnt the same are taken), chooses every method's operating point on the calibration split, and measures
all of them on the same samples of the recipe's split, interleaved. Writes comparison.json and comparison.md to run_dir. A second
run goes on where the first one stopped: trainings and whole tasks are kept. A run in the place of the recipe is compared by its
own recipe, into its own directory, and its own trainings are the first to be taken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from free_dist.config import DataConfig, MissingFileError, Recipe, UserError
from free_dist.recipe_io import (
    add_device_arguments,
    add_recipe_arguments,
    fail_clearly,
    load_recipe,
    positive_integer,
)
from free_dist.training.bank_runs import recipe_of
from free_dist.training.runs import (
    EXPORT,
    EXPORT_MANIFEST,
    add_launch_arguments,
    is_finished,
    train_once,
    training_seconds,
)

LAUNCH = Path(__file__).resolve().parent
PARTS = "comparison_parts"
"""Directory below run_dir with one finished task a file."""
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "ce_gan": {"loss": {"mode": "supervised"}},
    "ce": {"loss": {"mode": "supervised", "adversarial_weight": 0.0}},
    "kl": {"loss": {"mode": "unsupervised", "adversarial_weight": 0.0}},
    "classifier": {"loss": {"mode": "supervised", "adversarial_weight": 0.0}, "exits": {"variant": "classifier"}},
}
"""Training -> what it changes in the recipe."""
OWN = {"ce_gan": "exits", "ce": "exits_ce"}
"""Training -> what a run of launch/quickstart.py calls it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_launch_arguments(parser, ds_config=LAUNCH.parent / "ds_configs" / "cpu.json")
    parser.add_argument(
        "--reuse", type=Path, action="append", metavar="DIR",
        help="directory of runs that are taken where they learnt the same; may be given again; default: runs/quickstart",
    )  # fmt: skip
    parser.add_argument(
        "--exits", action="append", default=[], metavar="TRAINING=DIR",
        help=f"an export that is taken as it is for one of {', '.join(VARIANTS)}, whatever it was trained with",
    )  # fmt: skip
    parser.add_argument(
        "--min-quality", type=float, default=0.99, metavar="SHARE",
        help="of the full model's quality, that operating points keep on the calibration split (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-samples", type=positive_integer, default=40, metavar="N",
        help="per task, on which operating points are chosen (default: %(default)s)",
    )  # fmt: skip
    add_device_arguments(parser)
    add_recipe_arguments(parser, default="launch/recipes/compare.yaml")
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        if not 0 < arguments.min_quality <= 1 or math.isnan(arguments.min_quality):
            raise UserError(f"--min-quality {arguments.min_quality}: want a share above 0, up to 1")
        recipe = _recipe(arguments.overrides, arguments.config or [])
        run(recipe, arguments, shlex.join(["python", "launch/compare.py", *sys.argv[1:]]))


def _recipe(words: list[str], configs: list[str]) -> Recipe:
    """The recipe of ``words``: a run's directory or YAML files by themselves, as the command is meant to be typed, and overrides.

    Raises UserError for a run beside anything else that is a recipe, and for the split that settings are chosen on.
    """
    files = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    runs = [word for word in words if "=" not in word and Path(word).is_dir()]
    overrides = [word for word in words if word not in (*files, *runs)]
    if runs and len(runs) + len(files) + len(configs) > 1:
        raise UserError(f"{' '.join([*runs, *files, *configs])}: give one run directory, or recipes, not both")
    if runs:
        recipe = recipe_of(Path(runs[0]), overrides)
    else:
        recipe = load_recipe([*configs, *files] or LAUNCH / "recipes" / "compare.yaml", overrides)
    if recipe.evaluation.split == "calibration":
        raise UserError(
            "evaluation.split=calibration: every method's setting is chosen there, so it cannot judge them any more; "
            "use evaluation.split=test"
        )
    return recipe


def run(recipe: Recipe, arguments: argparse.Namespace, command: str) -> Path:
    """Train, choose, measure and write; returns the path of ``comparison.json``."""
    began = time.perf_counter()
    given = _given_exits(arguments.exits, recipe)
    run_dir = Path(recipe.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if recipe.data.root == DataConfig.root:
        from free_dist.data import easyvqa

        easyvqa.prepare(Path(recipe.data.root))
    reuse = arguments.reuse or [Path("runs/quickstart")]
    exports = trained_exits(recipe, arguments.ds_config, arguments.num_gpus, reuse, given)
    costs = training_costs(recipe, arguments.ds_config, exports, given)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from free_dist.atomic import write_atomically
    from free_dist.data.pretrained import load_for_inference
    from free_dist.evaluation.benchmark import prompted
    from free_dist.evaluation.comparison import contest
    from free_dist.evaluation.comparison_choice import ChoiceAmounts, choose_settings
    from free_dist.evaluation.comparison_report import FORMAT, markdown
    from free_dist.evaluation.comparison_run import compare_task
    from free_dist.exits.export import load_exits
    from free_dist.training.runs import provenance

    disable_progress_bar()
    backbone, encoder = load_for_inference(recipe.backbone, device=arguments.device, dtype=arguments.dtype)
    banks = {name: load_exits(backbone, export) for name, export in exports.items()}
    methods = contest(backbone, banks, recipe.evaluation.thresholds)
    amounts = ChoiceAmounts(samples=arguments.calibration_samples)
    known = _fingerprint(recipe, arguments, exports, given)
    here = provenance() | {"threads": torch.get_num_threads(), "device": arguments.device}
    made: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    sweep: list[dict[str, Any]] = []
    for task in recipe.evaluation.tasks:
        part = run_dir / PARTS / f"{task}.json"
        found = json.loads(part.read_text()) if part.is_file() else {}
        if found.get("fingerprint") == known:
            print("reusing", part)
        else:
            chosen = choose_settings(
                backbone, encoder, methods, recipe, task, min_quality=arguments.min_quality, amounts=amounts,
                prompted=lambda samples: list(prompted(backbone, encoder, samples)), progress=_progress,
            )  # fmt: skip
            _progress(f"{task}: all methods on the {recipe.evaluation.split} split")
            table, swept = compare_task(
                backbone, encoder, methods, chosen, recipe, task, min_quality=arguments.min_quality, costs=costs
            )
            found = {"fingerprint": known, "provenance": here, "rows": table, "sweep": swept}
            part.parent.mkdir(exist_ok=True)
            write_atomically(part, json.dumps(found).encode())
        made[task] = found["provenance"]
        rows += found["rows"]
        sweep += found["sweep"]
    content = {
        "format": FORMAT,
        "command": command,
        # Of when tasks were measured; where that differs, it is told by task.
        "provenance": {
            name: value
            if all(one[name] == value for one in made.values())
            else "; ".join(f"{one[name]} ({task})" for task, one in made.items())
            for name, value in (next(iter(made.values())) if made else here).items()
        },
        "provenance_by_task": made,
        "recipe": asdict(recipe),
        "min_quality": arguments.min_quality,
        "calibration_samples": arguments.calibration_samples,
        "training": {name: {"export": str(exports[name])} | costs[name] for name in exports},
        "rows": rows,
        "sweep": sweep,
    }
    path, report = run_dir / "comparison.json", run_dir / "comparison.md"
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    text = markdown(content)
    write_atomically(report, (text + "\n").encode())
    print(f"\n{text.split('## Sweep')[0]}")
    print(f"table         {path}\nreport        {report}\ndone in {(time.perf_counter() - began) / 60:.1f} minutes")
    return path


def trained_exits(
    recipe: Recipe, ds_config: Path, num_processes: int, reuse: list[Path], given: dict[str, Path]
) -> dict[str, Path]:
    """Training -> its export: what was ``given``, a finished run that learnt the same, or one that is made now.

    Trainings of the run directory itself are the first that are looked at, then those below the directories ``reuse``.
    """
    from free_dist.backbones.embedded import resolve_backbone

    backbone = resolve_backbone(recipe.backbone.path)
    exports = {}
    for name, changes in VARIANTS.items():
        part = replace(
            recipe,
            run_dir=str(Path(recipe.run_dir) / name),
            **{section: replace(getattr(recipe, section), **fields) for section, fields in changes.items()},
        )
        if name in given:
            exports[name] = given[name]
            continue
        _check_adversarial(name, part)
        own = [Path(recipe.run_dir) / OWN[name]] if name in OWN else []
        elsewhere = [*own, Path(part.run_dir), *(path for root in reuse for path in sorted(root.glob("*/")))]
        same = (
            path
            for path in elsewhere
            if is_finished(replace(part, run_dir=str(path)), ds_config=ds_config, backbone=backbone)
        )
        found = next(same, None)
        if found is not None:
            exports[name] = found / EXPORT
            print("reusing", exports[name])
            continue
        _progress(f"training {name} (starting takes half a minute)")
        exports[name], _ = train_once(
            part, script=LAUNCH / "train.py", ds_config=ds_config, num_processes=num_processes, backbone=backbone
        )
    return exports


def training_costs(
    recipe: Recipe, ds_config: Path, exports: dict[str, Path], given: dict[str, Path]
) -> dict[str, dict[str, float | None]]:
    """Training -> ``training_seconds`` by its log, and ``training_flops_per_sample`` of its micro-batches, run dry.

    What was ``given`` may have been trained by another recipe: its operations are None, not known.
    Lengths are those of a batch of real samples per task; tasks count by their weights in the recipe.
    """
    import random

    from free_dist.backbones.embedded import resolve_backbone
    from free_dist.data.pretrained import load_encoder
    from free_dist.data.samples import IGNORE, training_samples
    from free_dist.data.stream import records
    from free_dist.ds_config import micro_batch_size, read_ds_config
    from free_dist.planning.memory import plan_memory

    sections = read_ds_config(ds_config)
    directory = resolve_backbone(recipe.backbone.path)
    encoder = load_encoder(recipe.backbone.path)
    rows = micro_batch_size(sections)
    tasks = {task: weight for task, weight in recipe.data.tasks.items() if weight > 0}
    lengths: dict[str, tuple[int, int]] = {}
    for task in tasks:
        samples: list[Any] = []
        for record in records(recipe.data, "train"):
            samples += training_samples(record, task, recipe.data, random.Random(0))
            if len(samples) >= rows:
                break
        if not samples:
            raise MissingFileError(f"data.root: {recipe.data.root}/train has nothing for task {task!r}")
        batch = encoder.collate(samples[:rows])
        opening = len(encoder.layout.opening) + len(encoder.layout.prompt_end)
        answers = int((batch.targets != IGNORE).sum())
        lengths[task] = batch.input_ids.shape[1] - opening, max(1, round(answers / len(samples[:rows])))
    costs: dict[str, dict[str, float | None]] = {}
    for name, changes in VARIANTS.items():
        if name in given:
            costs[name] = {
                "training_seconds": training_seconds(exports[name].parent),
                "training_flops_per_sample": None,
            }
            continue
        part = replace(
            recipe, **{section: replace(getattr(recipe, section), **fields) for section, fields in changes.items()}
        )
        total = 0.0
        for task, weight in tasks.items():
            text, answer = lengths[task]
            one = replace(part, data=replace(part.data, tasks={task: 1.0}))
            plan = plan_memory(str(directory), one, sections, world_size=1, text_tokens=text, answer_tokens=answer)
            total += weight * sum(plan.flops_per_sample.values())
        costs[name] = {
            "training_seconds": training_seconds(exports[name].parent),
            "training_flops_per_sample": total / sum(tasks.values()),
        }
    return costs


def _given_exits(texts: list[str], recipe: Recipe) -> dict[str, Path]:
    """``ce=DIR`` -> {"ce": DIR}; raises UserError, also where not all exits of the comparison stand after the same blocks."""
    from free_dist.exits.manifest import read_exits_manifest

    found = {}
    for text in texts:
        name, _, directory = text.partition("=")
        if name not in VARIANTS or not directory:
            raise UserError(f"--exits {text}: want TRAINING=DIR with one of {', '.join(VARIANTS)}")
        if not (Path(directory) / EXPORT_MANIFEST).is_file():
            raise MissingFileError(f"--exits {text}: no {EXPORT_MANIFEST} there: give the export directory of a run")
        found[name] = Path(directory)
    layers = {f"--exits {name}={path}": list(read_exits_manifest(path).exit_layers) for name, path in found.items()}
    if found and len(found) < len(VARIANTS):
        layers["the recipe's exits.exit_layers"] = list(recipe.exits.exit_layers)
    first, *others = layers.items() or [("", [])]
    for where, own in others:
        if own != first[1]:
            raise UserError(
                f"{first[0]} has exits after blocks {first[1]}, {where} after {own}: methods are compared at the same blocks; "
                "give exports with the same, or set exits.exit_layers to theirs"
            )
    return found


def _check_adversarial(name: str, part: Recipe) -> None:
    if name == "ce_gan" and part.loss.adversarial_weight == 0:
        raise UserError(
            "loss.adversarial_weight=0: ours is trained with it, so that it differs from CE alone; set it above 0"
        )


def _fingerprint(
    recipe: Recipe, arguments: argparse.Namespace, exports: dict[str, Path], given: dict[str, Path]
) -> str:
    """Equal for runs that would measure the same: settings and trained weights, not the code."""
    from free_dist.exits.export import read_exits_manifest

    weights = {name: read_exits_manifest(export).weights_sha256 for name, export in exports.items()}
    settings = asdict(recipe) | {"run_dir": "", "training": "", "alarms": "", "finetune": ""}
    settings["evaluation"] = asdict(recipe.evaluation) | {"tasks": ""}
    flags = [arguments.min_quality, arguments.calibration_samples, arguments.device, arguments.dtype, sorted(given)]
    return hashlib.sha256(json.dumps([settings, weights, flags], sort_keys=True).encode()).hexdigest()


def _progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    main()
