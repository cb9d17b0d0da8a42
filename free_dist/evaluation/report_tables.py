"""Tables of the report, one function per kind of measured row.  Cells are the numbers of the JSON files, rounded, and
nothing else.

Does not know files, pictures, HTML or Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from free_dist.evaluation.report_blocks import Table, interval, number, percent, threshold_text
from free_dist.evaluation.rows import Row, best_row, tasks_of

RESULT_HEADINGS = (
    "task",
    "method",
    "threshold",
    "quality",
    "relative",
    "agreement",
    "blocks",
    "layer ratio",
    "speed / full",
    "speed / HF",
    "n",
    "best",
)

_COUNTED = ("threads", "world_size", "n_hf")
"""Extras of a row that say how it was timed."""


def result_cells(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> list[tuple[str, ...]]:
    """A line per row, under ``RESULT_HEADINGS``; ``*`` marks the fastest of a task that keeps 99% of the quality."""
    best = {task: best_row(rows, task) for task in tasks_of(rows)}
    return [
        (
            row.task,
            (labels or {}).get(row.method, row.method),
            threshold_text(row.threshold),
            number(row.quality),
            percent(row.quality_ratio),
            percent(row.agreement),
            number(row.mean_blocks, 2),
            number(row.layer_ratio, 2),
            interval(row.wall_ratio, row.extras.get("wall_ratio_interval"), 2),
            interval(row.wall_ratio_hf, row.extras.get("wall_ratio_hf_interval"), 2),
            number(row.n),
            "*" if row is best[row.task] else "",
        )
        for row in rows
    ]


def results_table(rows: Sequence[Row], labels: Mapping[str, str]) -> Table:
    """Every operating point of ``results.json``."""
    return Table(headings=RESULT_HEADINGS, rows=tuple(result_cells(rows, labels)))


def shares_table(caption: str, groups: Sequence[tuple[str, ...]], layers: Sequence[int]) -> Table:
    """Rows of threshold, kind of group, group, share that left after each block, and number of tokens."""
    headings = ("threshold", "tokens by", "group", *(f"block {k}" for k in layers), "tokens")
    return Table(caption=caption, headings=headings, rows=tuple(groups))


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every method of ``comparison.json``."""
    return Table(
        headings=(
            *("task", "method", "policy", "threshold", "quality", "full model", "agreement", "speed", "layer ratio"),
            *("blocks", "trained parameters", "training s", "TFLOP / sample", "n", "note"),
        ),
        rows=tuple(
            (
                str(row["task"]),
                str(row.get("label") or row["method"]),
                str(row.get("policy") or "-"),
                threshold_text(row["threshold"]),
                interval(row["quality"], row.get("quality_interval")),
                number(row["quality_full"]),
                percent(row["agreement"]),
                interval(row["speed"], row.get("speed_interval"), 2),
                number(row["layer_ratio"], 2),
                number(row["mean_blocks"], 2),
                number(row["trainable_parameters"]),
                number(row["training_seconds"], 0),
                number(_tera(row["training_flops_per_sample"]), 4),
                number(row["n"]),
                str(row.get("note") or ""),
            )
            for row in rows
        ),
    )


def placement_table(caption: str, content: Mapping[str, Any]) -> Table:
    """The chosen placement, as predicted and as measured, and the baselines."""
    entries = {name: content[name] for name in ("predicted", "measured") if name in content}
    entries |= content.get("baselines", {})
    return Table(
        caption=caption,
        headings=(
            *("placement", "blocks", "variant", "thresholds", "parameters", "predicted speed", "measured speed"),
            *("quality", "of full", "n"),
        ),
        rows=tuple(
            (
                name,
                " ".join(map(str, one["layers"])),
                _words(one["variant"]),
                threshold_text(one["thresholds"]),
                number(one["parameters"]),
                number(one.get("predicted_speed"), 2),
                interval(one.get("measured_speed"), one.get("measured_speed_interval"), 2),
                number(one.get("quality")),
                percent(one.get("quality_ratio")),
                number(one.get("n")),
            )
            for name, one in entries.items()
        ),
    )


