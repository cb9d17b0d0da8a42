"""The plots of the report as SVG, small enough to be read on a phone: one subject and one task each.

Draws numbers as the JSON files have them.  Uses matplotlib's object interface, so no global figure or backend is
touched.  Text stays text in the SVG; nothing in it refers to anything outside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from free_dist.atomic import write_atomically
from free_dist.evaluation.report_blocks import Picture, threshold_text
from free_dist.evaluation.report_costs import PARTS
from free_dist.evaluation.rows import Row, best_row, tasks_of
from free_dist.evaluation.training_curves import RunLog, draw_panel, panels_of

SIZE = (4.7, 3.4)
"""Inches of an ordinary plot."""
COLOURS = ("#0b6fb8", "#d1651b", "#2b8a3e", "#8e44ad", "#b00020", "#7f6000", "#17838f", "#5a5a5a")
PART_COLOURS = {
    "vision": "#9aa5b1",
    "prompt": "#7fb2de",
    "blocks": "#0b6fb8",
    "checks": "#d1651b",
    "heads": "#2b8a3e",
    "bookkeeping": "#d9d9d9",
}
_OUTSIDE = re.compile(r"<\?xml.*?\?>\s*|<!DOCTYPE.*?>\s*|<metadata>.*?</metadata>\s*", re.DOTALL)


def depth_colour(depth: float) -> str:
    """Light to dark blue for 0, the shallowest exit, to 1, full depth."""
    red, green, blue = 0.85 - 0.75 * depth, 0.9 - 0.6 * depth, 0.95 - 0.45 * depth
    return "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))


def depths_of(layers: Iterable[int]) -> dict[int, float]:
    """Exit layer -> 0 for the shallowest to 1 for the deepest, by rank."""
    ordered = sorted(set(layers))
    return {layer: i / max(1, len(ordered) - 1) for i, layer in enumerate(ordered)}


def speed_quality(rows: Sequence[Row], labels: Mapping[str, str]) -> list[Picture]:
    """Per task: wall-clock ratio against our full depth and quality relative to it, a curve per method."""
    pictures = []
    for task in tasks_of(rows):
        figure, axes = _plot()
        own = [row for row in rows if row.task == task and row.threshold is not None and row.threshold < 1]
        methods = list(dict.fromkeys(row.method for row in own))
        for i, method in enumerate(methods):
            curve = sorted((row for row in own if row.method == method), key=lambda row: row.threshold or 0)
            x, y = [row.wall_ratio for row in curve], [100 * row.quality_ratio for row in curve]
            bounds = [row.extras.get("wall_ratio_interval") or (row.wall_ratio,) * 2 for row in curve]
            reach = [[a - low for a, (low, _) in zip(x, bounds, strict=True)]]
            reach += [[high - a for a, (_, high) in zip(x, bounds, strict=True)]]
            axes.errorbar(
                x, y, xerr=reach, fmt="o-", color=_colour(i), markersize=4, elinewidth=0.8, capsize=2,
                label=labels.get(method, method),
            )  # fmt: skip
            for row, a, b in zip(curve, x, y, strict=True):
                shift = (2, -11) if i % 2 else (2, 5)
                axes.annotate(
                    f"{row.threshold:g}", (a, b), textcoords="offset points", xytext=shift, fontsize=7, color=_colour(i)
                )
        best = best_row([row for row in rows if row.task == task], task)
        if best is not None:
            axes.plot(
                best.wall_ratio, 100 * best.quality_ratio, "*", markersize=13, color="#f2b705", markeredgecolor="black",
                label="fastest at 99%", zorder=4,
            )  # fmt: skip
        axes.axhline(99, color="#b00020", linewidth=0.9, linestyle="--")
        axes.axvline(1, color="black", linewidth=0.9)
        axes.margins(0.12)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 97.5), max(high, 101.0))
        _label(axes, task, "speed against full depth (bars: 95% interval)", "quality of the full model's (%)")
        pictures.append(_picture(figure, f"speed_quality_{task}", f"Speed and quality, {task}; numbers are thresholds"))
    return pictures


def comparison_figures(rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Per task: every method's wall-clock speed and quality."""
    pictures = []
    for task in dict.fromkeys(str(row["task"]) for row in rows):
        figure, axes = _plot(height=4.4)
        own = [row for row in rows if row["task"] == task and row.get("speed") is not None]
        methods = list(dict.fromkeys(str(row.get("label") or row["method"]) for row in own))
        for i, method in enumerate(methods):
            points = [row for row in own if str(row.get("label") or row["method"]) == method]
            points.sort(key=lambda row: row["speed"])
            axes.plot(
                [row["speed"] for row in points], [row["quality"] for row in points],
                marker="osD^v<>P"[i % 8], color=_colour(i), linewidth=0.8, markersize=5, label=method,
            )  # fmt: skip
        axes.axvline(1, color="black", linewidth=0.9)
        _label(
            axes, task, "speed against the faster full depth", str(own[0].get("quality_name", "quality")) if own else ""
        )
        pictures.append(_picture(figure, f"comparison_{task}", f"All methods on {task}: speed and quality"))
    return pictures


