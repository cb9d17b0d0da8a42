#!/usr/bin/env python
"""One page about one or several runs: quality and speed, exits, comparison, placement, mid-crisis, robustness, costs,
provenance.

Writes report.html (one file, works offline) and report.md (plots beside it, in report_plots) into the first RUN, or
into --out. It shows what was measured and names, for everything else, the command that measures it. --complete runs
those commands first, in this order: quickstart, compare, place_exits, probe_depth, robustness, ablate; what is there
already is kept. A directory without a run is then made by the quickstart."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from free_dist.config import UserError
from free_dist.recipe_io import fail_clearly

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, such as runs/quickstart")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: the first RUN)")
    parser.add_argument("--complete", action="store_true", help="first measure whatever is missing; takes long")
    arguments = parser.parse_args()
    with fail_clearly(parser):
        from free_dist.evaluation.report import write_run_report
        from free_dist.evaluation.report_sources import RunDirectory

        if arguments.complete:
            for run in arguments.runs:
                complete(run)
        runs = [RunDirectory.open(run) for run in arguments.runs]
        out = arguments.out or arguments.runs[0]
        words = [word for word in sys.argv[1:] if word != "--complete"]
        pages, gaps = write_run_report(runs, out, command=shlex.join(["python", "launch/report.py", *words]))
    for gap in gaps:
        print(f"{gap.said}; make it with: {gap.command}")
    for path in pages:
        print(path)


def complete(run: Path) -> None:
    """Run the steps whose files are missing, in order; raises UserError for one that fails."""
    from free_dist.evaluation.report_sources import STEPS, RunDirectory

    for step in STEPS:
        # Asked anew each time: one step may make what another needs.
        if run.is_dir() and any(run.iterdir()) and RunDirectory.open(run).measured(step.file) is not None:
            continue
        words = shlex.split(RunDirectory(path=run).command(step))
        print(f"\n{step.name}: {shlex.join(words)}", flush=True)
        code = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=False).returncode
        if code:
            raise UserError(f"{words[1]} ended with code {code}: see its messages above; --complete goes on from there")


if __name__ == "__main__":
    main()
