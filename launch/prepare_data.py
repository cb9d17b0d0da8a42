#!/usr/bin/env python
"""Convert a published data set into WebDataset tar shards with a manifest per split.

python launch/prepare_data.py easyvqa
python launch/prepare_data.py openclipart                              # Debian's openclipart-png and openclipart-svg
python launch/prepare_data.py joined --sources data/easyvqa data/openclipart
python launch/prepare_data.py coco --annotations DIR --images DIR      # LAVIS's annotation files
"""

from __future__ import annotations

import argparse
from pathlib import Path

from free_dist.config import UserError
from free_dist.recipe_io import fail_clearly

EPILOG = """A finished split is kept if its shards match the checksums in its manifest, and made again otherwise."""

FROM_LAVIS = ("coco", "vqav2", "nocaps")
"""Data sets that are converted from the annotation files LAVIS downloads."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "dataset",
        choices=["easyvqa", "openclipart", "joined", *FROM_LAVIS],
        help="data set to convert; easyvqa comes from its PyPI package, openclipart from Debian's, joined from other data sets' "
        "shards, the rest from LAVIS's files",
    )
    parser.add_argument(
        "--annotations", type=Path, metavar="DIR", help="LAVIS's JSON files, as coco_karpathy_train.json"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="what the image paths in them are relative to")
    parser.add_argument("--sources", type=Path, nargs="+", metavar="DIR", default=[], help="prepared data sets to join")
    parser.add_argument("--out", type=Path, default=None, help="directory to write (default: data/DATASET)")
    arguments = parser.parse_args()
    with fail_clearly(parser):
        root = arguments.out or Path("data") / arguments.dataset
        convert(arguments.dataset, root, arguments.annotations, arguments.images, arguments.sources)


def convert(dataset: str, root: Path, annotations: Path | None, images: Path | None, sources: list[Path]) -> None:
    """Write all splits of ``dataset`` under ``root`` and say what they hold."""
    if (dataset in FROM_LAVIS) != (annotations is not None) or (annotations is None) != (images is None):
        raise UserError(
            f"{dataset}: --annotations and --images go together, with {', '.join(FROM_LAVIS)} and only those"
        )
    if bool(sources) != (dataset == "joined"):
        raise UserError("--sources goes with joined, and only that")
    from free_dist.data import easyvqa, joined, lavis_annotations, openclipart

    if annotations is not None and images is not None:
        manifests = lavis_annotations.prepare(dataset, annotations, images, root)
    elif dataset == "joined":
        manifests = joined.prepare(root, sources)
    else:
        manifests = easyvqa.prepare(root) if dataset == "easyvqa" else openclipart.prepare(root)
    for manifest in manifests:
        print(f"{root / manifest.split}: {manifest.samples} images in {len(manifest.shards)} shards")


if __name__ == "__main__":
    main()
