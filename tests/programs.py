"""Runs several launchers in one process, because imports take longer than what tests ask of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent
IN_TURN = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    print("$", *command, flush=True)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
"""Each as a program of its own would."""


def started(command: Sequence[object]) -> str:
    """Run a program to its end and return what it printed; it must succeed."""
    path = os.pathsep.join((str(SCRIPTS), os.environ["PATH"]))
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [str(word) for word in command],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def launchers(*commands: Sequence[object]) -> str:
    """Run launchers, each with its arguments, one after the other; returns what they printed."""
    words = [[str(word) for word in command] for command in commands]
    return started([sys.executable, "-c", IN_TURN, json.dumps(words)])
