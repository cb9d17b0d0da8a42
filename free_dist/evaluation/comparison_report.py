"""A comparison for people: ``comparison.md`` and what the terminal shows, from the rows of ``comparison.json``.

Knows columns and sentences.  Does not know models, methods or how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

FORMAT = 1
"""Of ``comparison.json``."""
COLUMNS = (
    "task",
    "method",
    "label",
    "threshold",
    "policy",
    "quality_name",
    "quality",
    "quality_interval",
    "quality_full",
    "agreement",
    "speed",
    "speed_interval",
    "layer_ratio",
    "mean_blocks",
    "trainable_parameters",
    "training_seconds",
    "training_flops_per_sample",
    "n",
    "note",
)
"""What every row of ``comparison.json`` has; further keys are extras."""

_TABLE = (
    "method", "setting", "quality", "of full", "same tokens", "speed", "layer ratio", "trained", "training s", "GFLOP", "note"
)  # fmt: skip
_SWEEP = _TABLE[:7]


def markdown(content: dict[str, Any]) -> str:
    """The text of ``comparison.md`` from the content of ``comparison.json``."""
    rows, margin = content["rows"], content["min_quality"]
    lines = ["# Exit methods on one frozen backbone and one decoder", "", f"Made by `{content['command']}`.", ""]
    for task in tasks_of(rows):
        own = [row for row in rows if row["task"] == task]
        lines += [f"## {task}: {own[0]['quality_name']}, n = {own[0]['n']}", "", *_table(_TABLE, own), ""]
        lines += [*(f"- {sentence}" for sentence in verdict(own, margin)), ""]
    lines += [LEGEND.format(margin=f"{margin:.0%}"), "", "## Sweep", ""]
    for task in tasks_of(content["sweep"]):
        own = [row for row in content["sweep"] if row["task"] == task]
        lines += [f"### {task}", "", *_table(_SWEEP, own), ""]
    return "\n".join(lines)


def verdict(rows: Sequence[dict[str, Any]], min_quality: float) -> list[str]:
    """Who is fastest of those that keep the quality on both splits, and where ours stands; rows of one task."""
    ours = next(row for row in rows if row["method"] == "ce_gan" and row.get("chosen"))
    wanted = min_quality * ours["quality_full"]
    good = kept_on_both(rows, min_quality)
    said = []
    if good:
        best = good[0]
        said.append(
            f"Fastest operating point with at least {min_quality:.0%} of the quality, here and on calibration: {best['label']} "
            f"({best['setting']}), "
            f"{_speed(best)}."
        )
    else:
        said.append(f"No method keeps {min_quality:.0%} of the quality, here and on calibration.")
    state = "keeps" if ours["quality"] >= wanted else "does not keep"
    said.append(f"Ours {state} it here: {ours['quality']:.3f} against {ours['quality_full']:.3f}, {_speed(ours)}.")
    chosen = [row for row in rows if row.get("chosen") and row is not ours]
    behind = [row["label"] for row in chosen if row["ours_over_this_interval"][0] > 1]
    ahead = [row["label"] for row in chosen if row["ours_over_this_interval"][1] < 1]
    even = [row["label"] for row in chosen if row["label"] not in (*behind, *ahead)]
    for names, what in ((behind, "faster than"), (ahead, "slower than"), (even, "not to be told apart from")):
        if names:
            said.append(f"Ours is {what} (paired, 95%): {'; '.join(names)}.")
    return said


def kept_on_both(rows: Iterable[dict[str, Any]], min_quality: float) -> list[dict[str, Any]]:
    """The rows of one task that keep ``min_quality`` of the full model's quality here and on calibration, fastest first.

    A setting that was not chosen, or not for its quality, is no candidate: on these samples alone it may be lucky.
    """
    kept = [
        row
        for row in rows
        if (row.get("calibration_quality_ratio") or 0.0) >= min_quality
        and row["quality_full"] > 0
        and row["quality"] >= min_quality * row["quality_full"]
    ]
    return sorted(kept, key=lambda row: -row["speed"])


def tasks_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Tasks among the rows, in order of appearance."""
    return list(dict.fromkeys(row["task"] for row in rows))


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table whose columns are aligned, so that a terminal shows it as well."""
    cells = [list(columns), *(_cells(row)[: len(columns)] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["quality_interval"]
    return [
        row["label"],
        row["setting"],
        f"{row['quality']:.3f} [{low:.3f}, {high:.3f}]",
        f"{row['quality'] / row['quality_full']:.1%}" if row["quality_full"] else "-",
        f"{row['agreement']:.0%}",
        _speed(row),
        f"{row['layer_ratio']:.2f}",
        _count(row["trainable_parameters"]),
        "?" if row["training_seconds"] is None else f"{row['training_seconds']:.0f}",
        "?" if row["training_flops_per_sample"] is None else f"{row['training_flops_per_sample'] / 1e9:.2f}",
        row["note"],
    ]


def _speed(row: dict[str, Any]) -> str:
    low, high = row["speed_interval"]
    return f"{row['speed']:.2f} [{low:.2f}, {high:.2f}]"


def _count(n: int) -> str:
    return f"{n / 1e6:.2f}M" if n else "0"


LEGEND = """`speed`: wall-clock against the faster full-depth decoder, end to end from pixels to tokens, batch 1, sums over the
same samples in one interleaved run, with 95% bootstrap intervals over images.  `layer ratio`: blocks of the full model over
blocks executed per token, an exit transformer counted as one and heads not at all; it is a count, not a speed.  `same tokens`:
answers with exactly the full model's tokens.  `trained`: numbers that training changes in the exits; `training s`: seconds of
the training's steps on the machine it ran on, by its log; `GFLOP`: operations of one training sample, backbone and
discriminators included.  Operating points were chosen on the calibration split, the fastest that keeps {margin} of the full
model's quality there; tables and sweep are of the test split."""
