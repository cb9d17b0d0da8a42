"""The picture of a placement search: harm against predicted speed, and predicted against measured speed.

Draws what ``placement.json`` says; computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from free_dist.evaluation.plots import _colour, _panels, _save, _shared_legend


def placement_picture(content: Mapping[str, Any], path: Path) -> Path:
    """Two panels: the searched points, and every placement that was measured."""
    figure, (left, right) = _panels(2, height=4.8)
    variants = list(dict.fromkeys(point["variant"] for point in content["points"]))
    for number, variant in enumerate(variants):
        own = [point for point in content["points"] if point["variant"] == variant]
        left.plot(
            [point["predicted_speed"] for point in own], [100 * point["max_harm"] for point in own], "o",
            color=_colour(number), label=f"best set: {variant}", markersize=5,
        )  # fmt: skip
        for bound in sorted({point["max_harm"] for point in own}):
            best = max((p for p in own if p["max_harm"] == bound), key=lambda p: p["predicted_speed"])
            left.annotate(
                " ".join(map(str, best["layers"])), (best["predicted_speed"], 100 * bound),
                textcoords="offset points", xytext=(3, 4), fontsize=7, color=_colour(number),
            )  # fmt: skip
    left.set_xlabel("predicted speed / full depth")
    left.set_ylabel("bound on harm (%)")
    left.set_title("best sets by bound on harm (numbers: exits after blocks)", fontsize=10)
    rows = {"found": content["measured"]} | content["baselines"]
    measured = {name: row for name, row in rows.items() if row["measured_speed"] is not None}
    for number, (name, row) in enumerate(measured.items()):
        low, high = row["measured_speed_interval"]
        speed = row["measured_speed"]
        right.errorbar(
            [row["predicted_speed"]], [speed], yerr=[[speed - low], [high - speed]], fmt="*" if name == "found" else "o",
            markersize=12 if name == "found" else 6, capsize=2, color=f"C{number}",
            label=f"{name.partition(',')[0]}: {row['quality_ratio']:.1%}",
        )  # fmt: skip
    speeds = [row[key] for row in measured.values() for key in ("predicted_speed", "measured_speed")]
    ends = [min(speeds) - 0.1, max(speeds) + 0.1]
    right.plot(ends, ends, color="black", linewidth=1, linestyle=":", label="predicted = measured")
    right.set_xlabel("predicted speed / full depth")
    right.set_ylabel("measured speed / full depth")
    right.set_title(f"test split, n = {content['measured']['n']} (legend: quality of the full model's)", fontsize=10)
    _shared_legend(figure, [left, right])
    return _save(figure, "Where exits stand: searched, named and random placements", path)
