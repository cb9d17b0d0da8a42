#!/usr/bin/env python
"""Gather trained exits in one directory that can be shared: weights, manifest, calibrated thresholds, checks, model card.

Run launch/calibrate.py and launch/fit_checks.py on the exits before, if what they make should travel along. The backbone is not
copied; its files are hashed, so whoever loads the exits is told when theirs is another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from free_dist.config import EMBEDDED_BACKBONE, MissingFileError, Recipe, UserError
from free_dist.recipe_io import fail_clearly, load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", type=Path, metavar="DIR", help="directory of a training run: its recipe.yaml and export/"
    )
    source.add_argument(
        "--exits", type=Path, metavar="DIR", help="an export by itself: exits.safetensors and exits.json"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--replace", action="store_true", help="make --out anew if it holds an export already")
    parser.add_argument(
        "--backbone",
        metavar="DIR",
        help="what the exits were trained on; default: the recipe's, or embedded with --exits",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not look at the backbone's files at all")

    card = parser.add_argument_group("model card")
    card.add_argument("--title", default="Early exits", help="first heading (default: %(default)s)")
    card.add_argument("--card-note", default="", metavar="TEXT", help="a paragraph of your own")
    card.add_argument(
        "--base-model", default="", metavar="ID", help="hub id of the backbone, such as Salesforce/blip2-opt-2.7b"
    )
    card.add_argument(
        "--license", default="", metavar="ID",
        help="licence of the exits; default: apache-2.0 on the embedded backbone, other (the backbone's own) elsewhere",
    )  # fmt: skip
    card.add_argument(
        "--results", type=Path, metavar="FILE", help="results.json of launch/evaluate.py: the measured quality"
    )

    hub = parser.add_argument_group("hub")
    hub.add_argument(
        "--push", metavar="OWNER/NAME", help="then upload the directory there, with huggingface_hub's own login"
    )
    hub.add_argument("--private", action="store_true", help="a repository that --push makes is private")
    arguments = parser.parse_args()
    with fail_clearly(parser):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Make the directory, say what it holds, and upload it if that is asked for."""
    exits, recipe = find_exits(arguments)
    if arguments.private and not arguments.push:
        raise UserError("--private has a meaning only with --push; add that, or drop it")
    if arguments.results is not None and not arguments.results.is_file():
        raise MissingFileError(f"--results {arguments.results}: no such file; launch/evaluate.py writes one")

    from transformers.utils.logging import disable_progress_bar

    from free_dist.evaluation.release import build_release
    from free_dist.exits.hub import push_to_hub
    from free_dist.exits.model_card import CardNotes

    disable_progress_bar()
    backbone = arguments.backbone or (EMBEDDED_BACKBONE if recipe is None else recipe.backbone.path)
    notes = CardNotes(
        title=arguments.title, note=arguments.card_note, base_model=arguments.base_model, license=arguments.license
    )
    manifest = build_release(
        exits, arguments.out, backbone=backbone, recipe=recipe, notes=notes, results=arguments.results,
        verify=not arguments.no_verify, replace_old=arguments.replace,
    )  # fmt: skip
    for path in sorted(arguments.out.iterdir()):
        print(f"{path.stat().st_size:>13,}  {path}")
    name = "unknown" if manifest.backbone is None else manifest.backbone.name
    print(f"{manifest.variant.name} exits after blocks {', '.join(map(str, manifest.exit_layers))} of backbone {name}")
    print(
        f"default thresholds {' '.join(f'{value:g}' for value in manifest.thresholds)}: {manifest.calibration or 'unknown'}"
    )
    for task, found in manifest.calibrated.items():
        print(f"{task} thresholds {' '.join(f'{value:g}' for value in found.thresholds)}: {found.guarantee}")
    if arguments.push:
        print(push_to_hub(arguments.out, arguments.push, private=arguments.private))


def find_exits(arguments: argparse.Namespace) -> tuple[Path, Recipe | None]:
    """The export that the flags name, and the recipe of its run where that is known; raises MissingFileError."""
    if arguments.exits is not None:
        if not arguments.exits.is_dir():
            raise MissingFileError(f"--exits {arguments.exits}: no such directory")
        return arguments.exits, None
    for wanted in (arguments.run / "recipe.yaml", arguments.run / "export"):
        if not wanted.exists():
            raise MissingFileError(
                f"--run {arguments.run}: {wanted} does not exist; give the run_dir of launch/train.py"
            )
    return arguments.run / "export", load_recipe(arguments.run / "recipe.yaml")


if __name__ == "__main__":
    main()
