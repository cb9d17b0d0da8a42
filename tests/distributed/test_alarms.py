"""Alarms on really broken trainings, and silence on healthy ones: real engines, a real log, a real TensorBoard page."""

from __future__ import annotations

import broken_runs
import pytest
import scene
from broken_runs import Log
from ranks import run_ranks


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[Log, str]]:
    return run_ranks(1, broken_runs.one_process)[0]


def events(log: Log) -> dict[str, list[str]]:
    """Messages by alarm."""
    found: dict[str, list[str]] = {}
    for line in log:
        if "event" in line:
            found.setdefault(line["event"], []).append(line["message"])
    return found


def test_show(runs) -> None:
    for name, (log, error) in runs.items():
        print("\n==", name, error)
        for event, messages in events(log).items():
            print("  ", event, len(messages), messages[0])
        last = [line for line in log if "event" not in line][-1]
        print(
            {
                k: round(v, 3)
                for k, v in last.items()
                if "ratio" in k
                or "cosine" in k
                or "accuracy_real" in k
                or "accuracy_fake" in k
                or "calib" in k
                or "gap" in k
                or "kl" in k
                or "eos" in k
                or "exit_share" in k
                or "norm" in k
                or "mfu" in k
                or "wait" in k
            }
        )
