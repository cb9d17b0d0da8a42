#!/usr/bin/env python
"""Train a small BLIP captioner and filter for launch/capfilt.py, on the captions of a data set that the published ones never saw.

    python launch/train_blip.py --data data/easyvqa --out runs/blip
    python launch/capfilt.py --source data/easyvqa --out data/easyvqa_capfilt --captioner runs/blip/captioner \
        --filter runs/blip/filter --min-length 6 --max-length 35

Both see images through the frozen vision tower of a BLIP-2 backbone, whose shape is BLIP's.  Writes two Hugging Face directories,
captioner and filter, and training.json with what they were made from; the same command again keeps them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from free_dist.config import UserError
from free_dist.recipe_io import fail_clearly, positive_integer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data set with captions")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--images", type=positive_integer, metavar="N", help="so many of its images (default: all)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where captioner and filter go")
    parser.add_argument(
        "--backbone", default="embedded", metavar="DIR", help="BLIP-2 that gives the vision tower (default: embedded)"
    )
    parser.add_argument("--steps", type=positive_integer, default=600, help="of each model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    with fail_clearly(parser):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Train both unless that was done before, and say where they lie."""
    from itertools import islice

    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from free_dist.atomic import write_atomically
    from free_dist.data.capfilt_training import MODELS, BlipTraining, train_blip
    from free_dist.data.pretrained import load_pretrained
    from free_dist.data.stream import records

    record = arguments.out / "training.json"
    made_from = {
        "data": str(arguments.data), "split": arguments.split, "images": arguments.images, "backbone": arguments.backbone,
        "steps": arguments.steps, "seed": arguments.seed,
    }  # fmt: skip
    if record.is_file() and (before := json.loads(record.read_text())) != made_from:
        other = next(name for name in made_from if before.get(name) != made_from[name])
        raise UserError(
            f"--out {arguments.out} holds models of another --{other} ({before.get(other)!r}): choose another or remove it"
        )
    if not record.is_file():
        disable_progress_bar()
        backbone, encoder = load_pretrained(arguments.backbone)
        train_blip(
            islice(records(arguments.data, arguments.split), arguments.images),
            getattr(backbone.model, "vision_model", None),
            encoder.image_processor,
            arguments.out,
            BlipTraining(steps=arguments.steps, seed=arguments.seed),
            progress=lambda steps, name: tqdm(steps, desc=name, unit="step", mininterval=1.0),
        )
        write_atomically(record, json.dumps(made_from, indent=1).encode() + b"\n")
    for name in MODELS:
        print(arguments.out / name)


if __name__ == "__main__":
    main()
