"""The pictures of a report, as PNG: speed against quality, accuracy per block, where tokens leave.

Draws rows and probes as they are; computes nothing that a row or probe does not say.  Uses matplotlib's object
interface, so no global figure or backend is touched.  ``labels`` maps a method's name to the words it carries in a legend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from free_dist.atomic import write_atomically
from free_dist.evaluation.probe import LENS, Probe
from free_dist.evaluation.rows import BASELINES, Row, best_row, tasks_of

DPI = 130
LABEL_GAP = 0.04
"""Points closer than this share of the panel's width to a labelled one stay unlabelled."""
_BANK_COLOURS = ("#0b6fb8", "#d1651b", "#2b8a3e", "#8e44ad")
_GREY = "#666666"


def speed_quality(rows: Sequence[Row], path: Path, labels: Mapping[str, str] | None = None) -> Path:
    """One panel per task: wall-clock ratio against our full-depth decoder (x), quality relative to it (y).

    Thresholds from 1 up, where no exit can fire, are left out: they only repeat the full-depth decoder.
    """
    tasks = tasks_of(rows)
    figure, panels = _panels(len(tasks), height=4.8)
    methods = _exit_methods(rows)
    for axes, task in zip(panels, tasks, strict=True):
        own = [row for row in rows if row.task == task]
        for i, method in enumerate(methods):
            curve = [row for row in own if row.method == method and row.threshold is not None and row.threshold < 1]
            _draw_sweep(axes, sorted(curve, key=lambda row: row.threshold or 0.0), i, _label(method, labels))
        best = best_row(own, task)
        if best is not None:
            axes.plot(
                best.wall_ratio,
                100 * best.quality_ratio,
                "*",
                markersize=15,
                color="#f2b705",
                markeredgecolor="black",
                zorder=4,
                linestyle="none",
                label="fastest at 99% quality",
            )
        axes.axvline(1.0, color="black", linewidth=1.2, label="our full-depth decoder")
        for row in own:
            if row.method == "hf":
                axes.axvline(row.wall_ratio, color=_GREY, linewidth=1.2, linestyle="-.", label="Hugging Face generate")
        axes.axhline(99.0, color="#b00020", linewidth=1, linestyle="--", label="99% of full quality")
        name = own[0].extras.get("quality_name", "quality")
        axes.set_title(f"{task}: {name} of the full model {own[0].quality_full:.3f}, n = {own[0].n}", fontsize=10)
        axes.set_xlabel("wall-clock ratio: full-depth time / time  (above 1 is faster)")
        axes.set_ylabel("quality relative to the full model (%)")
        axes.margins(0.1)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 97.5), max(high, 101.0))
    _shared_legend(figure, panels)
    return _save(
        figure, "Speed against quality, end to end from pixels to tokens (bars: 95% interval; numbers: threshold)", path
    )


def accuracy_per_block(probes: Sequence[Probe], path: Path, labels: Mapping[str, str] | None = None) -> Path:
    """One panel per task: teacher-forced token accuracy after every block, with and without exit transformers."""
    figure, panels = _panels(len(probes), height=4.6)
    for axes, probe in zip(panels, probes, strict=True):
        lens = probe.accuracy(LENS)
        axes.plot(list(lens), [100 * a for a in lens.values()], ".-", color=_GREY, label=LENS)
        last = max(lens)
        axes.axhline(100 * lens[last], color="black", linewidth=1, linestyle=":", label=f"full model (block {last})")
        for i, name in enumerate(name for name in probe.curves if name != LENS):
            accuracy = probe.accuracy(name)
            axes.plot(
                list(accuracy),
                [100 * a for a in accuracy.values()],
                marker="osD^v"[i % 5],
                linestyle="--",
                color=_colour(i),
                markersize=7,
                fillstyle="none" if i else "full",
                label=f"exit transformers: {_label(name, labels)}",
            )
        axes.set_title(f"{probe.task}: {probe.tokens} answer tokens", fontsize=10)
        axes.set_xlabel("block the token is read after")
        axes.set_ylabel("teacher-forced token accuracy (%)")
        axes.set_ylim(-2, 104)
        axes.set_xticks(range(1, last + 1, 1 if last <= 16 else 4))
    _shared_legend(figure, panels)
    return _save(figure, "Accuracy per block: no exit transformer, and trained exits", path)


