#!/usr/bin/env python
"""Choose confidence thresholds with a guarantee: quality loss <= epsilon with probability 1 - delta, on the calibration split.

Decodes the calibration split of one task at a path of thresholds, compares every answer with the full model's, certifies as
much of the path as the numbers allow and writes DIR/calibration-TASK.json. The exits themselves are not touched. One process.
The guarantee is for images like those of the calibration split, and for one task at a time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from free_dist.config import TASKS, ConfigError, MissingFileError, Recipe
from free_dist.recipe_io import (
    add_device_arguments,
    add_recipe_arguments,
    fail_clearly,
    load_recipe,
    open_share,
    positive_integer,
)

if TYPE_CHECKING:
    from free_dist.decoding.calibrate import Decision
    from free_dist.evaluation.calibration import Calibration, LossTable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exits", type=Path, required=True, metavar="DIR", help="exits.safetensors and exits.json")
    parser.add_argument("--task", choices=TASKS, required=True, help="thresholds hold for one task")
    parser.add_argument(
        "--epsilon", type=open_share, default=0.01, metavar="LOSS",
        help="largest expected loss: accuracy points for vqa and dialogue, share of a caption's CIDEr-D (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--delta", type=open_share, default=0.05, metavar="PROBABILITY",
        help="chance that the promise fails; ltt only (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=("ltt", "crc"), default="ltt",
        help="ltt: with probability 1 - delta; crc: in expectation over calibrations (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--loss", choices=("harm", "agreement"), default="harm",
        help="harm: lost quality; agreement: share of answers that differ from the full model's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--per-exit", action="store_true",
        help="a threshold for every exit, found on half of the images and tested on the other half",
    )  # fmt: skip
    parser.add_argument(
        "--resplits", type=positive_integer, metavar="COUNT",
        help="then repeat the calibration on so many fresh draws from the same losses and count broken promises",
    )  # fmt: skip
    add_device_arguments(parser)
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        # A saved recipe names the split its evaluation used; only a word on this command line is about calibration.
        recipe = load_recipe(arguments.config, ["evaluation.split=calibration", *arguments.overrides])
        if recipe.evaluation.split != "calibration":
            raise ConfigError(
                f"evaluation.split={recipe.evaluation.split!r}: a split that chose thresholds cannot test them any more; "
                "leave it out, calibration is done on the calibration split"
            )
        if not arguments.exits.is_dir():
            raise MissingFileError(f"--exits {arguments.exits}: no such directory")
        run(recipe, arguments)


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Calibrate, write the file and print the table."""
    from transformers.utils.logging import disable_progress_bar

    from free_dist.data.pretrained import load_for_inference
    from free_dist.decoding.calibrate import calibrate
    from free_dist.evaluation.calibration import OFF, CalibrationSet, write_calibration
    from free_dist.exits.export import load_exits, read_exits_manifest

    disable_progress_bar()
    manifest = read_exits_manifest(arguments.exits)
    backbone, encoder = load_for_inference(recipe.backbone, device=arguments.device, dtype=arguments.dtype)
    bank = load_exits(backbone, arguments.exits)
    samples = CalibrationSet(backbone, encoder, bank, recipe, arguments.task, loss=arguments.loss)
    if arguments.per_exit:
        search, test = samples.halves()
        candidates = samples.candidates_per_exit(search)
    else:
        candidates, test = samples.shared_candidates(), list(range(samples.n_images))
    table = samples.tabulate(candidates, test)
    decision = calibrate(
        table.losses, table.costs, table.full_cost,
        method=arguments.method, epsilon=arguments.epsilon, delta=arguments.delta,
    )  # fmt: skip
    off = (OFF,) * samples.n_exits
    calibration = record(
        recipe, arguments, table, decision,
        thresholds=off if decision.chosen is None else table.candidates[decision.chosen],
        exit_layers=manifest.exit_layers, backbone_hash=manifest.backbone_hash, weights_sha256=manifest.weights_sha256,
    )  # fmt: skip
    path = write_calibration(calibration, arguments.exits)
    show(arguments, table, decision, calibration)
    print(f"{samples.decodes} answers of {len(samples.samples)} samples decoded\n{path}")
    if arguments.resplits:
        show_resplits(arguments, table)


