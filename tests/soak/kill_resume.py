#!/usr/bin/env python
"""Kills training with SIGKILL at random moments, saves included, goes on, and compares with a run that nobody killed.

    python tests/soak/kill_resume.py --kills 50 --seed 0

Losses, weights, optimizer, random numbers and sample ids must be equal bit by bit.  A run is killed up to five times before it
may end; a kill counts as passed when the run that it interrupted ends equal.  Prints ``N passed, M failed`` last; exit code 1
where one failed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, here and in the ranks

import exit_runs

from free_dist.config import Recipe

VARIANTS = (
    {"size": 1, "exits": 1, "discriminators": 1},
    {"size": 2, "exits": 2, "discriminators": 1},
    {"size": 2, "exits": 3, "discriminators": 3, "accumulation": 2},
    {"size": 2, "exits": 1, "discriminators": 2, "bf16": True},
)
MOST_KILLS = 5
"""Kills of one run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as place:
        passed, failed = soak(Path(place), arguments.kills, arguments.seed)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


def soak(workplace: Path, kills: int, seed: int, variants: tuple[dict, ...] = VARIANTS) -> tuple[int, int]:
    """Kill so often; returns how many kills passed and how many failed."""
    rng = random.Random(seed)
    exit_runs.prepare(workplace)
    whole: dict[int, Recipe] = {}
    passed = failed = number = 0
    while passed + failed < kills:
        chosen = number % len(variants)
        size = variants[chosen]["size"]
        sections = exit_runs.sections(**variants[chosen])
        if chosen not in whole:
            whole[chosen] = exit_runs.recipe(workplace, f"whole-{chosen}")
            exit_runs.ranks.run_ranks(size, exit_runs.train_here, whole[chosen], sections)
        cut = exit_runs.renamed(whole[chosen], workplace / f"cut-{number}")
        wanted = min(rng.randint(1, MOST_KILLS), kills - passed - failed)
        done = 0
        while done < wanted:
            about = exit_runs.run_until_killed(rng, size, cut, sections, rng.choice(["any", "save"]))
            if about is None:  # it was at its end before the moment came
                break
            done += 1
            print(f"run {number} on {size} process(es): killed {about}", flush=True)
        exit_runs.ranks.run_ranks(size, exit_runs.train_here, cut, sections)
        unequal = exit_runs.differences(Path(whole[chosen].run_dir), Path(cut.run_dir))
        if unequal:
            print(f"run {number}: differs from the whole run in {', '.join(unequal)}", flush=True)
            failed += done
        else:
            passed += done
        number += 1
    return passed, failed


if __name__ == "__main__":
    raise SystemExit(main())
