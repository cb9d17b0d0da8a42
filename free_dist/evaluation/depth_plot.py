"""The picture of mid-crisis: accuracy per block by every way of reading it; and overthinking.

Draws what ``mid_crisis.json`` says; computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from free_dist.evaluation.plots import _GREY, _colour, _panels, _save, _shared_legend


def depth_picture(content: Mapping[str, Any], path: Path) -> Path:
    """Per task a panel of accuracies, those of the other backbone dashed."""
    tasks = content["tasks"]
    figure, panels = _panels(len(tasks), height=4.8)
    other = content.get("fine_tuned") or {}
    for axes, (task, own) in zip(panels, tasks.items(), strict=True):
        curves = dict(own["curves"])
        if task in other:
            curves |= {f"{name}, fine-tuned": curve for name, curve in other[task]["curves"].items()}
        for number, (name, curve) in enumerate(curves.items()):
            layers = sorted(map(int, curve))
            rows = [curve[str(layer)] for layer in layers]
            is_other = name.endswith(", fine-tuned")
            colour = _GREY if number == 0 else _colour(number - 1)
            if is_other:
                colour = f"C{number}"
            axes.plot(
                layers, [100 * row["accuracy"] for row in rows], marker=".", linestyle="--" if is_other else "-",
                color=colour, label=name,
            )  # fmt: skip
            low, high = ([100 * row["interval"][i] for row in rows] for i in (0, 1))
            axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
            dip = None if is_other else own["dips"][name]
            if dip is not None and dip["interval"][0] > 0:
                axes.plot(
                    dip["block"], 100 * curve[str(dip["block"])]["accuracy"], "v", color=colour, markersize=10,
                    markeredgecolor="black",
                )  # fmt: skip
        axes.axhline(100 * own["full_accuracy"], color="black", linewidth=1, linestyle=":", label="full model")
        axes.set_title(f"{task}: {own['tokens']} answer tokens (triangle: dip whose interval lies above 0)", fontsize=9)
        axes.set_xlabel("block the token is read after")
        axes.set_ylabel("teacher-forced token accuracy (%)")
        axes.set_ylim(-2, 104)
    _shared_legend(figure, panels)
    return _save(figure, "Mid-crisis: accuracy per block, by what reads it", path)


def overthinking_picture(content: Mapping[str, Any], path: Path) -> Path:
    """Per task: share of tokens that a block got right and the last layer wrong."""
    tasks = content["tasks"]
    figure, panels = _panels(len(tasks), height=4.2)
    for axes, (task, own) in zip(panels, tasks.items(), strict=True):
        for number, (name, shares) in enumerate(own["overthinking"].items()):
            layers = sorted(int(layer) for layer in shares if layer != "any")
            colour = _GREY if number == 0 else _colour(number - 1)
            axes.plot(
                layers, [100 * shares[str(k)] for k in layers], marker=".", color=colour, label=f"{name}, this block"
            )
            axes.axhline(100 * shares["any"], color=colour, linewidth=1, linestyle=":", label=f"{name}, any block")
        axes.set_title(f"{task}: the last layer is wrong on {1 - own['full_accuracy']:.1%} of the tokens", fontsize=10)
        axes.set_xlabel("block")
        axes.set_ylabel("right here, wrong at the end (%)")
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    _shared_legend(figure, panels)
    return _save(figure, "Overthinking: tokens that a shallower block got right and the last layer wrong", path)