def placement_figures(content: Mapping[str, Any]) -> list[Picture]:
    """The searched front, the chosen placement predicted and measured, and the baselines, measured."""
    figure, axes = _plot(height=3.8)
    points = [p | {"quality_ratio": p.get("quality_ratio", 1 - p.get("harm", 1.0))} for p in content.get("points", [])]
    front = sorted((p for p in points if "predicted_speed" in p), key=lambda point: point["predicted_speed"])
    if front:
        axes.plot(
            [p["predicted_speed"] for p in front], [100 * p["quality_ratio"] for p in front], ".-", color="#9aa5b1",
            linewidth=0.8, label="searched front (1 - predicted harm)",
        )  # fmt: skip
    entries = {name: one for name, one in content["baselines"].items() if one.get("measured_speed") is not None}
    random = {name: one for name, one in entries.items() if "random" in name}
    for i, (name, group) in enumerate(
        [("random sets", list(random.values())), *((n, [one]) for n, one in entries.items() if n not in random)]
    ):
        if group:
            axes.plot(
                [one["measured_speed"] for one in group], [100 * one["quality_ratio"] for one in group],
                "osD^v"[i % 5], color=_colour(i + 1), markersize=4, label=name,
            )  # fmt: skip
    for name, marker in (("predicted", "P"), ("measured", "*")):
        one = content[name]
        speed = one.get(f"{name}_speed")
        if speed is not None and one.get("quality_ratio") is not None:
            axes.plot(
                speed, 100 * one["quality_ratio"], marker, color=_colour(0), markersize=11, label=f"chosen, {name}"
            )
    _label(axes, "placement", "speed against full depth", "quality of the full model's (%)")
    return [_picture(figure, "placement", "Placement under the budget: the chosen exits against the baselines")]


def depth_figures(tasks: Mapping[str, Mapping[str, Any]], *, name: str, title: str) -> list[Picture]:
    """Per task: accuracy after every block, a curve per way of reading it, with intervals."""
    pictures = []
    for task, found in tasks.items():
        figure, axes = _plot()
        for i, (curve, points) in enumerate(found["curves"].items()):
            blocks = sorted(map(int, points))
            own = [points[str(k)] for k in blocks]
            y = [100 * one["accuracy"] for one in own]
            bounds = [one.get("interval") or [one["accuracy"]] * 2 for one in own]
            colour = "#666666" if i == 0 else _colour(i - 1)
            axes.plot(blocks, y, marker=".osD^v"[i % 6], color=colour, markersize=4, linewidth=1, label=curve)
            axes.fill_between(
                blocks, [100 * low for low, _ in bounds], [100 * high for _, high in bounds], color=colour, alpha=0.15
            )
        _label(axes, f"{task}: {found['tokens']} answer tokens", "read after block", "token accuracy (%)")
        pictures.append(_picture(figure, f"{name}_{task}", f"{title}, {task}"))
    return pictures


def share_figure(name: str, title: str, groups: Mapping[str, Mapping[int, float]], layers: Sequence[int]) -> Picture:
    """Stacked bars: per group of tokens, the share that left after each block."""
    figure, axes = _plot()
    depths = depths_of(layers)
    bottom = [0.0] * len(groups)
    for layer in layers:
        share = [100 * own.get(layer, 0.0) for own in groups.values()]
        label = f"block {layer}" + (" (full)" if layer == layers[-1] else "")
        axes.bar(
            list(groups),
            share,
            bottom=bottom,
            color=depth_colour(depths[layer]),
            edgecolor="white",
            linewidth=0.5,
            label=label,
        )
        bottom = [a + b for a, b in zip(bottom, share, strict=True)]
    axes.set_ylim(0, 100)
    _label(axes, title, "", "tokens that left (%)")
    return _picture(figure, name, title)


