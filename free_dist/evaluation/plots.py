"""The pictures of a report, as PNG: speed against quality, accuracy per block, where tokens leave.

Draws rows and probes as they are; computes nothing that a row or probe does not say.  Uses matplotlib's object
interface, so no global figure or backend is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from free_dist.atomic import write_atomically
from free_dist.evaluation.probe import LENS, Probe
from free_dist.evaluation.rows import BASELINES, Row, tasks_of

DPI = 130
_BANK_COLOURS = ("#0b6fb8", "#d1651b", "#2b8a3e", "#8e44ad")
_GREY = "#666666"


def speed_quality(rows: Sequence[Row], path: Path) -> Path:
    """One panel per task: wall-clock ratio against our full-depth decoder (x), quality relative to it (y)."""
    tasks = tasks_of(rows)
    figure, panels = _panels(len(tasks), height=4.6)
    methods = _exit_methods(rows)
    for axes, task in zip(panels, tasks, strict=True):
        own = [row for row in rows if row.task == task]
        for method, colour in zip(methods, _cycled(methods), strict=True):
            curve = sorted(
                (r for r in own if r.method == method and r.threshold is not None), key=lambda r: r.threshold or 0
            )
            x, y = [row.wall_ratio for row in curve], [100 * row.quality_ratio for row in curve]
            axes.plot(x, y, "o-", color=colour, label=f"{method} (labels: threshold)", markersize=5, zorder=3)
            for row, x_k, y_k in zip(curve, x, y, strict=True):
                below = methods.index(method) % 2 == 1
                axes.annotate(
                    f"{row.threshold:g}",
                    (x_k, y_k),
                    textcoords="offset points",
                    xytext=(4, -12 if below else 5),
                    fontsize=7.5,
                    color=colour,
                )
        axes.axvline(1.0, color="black", linewidth=1.2, label="our full-depth decoder (1.0)")
        for row in own:
            if row.method == "hf":
                text = f"Hugging Face generate ({row.wall_ratio:.2f})"
                axes.axvline(row.wall_ratio, color=_GREY, linewidth=1.2, linestyle="-.", label=text)
        axes.axhline(99.0, color="#b00020", linewidth=1, linestyle="--", label="99% of full quality")
        axes.set_title(
            f"{task}: {_quality_name(own)} of full model {own[0].quality_full:.3f}, n = {own[0].n}", fontsize=10
        )
        axes.set_xlabel("wall-clock ratio, full-depth time / time  (> 1 is faster)")
        axes.set_ylabel("quality relative to full model (%)")
        axes.margins(0.12)
        axes.legend(fontsize=7.5, loc="best")
    return _save(figure, "Speed against quality, end to end from pixels to tokens", path)


def accuracy_per_block(probes: Sequence[Probe], path: Path) -> Path:
    """One panel per task: teacher-forced token accuracy after every block, with and without exit transformers."""
    figure, panels = _panels(len(probes), height=4.4)
    for axes, probe in zip(panels, probes, strict=True):
        lens = probe.accuracy(LENS)
        axes.plot(list(lens), [100 * a for a in lens.values()], ".-", color=_GREY, label=LENS)
        last = max(lens)
        axes.axhline(100 * lens[last], color="black", linewidth=1, linestyle=":", label=f"full model (block {last})")
        banks = [name for name in probe.curves if name != LENS]
        for i, (name, colour) in enumerate(zip(banks, _cycled(banks), strict=True)):
            accuracy = probe.accuracy(name)
            marker = "osD^v"[i % 5]
            axes.plot(
                list(accuracy),
                [100 * a for a in accuracy.values()],
                marker=marker,
                linestyle="--",
                color=colour,
                markersize=7,
                label=f"exit transformers, {name}",
                fillstyle="none" if i else "full",
            )
        axes.set_title(f"{probe.task}: {probe.tokens} answer tokens", fontsize=10)
        axes.set_xlabel("block the token is read after")
        axes.set_ylabel("teacher-forced token accuracy (%)")
        axes.set_ylim(-2, 104)
        axes.set_xticks(range(1, last + 1, 1 if last <= 16 else 4))
        axes.legend(fontsize=7.5, loc="best")
    return _save(figure, "Accuracy per block: no exit transformer, and trained exits", path)


def exit_shares(rows: Sequence[Row], path: Path) -> Path:
    """One panel per task: share of tokens emitted at each exit, by threshold, for the first bank among the rows."""
    tasks = tasks_of(rows)
    figure, panels = _panels(len(tasks), height=4.2)
    methods = _exit_methods(rows)
    for axes, task in zip(panels, tasks, strict=True):
        own = [row for row in rows if row.task == task and row.method in methods[:1]]
        layers = sorted({int(layer) for row in own for layer in row.extras.get("exit_shares", {})})
        n_blocks = {round(row.layer_ratio * row.mean_blocks) for row in own}
        bottom = [0.0] * len(own)
        for i, layer in enumerate(layers):
            share = [100 * float(row.extras["exit_shares"].get(str(layer), 0.0)) for row in own]
            # Light to dark with depth: the same layer never changes its place in the order.
            colour = (
                0.85 - 0.75 * i / max(1, len(layers) - 1),
                0.9 - 0.6 * i / max(1, len(layers) - 1),
                0.95 - 0.45 * i / max(1, len(layers) - 1),
            )
            label = f"after block {layer}" + (" (full depth)" if layer in n_blocks else "")
            axes.bar(
                [f"{row.threshold:g}" for row in own],
                share,
                bottom=bottom,
                color=colour,
                label=label,
                edgecolor="white",
            )
            bottom = [a + b for a, b in zip(bottom, share, strict=True)]
        axes.set_title(f"{task}" + (f" ({methods[0]})" if methods else ""), fontsize=10)
        axes.set_xlabel("confidence threshold")
        axes.set_ylabel("tokens emitted (%)")
        axes.set_ylim(0, 100)
        if layers:
            axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(4, len(layers)))
    return _save(figure, "Where tokens leave the stack", path)


def _panels(count: int, *, height: float) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(5.4 * count + 0.4, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.grid(True, linewidth=0.4, alpha=0.5)
        axes.set_axisbelow(True)
    return figure, panels


def _save(figure: Figure, title: str, path: Path) -> Path:
    figure.suptitle(title, fontsize=12)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomically(path, buffer.getvalue())
    return path


def _exit_methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows if row.method not in BASELINES))


def _cycled(names: Sequence[str]) -> list[str]:
    return [_BANK_COLOURS[i % len(_BANK_COLOURS)] for i in range(len(names))]


def _quality_name(rows: Sequence[Row]) -> str:
    return str(rows[0].extras.get("quality_name", "quality"))