def depth_table(task: str, found: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> Table:
    """Accuracy after every block, a line per curve."""
    blocks = sorted({int(k) for points in found["curves"].values() for k in points})
    bounded = any("interval" in point for points in found["curves"].values() for point in points.values())
    bounds = " [95% interval]" if bounded else ""
    return Table(
        caption=f"{task}: {found['tokens']:,} answer tokens, token accuracy by block{bounds}",
        headings=("curve", *map(str, blocks)),
        rows=tuple(
            ((labels or {}).get(name, name), *(_point(points.get(str(k))) for k in blocks))
            for name, points in found["curves"].items()
        ),
    )  # fmt: skip


def dips_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """Dips and overthinking of every task and curve."""
    rows = []
    for task, found in tasks.items():
        over = found.get("overthinking", {})
        for curve in found["curves"]:
            dip, shares = found.get("dips", {}).get(curve), over.get(curve, {})
            by_block = {k: v for k, v in shares.items() if k != "any"} if isinstance(shares, Mapping) else {}
            worst = max(by_block, key=lambda k: by_block[k]) if by_block else None
            rows.append(
                (
                    task,
                    curve,
                    "none" if not dip or dip.get("block") is None else str(dip["block"]),
                    interval(dip["depth"], dip.get("interval")) if dip and dip.get("depth") is not None else "-",
                    "-" if worst is None else f"{percent(by_block[worst])} at block {worst}",
                    percent(shares.get("any") if isinstance(shares, Mapping) else None),
                )
            )
    return Table(
        headings=("task", "curve", "dip at block", "depth", "overthinking, most", "overthinking, any block"),
        rows=tuple(rows),
    )


def corruption_table(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Table:
    """Every corruption, level and decoder."""
    return Table(
        caption="quality, speed and blocks on spoilt pictures",
        headings=("task", "spoilt by", "level", "method", "threshold", "quality", "full depth", "speed", "blocks", "n"),
        rows=tuple(
            (
                str(row["task"]),
                str(row["kind"]),
                f"{row['level']:g}",
                _method(row, labels),
                threshold_text(row["threshold"]),
                interval(row["quality"], row["quality_interval"]),
                number(row["quality_full"]),
                interval(row["speed"], row.get("speed_interval"), 2),
                number(row["mean_blocks"], 2),
                number(row["n"]),
            )
            for row in rows
        ),
    )


def transfer_table(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Table:
    """Thresholds from one split and task on another."""
    return Table(
        caption="a threshold chosen on one split or task, and the mean loss on another",
        headings=("method", "exit", "chosen on", "held on", "threshold", "loss promised", "loss found", "holds", "n"),
        rows=tuple(
            (
                _method(row, labels),
                str(row["exit"]),
                str(row["from"]),
                str(row["to"]),
                threshold_text(row["threshold"]),
                number(row["wanted"]),
                interval(row["got"], row["interval"], 4),
                "yes" if row["got"] <= row["wanted"] else "no",
                number(row["n"]),
            )
            for row in rows
        ),
    )


def ece_table(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Table:
    """Expected calibration error of every exit."""
    return Table(
        caption="expected calibration error, bins of equal mass",
        headings=("task", "method", "exit", "against", "ECE", "mean confidence", "accuracy", "tokens"),
        rows=tuple(
            (
                str(row["task"]),
                _method(row, labels),
                str(row["exit"]),
                str(row.get("target", "labels")),
                interval(row["ece"], row["interval"], 4),
                number(_bin_mean(row["bins"], "confidence")),
                number(_bin_mean(row["bins"], "accuracy")),
                number(row["n"]),
            )
            for row in rows
        ),
    )


def length_table(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Table:
    """Lengths against full depth, and where answers end."""
    return Table(
        caption="length of answers, and the exits that end them",
        headings=("task", "method", "threshold", "tokens", "at full depth", "ratio", "closing tokens by exit"),
        rows=tuple(
            (
                str(row["task"]),
                _method(row, labels),
                threshold_text(row["threshold"]),
                number(row["mean_tokens"], 2),
                number(row["mean_tokens_full"], 2),
                interval(row["ratio"], row["ratio_interval"]),
                ", ".join(f"{k}: {percent(v, 0)}" for k, v in row["eos_by_exit"].items()) or "-",
            )
            for row in rows
        ),
    )


def cost_table(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Table:
    """Milliseconds per answer by part."""
    parts = list(rows[0]["parts"]) if rows else []
    return Table(
        caption="milliseconds per answer",
        headings=("task", "method", "threshold", *parts, "sum", "measured", "n"),
        rows=tuple(
            (
                str(row["task"]),
                _method(row, labels),
                threshold_text(row["threshold"]),
                *(number(1000 * row["parts"][part], 2) for part in parts),
                number(1000 * sum(row["parts"].values()), 2),
                number(1000 * row["measured"], 2),
                number(row["n"]),
            )
            for row in rows
        ),
    )


def of_lines(caption: str, lines: Sequence[Sequence[str]]) -> Table:
    """Headings and cells that are made elsewhere."""
    headings, *rows = (tuple(line) for line in lines)
    return Table(caption=caption, headings=headings, rows=tuple(rows))


def further_table(rows: Sequence[Row], labels: Mapping[str, str]) -> Table:
    """What else ``results.json`` has of every row, as long as it is one number: more metrics, tokens, seconds."""
    kept = [
        {name: value for name, value in row.extras.items() if isinstance(value, int | float) and name not in _COUNTED}
        for row in rows
    ]
    names = tuple(dict.fromkeys(name for own in kept for name in own))
    return Table(
        caption="further numbers of the same rows",
        headings=("task", "method", "threshold", *names),
        rows=tuple(
            (
                row.task,
                labels.get(row.method, row.method),
                threshold_text(row.threshold),
                *(number(own.get(name), 4) for name in names),
            )
            for row, own in zip(rows, kept, strict=True)
        ),
    )


def _point(point: Mapping[str, Any] | None) -> str:
    return "" if point is None else interval(point["accuracy"], point.get("interval"))


def _method(row: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    method = str(row.get("method", "-"))
    return labels.get(method, method)


def _bin_mean(bins: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(one["n"] * one[name] for one in bins) / sum(one["n"] for one in bins)


def _tera(value: Any) -> float | None:
    return None if value is None else float(value) / 1e12


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def exits_table(manifests: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> Table:
    """What each method's exits are: one line per ``exits.json``."""
    headings = ("method", "trained with", "after blocks", "variant", "steps", "weights sha256", "backbone", "code")
    rows = []
    for method, manifest in manifests.items():
        extra = manifest.get("extra", {})
        rows.append(
            (
                method,
                labels.get(method, "-"),
                " ".join(map(str, manifest.get("exit_layers", []))),
                str(manifest.get("variant", "-")),
                number(extra.get("steps")),
                str(manifest.get("weights_sha256", "-"))[:16],
                str(manifest.get("backbone_hash", "-"))[:16],
                str(extra.get("git_commit", "-"))[:12],
            )
        )
    return Table(caption="exits", headings=headings, rows=tuple(rows))