def robustness_figures(content: Mapping[str, Any], labels: Mapping[str, str]) -> list[Picture]:
    """Quality and speed against the level of noise and blur, and reliability of every exit's confidence."""
    pictures = []
    rows = content["corruptions"]
    for task, kind in dict.fromkeys((row["task"], row["kind"]) for row in rows):
        figure = _figure(SIZE[0], 4.8)
        axes = figure.subplots(2, 1, sharex=True)
        own = [row for row in rows if (row["task"], row["kind"]) == (task, kind)]
        for i, (method, threshold) in enumerate(dict.fromkeys((row["method"], row["threshold"]) for row in own)):
            curve = [row for row in own if (row["method"], row["threshold"]) == (method, threshold)]
            curve.sort(key=lambda row: row["level"])
            label = "full depth" if threshold is None else f"{labels.get(method, method)} {threshold_text(threshold)}"
            x = [row["level"] for row in curve]
            for place, value in enumerate(("quality", "speed")):
                y = [row[value] for row in curve]
                bounds = [row.get(f"{value}_interval") or [row[value]] * 2 for row in curve]
                axes[place].plot(x, y, ".-", color=_colour(i), linewidth=1, label=label if place == 0 else None)
                low, high = [[bound[side] for bound in bounds] for side in (0, 1)]
                axes[place].fill_between(x, low, high, color=_colour(i), alpha=0.1)
        _label(axes[0], f"{task}, {kind}", "", str(own[0].get("quality_name", "quality")))
        _label(axes[1], "", f"{kind}: standard deviation", "speed")
        pictures.append(_picture(figure, f"robustness_{task}_{kind}", f"Quality and speed under {kind}, {task}"))
    ece = content["ece"]
    for task, method in dict.fromkeys((row["task"], row.get("method", "exits")) for row in ece):
        figure, axes = _plot()
        own = [row for row in ece if (row["task"], row.get("method", "exits")) == (task, method)]
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.7, linestyle=":")
        own = [row for row in own if row.get("target", "labels") == "labels"]
        for i, row in enumerate(own):
            x, y = [one["confidence"] for one in row["bins"]], [one["accuracy"] for one in row["bins"]]
            axes.plot(x, y, ".-", color=_colour(i), linewidth=0.9, label=f"block {row['exit']}")
        lowest = min((min(one["confidence"], one["accuracy"]) for row in own for one in row["bins"]), default=0.0)
        axes.set_xlim(lowest - 0.02, 1.01)
        axes.set_ylim(lowest - 0.02, 1.01)
        named = labels.get(method, method)
        _label(axes, f"{task}, {named}", "mean confidence of a bin", "share equal to the label")
        pictures.append(
            _picture(figure, f"reliability_{task}_{method}", f"Reliability of confidences, {task}, {named}")
        )
    return pictures


def cost_figures(rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Per task: milliseconds per answer by part, full depth and each threshold, and the time really measured."""
    pictures = []
    for task in dict.fromkeys(str(row["task"]) for row in rows):
        figure, axes = _plot()
        own = [row for row in rows if row["task"] == task][::-1]
        names = ["full depth" if r["threshold"] is None else f"at {threshold_text(r['threshold'])}" for r in own]
        left = [0.0] * len(own)
        for part in PARTS:
            width = [1000 * row["parts"][part] for row in own]
            axes.barh(names, width, left=left, color=PART_COLOURS[part], label=part)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes.plot([1000 * row["measured"] for row in own], names, "D", color="black", markersize=4, label="measured")
        _label(axes, task, "milliseconds per answer", "")
        pictures.append(_picture(figure, f"costs_{task}", f"Where the time of an answer goes, {task}"))
    return pictures


def training_figures(name: str, log: RunLog) -> list[Picture]:
    """One plot per group of numbers of a training run's log."""
    pictures = []
    for group, lines in panels_of(log).items():
        figure, axes = _plot(width=4.2, height=2.8)
        draw_panel(axes, group, lines, log.events)
        pictures.append(_picture(figure, f"training_{name}_{group}", f"{group} while training {name}"))
    return pictures


def save_pictures(pictures: Iterable[Picture], directory: Path) -> list[Path]:
    """Write plots as SVG files into an existing directory."""
    paths = []
    for picture in pictures:
        paths.append(directory / f"{picture.name}.svg")
        write_atomically(paths[-1], picture.svg.encode())
    return paths


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _plot(*, width: float = SIZE[0], height: float = SIZE[1]) -> tuple[Figure, Any]:
    figure = _figure(width, height)
    return figure, figure.subplots()


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)


def _picture(figure: Figure, name: str, title: str) -> Picture:
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        if axes.get_legend() is None:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
    if entries:
        longest = max(map(len, entries))
        columns = min(len(entries), 3 if longest <= 15 else 2 if longest <= 28 else 1)
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=8)
    buffer = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "free_dist"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    safe = re.sub(r"[^\w-]+", "_", name)
    return Picture(name=safe, title=title, svg=_OUTSIDE.sub("", buffer.getvalue()))


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
