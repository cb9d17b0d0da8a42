#!/usr/bin/env python
"""Convert a published data set into WebDataset tar shards with a manifest per split."""

from __future__ import annotations

import argparse
from pathlib import Path

from free_dist.recipe_io import fail_clearly

EPILOG = """A finished split is kept if its shards match the checksums in its manifest, and made again otherwise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("dataset", choices=["easyvqa"], help="data set to convert; easyvqa comes from its PyPI package")
    parser.add_argument("--out", type=Path, default=None, help="directory to write (default: data/DATASET)")
    arguments = parser.parse_args()
    with fail_clearly(parser):
        convert(arguments.dataset, arguments.out or Path("data") / arguments.dataset)


def convert(dataset: str, root: Path) -> None:
    """Write all splits of ``dataset`` under ``root`` and say what they hold."""
    from free_dist.data import easyvqa

    assert dataset == "easyvqa"
    for manifest in easyvqa.prepare(root):
        print(f"{root / manifest.split}: {manifest.samples} images in {len(manifest.shards)} shards")


if __name__ == "__main__":
    main()