def record(
    recipe: Recipe, arguments: argparse.Namespace, table: LossTable, decision: Decision,
    *, thresholds: tuple[float, ...], exit_layers: tuple[int, ...], backbone_hash: str, weights_sha256: str,
) -> Calibration:  # fmt: skip
    """Everything that ``calibration-TASK.json`` keeps."""
    from free_dist.evaluation.calibration import FORMAT_VERSION, Calibration

    value_name = "p_value" if arguments.method == "ltt" else "bound"
    rows = [
        {
            "thresholds": candidate,
            "mean_loss": float(table.losses[:, c].mean()),
            value_name: decision.values[c],
            "certified": decision.certified[c],
            "blocks_per_token": float(table.blocks[c]),
            "cost_per_token": float(table.costs[c]),
            "quality": float(table.quality[c]),
        }
        for c, candidate in enumerate(table.candidates)
    ]
    what = "expected harm (lost quality)" if arguments.loss == "harm" else "expected share of changed answers"
    sure = (
        f"with probability {1 - arguments.delta:g}, " if arguments.method == "ltt" else "on average over calibrations, "
    )
    return Calibration(
        format_version=FORMAT_VERSION,
        task=arguments.task,
        method=arguments.method,
        loss=arguments.loss,
        epsilon=arguments.epsilon,
        delta=arguments.delta if arguments.method == "ltt" else None,
        guarantee=f"{sure}the {what} per image on {arguments.task} is at most {arguments.epsilon:g}",
        thresholds=thresholds,
        n_images=len(table.losses),
        n_samples=table.n_samples,
        exit_layers=exit_layers,
        backbone_hash=backbone_hash,
        weights_sha256=weights_sha256,
        settings={
            "decoding.max_new_tokens": recipe.decoding.max_new_tokens,
            "data.question_prompt": recipe.data.question_prompt,
            "data.caption_prompt": recipe.data.caption_prompt,
            "data.max_turns": recipe.data.max_turns,
            "evaluation.max_samples": recipe.evaluation.max_samples,
        },
        full_quality=table.full_quality,
        full_cost_per_token=table.full_cost,
        candidates=tuple(rows),
    )


def show(arguments: argparse.Namespace, table: LossTable, decision: Decision, calibration: Calibration) -> None:
    """Print the candidates and what came of them."""
    from free_dist.decoding.calibrate import smallest_epsilon

    value_name = "p-value" if arguments.method == "ltt" else "bound"
    n = calibration.n_images
    print(f"\n{arguments.task}: {n} images, {table.n_samples} samples; full model: quality {table.full_quality:.4f}, "
          f"{table.full_cost:.2f} weights read per token, in blocks")  # fmt: skip
    width = max(10, *(len(thresholds_text(candidate)) for candidate in table.candidates), 0)
    print(
        f"{'thresholds':<{width}} {'mean loss':>10} {value_name:>9} {'quality':>8} {'blocks/token':>13} {'cost':>6}  certified"
    )
    for c, candidate in enumerate(table.candidates):
        print(
            f"{thresholds_text(candidate):<{width}} {table.losses[:, c].mean():>10.4f} {decision.values[c]:>9.2g} "
            f"{table.quality[c]:>8.4f} {table.blocks[c]:>13.2f} {table.costs[c]:>6.2f}  "
            f"{'yes' if decision.certified[c] else 'no'}{' <- chosen' if c == decision.chosen else ''}"
        )
    if decision.chosen is not None:
        print(f"thresholds {thresholds_text(calibration.thresholds)}: {calibration.guarantee}")
        return
    print(
        f"nothing cheaper than the full model could be certified: thresholds {thresholds_text(calibration.thresholds)}"
    )
    totals = {"an exit without any loss": 0.0}
    if table.candidates:
        totals["the first candidate"] = float(table.losses[:, 0].sum())
    for what, total in totals.items():
        least = smallest_epsilon(total, n, method=arguments.method, delta=arguments.delta)
        print(f"with {n} images the smallest epsilon for {what} is {least:.4f}")


def show_resplits(arguments: argparse.Namespace, table: LossTable) -> None:
    """Print how often the promise was broken on fresh draws from the losses of this run."""
    from free_dist.decoding.calibrate import resplit

    found = resplit(
        table.losses, table.costs, table.full_cost,
        method=arguments.method, epsilon=arguments.epsilon, delta=arguments.delta, repeats=arguments.resplits,
    )  # fmt: skip
    n = found.repeats
    promise = f"at most {arguments.delta:g} promised" if arguments.method == "ltt" else "crc promises none"
    print(
        f"\n{n} resplits: {len(table.losses)} images drawn with replacement, the loss of all of them taken as the truth"
    )
    print(f"above epsilon={arguments.epsilon:g}: {found.violations} of {n} ({found.violations / n:.3f}; {promise})")
    print(f"above epsilon when the cheapest with an observed mean below it is taken: {found.naive_violations / n:.3f}")
    print(f"cheaper than the full model: {found.faster} of {n}; mean loss {found.mean_loss:.4f}, "
          f"mean cost {found.mean_cost:.2f} of {table.full_cost:.2f}")  # fmt: skip
    print(f"{found.unsafe_candidates} of {len(table.candidates)} candidates are truly above epsilon")


def thresholds_text(thresholds: tuple[float, ...]) -> str:
    """``0.90000`` where all are equal, else one per exit; ``off`` from 1 up."""
    words = ["off" if threshold >= 1 else f"{threshold:.5f}" for threshold in thresholds]
    return words[0] if len(set(words)) == 1 else " ".join(words)


if __name__ == "__main__":
    main()
