"""The benchmark of the stream prints its figures as one JSON line, last."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "stream.py"


def test_the_last_line_is_json_with_every_figure() -> None:
    command = [sys.executable, str(PROGRAM), "--records", "64", "--side", "64", "--rounds", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    figures = json.loads(printed.splitlines()[-1])
    assert {"ratio_to_webdataset", "ratio_cold", "ratio_decoded", "ratio_to_random_access"} <= set(figures)
    assert figures["samples"] == 64
    assert figures["seek_ratio_99_to_1"] > 0
