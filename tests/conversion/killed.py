"""A program that converts and is killed while it reads one image: ``killed.py IMAGES ROOT FATAL_NAME``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from made_up import drafts_of

from free_dist.data.conversion import ConversionOptions, SplitSource, convert


def main() -> None:
    """Die, as by a power cut, when the fatal image is due."""
    images, root, fatal = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

    def read(path: Path) -> bytes:
        if path.name == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return path.read_bytes()

    source = SplitSource(split="train", drafts=lambda: drafts_of(images))
    convert(root, "made-up", [source], ConversionOptions(records_per_shard=3, read=read))


if __name__ == "__main__":
    main()
