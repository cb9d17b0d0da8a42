#!/usr/bin/env python
"""Convert a published data set into WebDataset tar shards with a manifest per split."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("dataset", choices=["easyvqa"], help="data set to convert; easyvqa comes from its PyPI package")
    parser.add_argument("--out", type=Path, default=None, help="directory to write; default: data/DATASET")
    arguments = parser.parse_args()
    from free_dist.data import easyvqa

    root = arguments.out or Path("data") / arguments.dataset
    for manifest in easyvqa.prepare(root):
        print(f"{root / manifest.split}: {manifest.samples} images in {len(manifest.shards)} shards")


if __name__ == "__main__":
    main()
