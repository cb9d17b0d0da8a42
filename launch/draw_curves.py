#!/usr/bin/env python
"""Draw the curves of a training run from its log.jsonl alone.

python launch/draw_curves.py runs/default
"""

from __future__ import annotations

import argparse
from pathlib import Path

from free_dist.recipe_io import fail_clearly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="directory of the run")
    parser.add_argument("--output", type=Path, help="PNG file; default: curves.png in the run's directory")
    arguments = parser.parse_args()
    with fail_clearly(parser):
        from free_dist.evaluation.training_curves import draw_training_curves

        print(draw_training_curves(arguments.run_dir, arguments.output or arguments.run_dir / "curves.png"))


if __name__ == "__main__":
    main()
