"""Rows of results: what each column means, ``results.json``, and the choice of the best operating point.

Knows nothing of models, data, tables or plots.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from free_dist.atomic import write_atomically

BASELINES = ("full", "hf")
"""Methods without early exits."""
SCHEMA = (
    "task",
    "method",
    "threshold",
    "quality",
    "quality_full",
    "agreement",
    "mean_blocks",
    "layer_ratio",
    "wall_ratio",
    "wall_ratio_hf",
    "n",
)
"""Keys every row of ``results.json`` has, in this order; further keys are extras."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operating point of one method on one task."""

    task: str
    method: str
    """``full`` (our decoder at full depth), ``hf`` (Hugging Face generate), ``exits``, or another bank's name."""
    threshold: float | None
    """Confidence threshold; None for the baselines."""
    quality: float
    """The task's metric on this row's samples: accuracy, or CIDEr-D for captions."""
    quality_full: float
    """The full model's, on the same samples."""
    agreement: float
    """Share of samples with exactly the full model's tokens."""
    mean_blocks: float
    """Block calls per generated token, exit transformers included as one block each."""
    layer_ratio: float
    """L / mean_blocks; a count, not a speed."""
    wall_ratio: float
    """Time of our full-depth decoder over this one's; > 1 is faster."""
    wall_ratio_hf: float | None
    """Time of Hugging Face ``generate`` over this one's; None where it was not run."""
    n: int
    """Samples."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Further columns, JSON-serialisable: intervals, bleu4, exit_shares, seed, ..."""

    @property
    def quality_ratio(self) -> float:
        """Quality relative to the full model's; nan where that is 0."""
        return self.quality / self.quality_full if self.quality_full else float("nan")

    @property
    def speed(self) -> float:
        """Wall-clock ratio against the *faster* of the two baselines."""
        return self.wall_ratio if self.wall_ratio_hf is None else min(self.wall_ratio, self.wall_ratio_hf)

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in ``results.json``."""
        overlap = self.extras.keys() & set(SCHEMA)
        if overlap:
            raise ValueError(f"extras may not replace the column {min(overlap)!r}")
        return {name: self.__dict__[name] for name in SCHEMA} | self.extras

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Row:
        """Inverse of :meth:`to_json`; raises ValueError naming a missing column."""
        missing = [name for name in SCHEMA if name not in raw]
        if missing:
            raise ValueError(f"results row lacks the column {missing[0]!r}")
        return cls(
            **{name: raw[name] for name in SCHEMA},
            extras={name: value for name, value in raw.items() if name not in SCHEMA},
        )


def best_row(rows: Iterable[Row], task: str, min_quality_ratio: float = 0.99, method: str | None = None) -> Row | None:
    """The early-exit row of a task that is fastest, against the faster baseline, and keeps ``min_quality_ratio``.

    ``method`` restricts it to one bank; thresholds from 1 up, which never exit, are not in the choice.  None when no
    row keeps enough.
    """
    kept = [
        row
        for row in rows
        if row.task == task
        and row.threshold is not None
        and row.threshold < 1
        and (method is None or row.method == method)
        and row.quality_ratio >= min_quality_ratio
    ]
    return max(kept, key=lambda row: row.speed, default=None)


def write_results(rows: Sequence[Row], run_dir: Path) -> Path:
    """Write ``results.json``, a list of rows, atomically."""
    path = run_dir / "results.json"
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps([row.to_json() for row in rows], indent=1) + "\n").encode())
    return path


def read_results(path: Path) -> list[Row]:
    """The rows of a ``results.json``."""
    return [Row.from_json(raw) for raw in json.loads(path.read_text())]


def tasks_of(rows: Iterable[Row]) -> list[str]:
    """The tasks among the rows, in order of appearance."""
    return list(dict.fromkeys(row.task for row in rows))
