"""What one changed setting does to exits, over seeds: means, intervals, and differences paired by seed.

Runs of one seed see the same samples in the same order, so the difference to the base run of that seed says more than two means.
Knows numbers and names; does not know recipes, training or models.

Shape letters: S seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BASE = "base"
"""The runs that all others are compared with."""

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5% quantiles of Student's t distribution with 1 to 10 degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """Answer-token accuracy behind one block, for one task and one changed setting."""

    ablation: str
    task: str
    exit: int
    accuracy: tuple[float, ...]
    """Of S seeds, in their order."""
    interval: tuple[float, float] | None
    """95%, of the mean over seeds; None for one seed."""
    difference: float | None
    """Mean over seeds of the accuracy less the base's at this exit; None for the base, and where it has no such exit."""
    difference_interval: tuple[float, float] | None
    """95%, paired by seed."""
    trainable_parameters: int
    full: float
    """Accuracy of the full model on the same tokens."""
    tokens: int
    """Scored tokens."""

    def to_json(self) -> dict[str, Any]:
        """Every field by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> AblationRow:
        """Inverse of :meth:`to_json`; raises TypeError for other fields."""
        pairs = {name: raw[name] and tuple(raw[name]) for name in ("accuracy", "interval", "difference_interval")}
        return cls(**{**raw, **pairs})


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean of independent values (Student's t); None for a single one.

    Beyond 11 values the quantile of 11 is used, which is a little too wide.
    """
    if len(values) < 2:
        return None
    quantile = STUDENT[min(len(values) - 2, len(STUDENT) - 1)]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return mean - half, mean + half


def ablation_rows(
    accuracies: Mapping[str, Sequence[Mapping[int, float]]],
    *,
    task: str,
    full: float,
    tokens: int,
    parameters: Mapping[str, int],
) -> list[AblationRow]:
    """Rows of one task.  ``accuracies``: setting -> one mapping exit -> accuracy per seed, ``BASE`` among them.

    Raises ValueError without the base or with unlike numbers of seeds.
    """
    if BASE not in accuracies or len({len(runs) for runs in accuracies.values()}) != 1:
        counts = {name: len(runs) for name, runs in accuracies.items()}
        raise ValueError(f"want {BASE!r} and the same seeds for every setting, got {counts}")
    rows = []
    for name, runs in accuracies.items():
        for k in runs[0]:
            own = tuple(run[k] for run in runs)
            difference = paired = None
            if name != BASE and k in accuracies[BASE][0]:
                differences = [a - run[k] for a, run in zip(own, accuracies[BASE], strict=True)]
                difference, paired = statistics.mean(differences), mean_interval(differences)
            rows.append(
                AblationRow(
                    ablation=name,
                    task=task,
                    exit=k,
                    accuracy=own,
                    interval=mean_interval(own),
                    difference=difference,
                    difference_interval=paired,
                    trainable_parameters=parameters[name],
                    full=full,
                    tokens=tokens,
                )
            )
    return rows


def ablation_table(rows: Sequence[AblationRow]) -> list[list[str]]:
    """Cells of a table, headings first: a line per setting and exit, a column per task; ``*`` where the paired difference to
    the base is not 0 with 95% confidence."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    found = {(row.ablation, row.exit, row.task): row for row in rows}
    lines = [["setting", "exit", "trained", *tasks]]
    for name, k in dict.fromkeys((row.ablation, row.exit) for row in rows):
        any_row = next(row for row in rows if row.ablation == name)
        cells = [_cell(found[name, k, task]) if (name, k, task) in found else "-" for task in tasks]
        lines.append([name, str(k), f"{any_row.trainable_parameters / 1e6:.2f}M", *cells])
    return lines


def _cell(row: AblationRow) -> str:
    mean = f"{statistics.mean(row.accuracy):.3f}"
    if row.interval is not None:
        mean += f" ±{row.interval[1] - statistics.mean(row.accuracy):.3f}"
    if row.difference is None:
        return mean
    sure = row.difference_interval is not None and not row.difference_interval[0] <= 0 <= row.difference_interval[1]
    return f"{mean} ({row.difference:+.3f}{'*' if sure else ''})"