def exit_shares(rows: Sequence[Row], path: Path, labels: Mapping[str, str] | None = None) -> Path:
    """One panel per task: share of tokens emitted at each exit, by threshold, for the first bank among the rows."""
    tasks = tasks_of(rows)
    figure, panels = _panels(len(tasks), height=4.4)
    methods = _exit_methods(rows)[:1]
    shown = [row for row in rows if row.method in methods]
    layers = sorted({int(layer) for row in shown for layer in row.extras["exit_shares"]})
    n_blocks = {round(row.layer_ratio * row.mean_blocks) for row in shown}
    for axes, task in zip(panels, tasks, strict=True):
        own = [row for row in shown if row.task == task]
        bottom = [0.0] * len(own)
        for i, layer in enumerate(layers):
            share = [100 * float(row.extras["exit_shares"].get(str(layer), 0.0)) for row in own]
            depth = i / max(1, len(layers) - 1)  # light to dark with depth
            label = f"after block {layer}" + (" (full depth)" if layer in n_blocks else "")
            axes.bar(
                [f"{row.threshold:g}" for row in own],
                share,
                bottom=bottom,
                color=(0.85 - 0.75 * depth, 0.9 - 0.6 * depth, 0.95 - 0.45 * depth),
                label=label,
                edgecolor="white",
            )
            bottom = [a + b for a, b in zip(bottom, share, strict=True)]
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("confidence threshold")
        axes.set_ylabel("tokens emitted (%)")
        axes.set_ylim(0, 100)
    _shared_legend(figure, panels)
    return _save(
        figure, "Where tokens leave the stack" + "".join(f" ({_label(name, labels)})" for name in methods), path
    )


def _draw_sweep(axes: Any, curve: Sequence[Row], place: int, label: str) -> None:
    if not curve:
        return
    x, y = [row.wall_ratio for row in curve], [100 * row.quality_ratio for row in curve]
    intervals = [row.extras.get("wall_ratio_interval", (row.wall_ratio, row.wall_ratio)) for row in curve]
    reach = [
        [a - low for a, (low, _) in zip(x, intervals, strict=True)],
        [high - a for a, (_, high) in zip(x, intervals, strict=True)],
    ]
    axes.errorbar(
        x, y, xerr=reach, fmt="o-", color=_colour(place), label=label, markersize=5, elinewidth=0.8, capsize=2, zorder=3
    )
    labelled: list[float] = []
    gap = LABEL_GAP * (max(x) - min(x) + 0.5)
    for row, x_k, y_k in zip(curve, x, y, strict=True):
        if all(abs(x_k - other) > gap for other in labelled):
            labelled.append(x_k)
            shift = (2, -13) if place % 2 else (2, 6)
            axes.annotate(
                f"{row.threshold:g}",
                (x_k, y_k),
                textcoords="offset points",
                xytext=shift,
                fontsize=8,
                color=_colour(place),
            )


def _panels(count: int, *, height: float) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(5.4 * count + 0.4, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.grid(True, linewidth=0.4, alpha=0.5)
        axes.set_axisbelow(True)
    return figure, panels


def _shared_legend(figure: Figure, panels: Sequence[Any]) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = min(len(entries), 2 * len(panels))
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=9)


def _save(figure: Figure, title: str, path: Path) -> Path:
    figure.suptitle(title, fontsize=12)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomically(path, buffer.getvalue())
    return path


def _exit_methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows if row.method not in BASELINES))


def _colour(place: int) -> str:
    return _BANK_COLOURS[place % len(_BANK_COLOURS)]


def _label(method: str, labels: Mapping[str, str] | None) -> str:
    return method if labels is None else labels.get(method, method)
