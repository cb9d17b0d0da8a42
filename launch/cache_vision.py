#!/usr/bin/env python
"""Compute the frozen vision network's output once for every image of the shards, for training with data.visual_cache.

    python launch/cache_vision.py --config launch/recipes/finetune_smollm2.yaml

Reads backbone.path, data.root and data.visual_cache of the recipe.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from free_dist.config import ConfigError, Recipe
from free_dist.recipe_io import add_recipe_arguments, fail_clearly, load_recipe

SPLITS = ("train", "calibration", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        fill(load_recipe(arguments.config, arguments.overrides))


def fill(recipe: Recipe) -> None:
    """Write the cache that the recipe names, and say what it holds."""
    if recipe.data.visual_cache is None:
        raise ConfigError("data.visual_cache=None: want the directory to write")
    from tqdm import tqdm

    from free_dist.backbones import FeatureLmBackbone
    from free_dist.data.pretrained import load_pretrained
    from free_dist.data.stream import records
    from free_dist.data.visual_cache import VisualCache, make_cache

    backbone, encoder = load_pretrained(recipe.backbone.path)
    if not isinstance(backbone, FeatureLmBackbone):
        raise ConfigError(f"backbone.path={recipe.backbone.path}: only a feature_lm backbone has a visual cache")
    images = (record.image for split in SPLITS for record in records(recipe.data, split))
    directory = Path(recipe.data.visual_cache)
    make_cache(directory, images, backbone, encoder, lambda batches: tqdm(batches, desc="vision", unit="batch"))
    print(f"{directory}: {len(VisualCache(directory, backbone, encoder))} images")


if __name__ == "__main__":
    main()
