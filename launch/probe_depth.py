#!/usr/bin/env python
r"""Is there a mid-crisis, and how much does the model overthink?  Reads every block of a backbone in four ways.

    python launch/probe_depth.py launch/recipes/quickstart.yaml run_dir=runs/placement
    python launch/probe_depth.py launch/recipes/smollm2.yaml --no-exits backbone.path=models/smollm2_untrained \
        --fine-tuned models/smollm2

Logit lens (final norm and head alone), tuned lens (one affine translator per block, trained here), and exit transformers trained
without and with the adversarial loss (CE-ET, GAN-ET): given ones, or exits after every block that are trained once in
RUN/placement.  --fine-tuned names a second backbone, the same model after fine-tuning, which is read by the two lenses;
--fine-tune makes one, a copy whose language model is trained on the recipe's tasks by LoRA in RUN/tuned.  Writes mid_crisis.json,
mid_crisis.png and overthinking.png to the run directory.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from free_dist.config import Recipe, UserError
from free_dist.recipe_io import add_device_arguments, fail_clearly, positive_integer, recipe_help
from free_dist.training.bank_runs import add_bank_arguments, fine_tuned_copy, recipe_of, train_bank
from free_dist.training.runs import provenance

LAUNCH = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=recipe_help()
    )
    add_bank_arguments(parser, ds_config=LAUNCH.parent / "ds_configs" / "cpu.json")
    parser.add_argument(
        "--exits", type=Path, metavar="DIR", help="exits trained with discriminators (default: trained here)"
    )
    parser.add_argument("--exits-ce", type=Path, metavar="DIR", help="exits trained without (default: trained here)")
    parser.add_argument("--no-exits", action="store_true", help="lenses alone: nothing is trained but the tuned lens")
    parser.add_argument(
        "--fine-tuned",
        type=Path,
        metavar="BACKBONE_DIR",
        help="the same model after fine-tuning, read by lenses to compare",
    )
    parser.add_argument(
        "--fine-tune", type=positive_integer, metavar="STEPS",
        help="fine-tune a copy of the backbone for so many steps, unless that was done before, and read that to compare",
    )  # fmt: skip
    parser.add_argument(
        "--lens-steps",
        type=int,
        default=300,
        help="training steps of the tuned lens; 0: without it (default: %(default)s)",
    )
    parser.add_argument(
        "--lens-tokens", type=int, default=4000, help="answer tokens it is trained on (default: %(default)s)"
    )
    add_device_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        if arguments.no_exits and (arguments.exits or arguments.exits_ce):
            raise UserError("--no-exits contradicts --exits and --exits-ce: leave one out")
        if arguments.fine_tuned and arguments.fine_tune:
            raise UserError("--fine-tune makes what --fine-tuned names: leave one out")
        if arguments.lens_steps < 0 or arguments.lens_tokens < 1:
            raise UserError("--lens-steps: want 0 or more; --lens-tokens: want at least 1")
        run(recipe_of(arguments.source, arguments.overrides), arguments)


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Train what is missing, read, write."""
    from transformers.utils.logging import disable_progress_bar

    from free_dist.atomic import write_atomically
    from free_dist.data.pretrained import load_for_inference
    from free_dist.evaluation.depth_plot import depth_picture, overthinking_picture
    from free_dist.exits.export import load_exits

    disable_progress_bar()
    backbone, encoder = load_for_inference(recipe.backbone, device=arguments.device, dtype=arguments.dtype)
    given = {"CE-ET": arguments.exits_ce, "GAN-ET": arguments.exits}
    if not arguments.no_exits:
        for name, directory in given.items():
            if directory is None:
                if name == "GAN-ET" and recipe.loss.adversarial_weight == 0:
                    raise UserError("loss.adversarial_weight=0: GAN-ET would be CE-ET; set it, or give --exits")
                given[name] = train_bank(
                    recipe, range(1, backbone.n_blocks), name=f"full-{'gan' if name == 'GAN-ET' else 'ce'}", variant="full",
                    adversarial=name == "GAN-ET", steps=arguments.bank_steps, script=LAUNCH / "train.py",
                    ds_config=arguments.ds_config, num_processes=arguments.num_gpus, say=functools.partial(print, flush=True),
                )  # fmt: skip
    banks = {name: load_exits(backbone, directory) for name, directory in given.items() if directory is not None}
    content: dict[str, Any] = {
        "format": 1,
        "command": shlex.join(["python", "launch/probe_depth.py", *sys.argv[1:]]),
        "provenance": provenance(),
        "recipe": json.loads(json.dumps(recipe, default=vars)),
        "backbone": recipe.backbone.path,
    }
    content["tasks"], content["tuned_lens"] = read(backbone, encoder, recipe, banks, arguments)
    fine_tuned = arguments.fine_tuned
    if arguments.fine_tune:
        fine_tuned = fine_tuned_copy(
            recipe, steps=arguments.fine_tune, script=LAUNCH / "finetune.py", say=functools.partial(print, flush=True)
        )
    if fine_tuned is not None:
        other = replace(recipe.backbone, path=str(fine_tuned))
        backbone, encoder = load_for_inference(other, device=arguments.device, dtype=arguments.dtype)
        content["fine_tuned_backbone"] = other.path
        content["fine_tuned"], content["fine_tuned_lens"] = read(backbone, encoder, recipe, {}, arguments)
    run_dir = Path(recipe.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "mid_crisis.json"
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
    show(content["tasks"], recipe.backbone.path)
    if "fine_tuned" in content:
        show(content["fine_tuned"], f"{fine_tuned} (fine-tuned)")
    print(path)
    for draw, name in ((depth_picture, "mid_crisis.png"), (overthinking_picture, "overthinking.png")):
        print(draw(content, run_dir / name))


def read(backbone: Any, encoder: Any, recipe: Recipe, banks: Any, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(summary by task, what the tuned lens gained on its training tokens) of one backbone."""
    from tqdm import tqdm

    from free_dist.evaluation.depth import depth_summary
    from free_dist.evaluation.depth_lens import (
        TunedLens,
        answer_states,
        final_log_probs,
        lens_divergence,
        train_tuned_lens,
    )
    from free_dist.evaluation.depth_reading import read_depth, training_batches_for_lens

    lens, gained = None, None
    if arguments.lens_steps:
        device = next(backbone.parameters()).device
        batches = training_batches_for_lens(encoder, recipe, arguments.lens_tokens, device)
        hidden, final = answer_states(backbone, batches, limit=arguments.lens_tokens)
        started = time.perf_counter()
        lens = train_tuned_lens(
            backbone, hidden, final, steps=arguments.lens_steps,
            progress=lambda steps: tqdm(steps, desc="tuned lens", unit="step", mininterval=1.0),
        )  # fmt: skip
        plain = TunedLens(backbone.n_blocks, hidden.shape[-1]).to(device).requires_grad_(False)
        some = slice(0, 512)
        wanted = final_log_probs(backbone, final[some])
        gained = {
            "steps": arguments.lens_steps, "tokens": len(final), "seconds": time.perf_counter() - started,
            "kl": {
                str(k): [float(lens_divergence(backbone, one, k, hidden[k - 1, some], wanted)) for one in (plain, lens)]
                for k in range(1, backbone.n_blocks)
            },
        }  # fmt: skip
    readings = read_depth(backbone, encoder, recipe, banks=banks, lens=lens)
    return {reading.task: depth_summary(reading, backbone.n_blocks) for reading in readings}, gained


def show(tasks: dict[str, Any], title: str) -> None:
    """Dips and overthinking, one line per task and curve."""
    print(f"\n{title}\n{'task':<10}{'read by':<12}{'deepest dip':>40}{'overthinking, any block':>26}")
    for task, own in tasks.items():
        for name, dip in own["dips"].items():
            low, high = dip["interval"]
            words = "none"
            if dip["depth"] > 0:
                words = f"{100 * dip['depth']:.1f} points [{100 * low:.1f}, {100 * high:.1f}] at block {dip['block']}"
            print(f"{task:<10}{name:<12}{words:>40}{own['overthinking'][name]['any']:>26.2%}")
        print(f"{task:<10}{'full model':<12}{'':>40}{'wrong on ' + format(1 - own['full_accuracy'], '.2%'):>26}")


if __name__ == "__main__":
    main()
