#!/usr/bin/env python
"""Compute the frozen vision tower's output once for every image of the shards, for training with data.visual_cache.

    python launch/cache_vision.py --config launch/recipes/finetune_smollm2.yaml
    python launch/cache_vision.py --config RECIPE --dry-run                 # what it saves, and how large it will be
    python launch/cache_vision.py --config RECIPE --part 1/4                # one of four processes; then once without --part

Reads backbone.path, data.root and data.visual_cache of the recipe.  An interrupted cache goes on where it stopped, and images
that were added to data.root later are added to it.  After SIGTERM or SIGUSR1 it writes what it has and ends with code 85.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from free_dist.config import ConfigError, Recipe, UserError
from free_dist.recipe_io import add_device_argument, add_recipe_arguments, fail_clearly, load_recipe, positive_integer
from free_dist.stopping import Interrupted, StopSignals, stop_clearly

if TYPE_CHECKING:
    from free_dist.backbones import Blip2Backbone
    from free_dist.data.samples import SampleEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--store",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of features on disk: float32 gives the losses of pixels, the others take half of it (default: %(default)s)",
    )
    add_device_argument(parser)
    parser.add_argument(
        "--shard-mb", type=positive_integer, default=256, help="most MiB of one file (default: %(default)s)"
    )
    parser.add_argument(
        "--part", metavar="K/N", help="compute the K-th of N parts of the images and write no index; 1/4 to 4/4"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what the cache saves and takes, and stop")
    parser.add_argument(
        "--check", action="store_true", help="read the finished cache and compare its files with their checksums"
    )
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        recipe = load_recipe(arguments.config, arguments.overrides)
        if recipe.data.visual_cache is None:
            raise ConfigError("data.visual_cache=None: want the directory to write")
        if arguments.check:
            check(Path(recipe.data.visual_cache))
        else:
            with stop_clearly() as stop:
                fill(recipe, arguments, stop)


def fill(recipe: Recipe, arguments: argparse.Namespace, stop: StopSignals) -> None:
    """Say what the cache saves and takes, then write it and say what it holds; raises Interrupted when asked to stop."""
    part = parse_part(arguments.part)
    from tqdm import tqdm

    from free_dist.data.pretrained import load_for_inference
    from free_dist.data.shards import SPLITS, ShardError, read_manifest
    from free_dist.data.stream import records
    from free_dist.data.visual_cache import VisualCache
    from free_dist.data.visual_cache_maker import CacheMaker

    directory = Path(str(recipe.data.visual_cache))
    manifests = {}
    for split in SPLITS:
        with suppress(ShardError):
            manifests[split] = read_manifest(recipe.data.root, split)
    if not manifests:
        raise UserError(
            f"data.root: {recipe.data.root} has none of the splits {', '.join(SPLITS)}; run launch/prepare_data.py"
        )
    backbone, encoder = load_for_inference(recipe.backbone, device=arguments.device)
    images = sum(manifest.samples for manifest in manifests.values())
    estimate(recipe, images, directory, backbone, encoder, arguments.store)
    if arguments.dry_run:
        return
    maker = CacheMaker(directory, backbone, encoder, store=arguments.store, shard_bytes=arguments.shard_mb * 2**20)
    if maker.known:
        print(f"{directory} holds {len(maker.known):,} images already")
    encoded = (record.image for split in manifests for record in records(recipe.data, split))

    def progress(batches: Iterable[list[bytes]]) -> Iterator[list[bytes]]:
        # Ended early, it makes the maker write what it has.
        yield from itertools.takewhile(
            lambda _: not stop.asked, tqdm(batches, desc="vision", unit="batch", mininterval=0.5)
        )  # fmt: skip

    maker.add(encoded, part=part, progress=progress)
    if stop.asked:
        raise Interrupted(f"stopped: {directory} keeps {len(maker.known):,} images; the same command goes on")
    if part != (0, 1):
        print(f"part {arguments.part} is done; when all are, run this once without --part")
        return
    maker.finish()
    size = sum(path.stat().st_size for path in directory.iterdir())
    lost = f"; {len(maker.unreadable)} do not decode" if maker.unreadable else ""
    print(f"{directory}: {len(VisualCache(directory, backbone, encoder)):,} images, {size / 1e9:.3f} GB{lost}")


def estimate(
    recipe: Recipe,
    images: int,
    directory: Path,
    backbone: Blip2Backbone,
    encoder: SampleEncoder,
    store: str,
) -> None:
    """Print what the cache will save of a training sample and take of the disk; raises UserError where that is full."""
    from free_dist.backbones.embedded import resolve_backbone
    from free_dist.data.visual_cache_maker import FILES, cache_bytes, features_shape
    from free_dist.planning.vision_share import vision_share

    for stage, share in vision_share(resolve_backbone(recipe.backbone.path), recipe).items():
        print(f"stage {stage}: the cache saves {share:.1%} of the floating-point operations of a training sample")
    shape = features_shape(backbone, encoder)
    wanted = cache_bytes(images, shape, store)
    there = sum(path.stat().st_size for path in directory.glob(FILES)) if directory.is_dir() else 0
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    print(
        f"{images:,} images of {shape[0]} x {shape[1]} {store}: at most {wanted / 1e9:.3f} GB under {directory}, "
        f"{there / 1e9:.3f} GB of which are there; {free / 1e9:.1f} GB of that disk are free"
    )
    if wanted - there > free:
        raise UserError(f"data.visual_cache: {directory} lacks space: choose another disk, or --store bfloat16")


def check(directory: Path) -> None:
    """Read all of a finished cache; raises UserError naming the files that are not as they were written."""
    from free_dist.data.visual_cache_maker import damaged_files

    damaged = damaged_files(directory)
    if damaged:
        raise UserError(f"{directory}: damaged: {', '.join(damaged)}; remove these files and run this without --check")
    print(f"{directory}: every file is as it was written")


def parse_part(text: str | None) -> tuple[int, int]:
    """``2/4`` -> (1, 4); None -> (0, 1); raises UserError."""
    if text is None:
        return 0, 1
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if found is None or int(found[1]) > int(found[2]):
        raise UserError(f"--part {text}: want K/N with K from 1 to N, such as 1/4")
    return int(found[1]) - 1, int(found[2])


if __name__ == "__main__":
    main()
