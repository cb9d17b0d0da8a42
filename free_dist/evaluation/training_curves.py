"""The curves of a training run as one PNG, from its ``log.jsonl`` alone: every number that TensorBoard has, and every event.

Numbers are grouped into panels by their names: ``loss_vqa/exit_2`` stands in the panel ``loss_vqa`` as ``exit_2``.  Does not
know what the numbers mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import isfinite
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from free_dist.atomic import write_atomically
from free_dist.config import MissingFileError, UserError

COLUMNS = 4
DPI = 90


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What a ``log.jsonl`` holds."""

    curves: Mapping[str, Sequence[tuple[int, float]]]
    """Name -> (step, value), in order of steps."""
    events: Sequence[tuple[int, str, str]]
    """(step, name, message) of alarms, skipped steps and lost ranks."""


def read_log(path: Path) -> RunLog:
    """Read a run's log; a line that a crash tore is left out.

    Raises MissingFileError if there is none, UserError if it holds no line that can be read.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: want the directory of a training run")
    curves: dict[str, list[tuple[int, float]]] = {}
    events = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "event" in line:
            events.append((int(line["step"]), str(line["event"]), str(line["message"])))
            continue
        for name, value in line.items():
            if name not in ("step", "time"):
                curves.setdefault(name, []).append((int(line["step"]), float(value)))
    if not curves and not events:
        raise UserError(f"{path} holds no logged step")
    return RunLog(curves=curves, events=events)


def panels_of(log: RunLog) -> dict[str, dict[str, Sequence[tuple[int, float]]]]:
    """Group -> name in it -> points."""
    groups: dict[str, dict[str, Sequence[tuple[int, float]]]] = {}
    for name, points in sorted(log.curves.items()):
        group, _, label = name.partition("/")
        groups.setdefault(group, {})[label or group] = points
    return groups


def draw_panel(
    axes: Any, group: str, lines: Mapping[str, Sequence[tuple[int, float]]], events: Sequence[tuple[int, str, str]]
) -> None:
    """A line per number of one group; events are dashed lines."""
    for label, points in lines.items():
        known = [(step, value) for step, value in points if isfinite(value)]
        axes.plot([step for step, _ in known], [value for _, value in known], label=label, linewidth=1)
    for step, _, _ in events:
        axes.axvline(step, color="#b00020", linewidth=0.6, linestyle="--")
    axes.set_title(group, fontsize=9)
    axes.grid(True, linewidth=0.3, alpha=0.5)
    axes.legend(fontsize=6)


def training_curves(log: RunLog) -> Figure:
    """One panel per group of numbers, a line per number; events are dashed lines in every panel, named in the title."""
    groups = panels_of(log)
    rows = -(-max(1, len(groups)) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    for axes, (group, lines) in zip(panels, groups.items(), strict=False):
        draw_panel(axes, group, lines, log.events)
    counts: dict[str, int] = {}
    for _, name, _ in log.events:
        counts[name] = counts.get(name, 0) + 1
    said = ", ".join(f"{name} x {count}" for name, count in counts.items())
    figure.suptitle(f"Training curves{': ' + said if said else ''}", fontsize=11)
    return figure


def draw_training_curves(run_dir: Path, path: Path) -> Path:
    """Draw ``run_dir/log.jsonl`` into a PNG file; raises what :func:`read_log` raises."""
    buffer = BytesIO()
    training_curves(read_log(run_dir / "log.jsonl")).savefig(buffer, format="png", dpi=DPI)
    write_atomically(path, buffer.getvalue())
    return path
