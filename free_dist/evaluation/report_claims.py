"""The sentences at the head of a report: what the measured numbers say, good or bad, without judging what was not
measured.

Knows the fields of the JSON files; does not know sections or commands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from free_dist.evaluation.comparison_report import kept_on_both
from free_dist.evaluation.report_blocks import interval, number, percent, threshold_text
from free_dist.evaluation.rows import BASELINES, Row, best_row, tasks_of

KEPT = 0.99
"""Relative quality that a claim of speed asks for."""


def result_claims(rows: Sequence[Row], labels: Mapping[str, str]) -> list[str]:
    """Per task: the fastest operating point that keeps 99% of the quality."""
    found = []
    for task in tasks_of(rows):
        best = best_row(rows, task, KEPT)
        if best is None:
            found.append(f"{task}: no threshold below 1 keeps 99% of the full model's quality.")
            continue
        against_hf = best.wall_ratio_hf is not None and best.wall_ratio_hf < best.wall_ratio
        name = "wall_ratio_hf_interval" if against_hf else "wall_ratio_interval"
        speed = interval(best.speed, best.extras.get(name), 2)
        name = labels.get(best.method, best.method)
        found.append(
            f"{task}: {speed} times the speed of the faster full-depth baseline at {percent(best.quality_ratio)} of the full "
            f"model's quality ({name}, threshold {threshold_text(best.threshold)}, n = {best.n})."
        )
    return found


def comparison_claims(content: Mapping[str, Any]) -> list[str]:
    """Per task: the fastest method that keeps the quality on the test split and, chosen for that, on calibration."""
    found = []
    rows, min_quality = content["rows"], content.get("min_quality", KEPT)
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task and row["method"] not in BASELINES]
        methods = len({row["method"] for row in own})
        kept = kept_on_both([row for row in own if row.get("speed") is not None], min_quality)
        if kept:
            best = kept[0]
            name, speed = best.get("label") or best["method"], interval(best["speed"], best.get("speed_interval"), 2)
            found.append(
                f"{task}: of {methods} methods on the same decoder, {name} is the fastest that keeps {min_quality:.0%} of the "
                f"quality, here and on calibration: {speed}."
            )
        elif methods:
            found.append(
                f"{task}: none of {methods} methods keeps {min_quality:.0%} of the quality, here and on calibration."
            )
    return found


def placement_claims(content: Mapping[str, Any]) -> list[str]:
    """How good the prediction was, and how many baselines are slower."""
    found = []
    predicted, measured = content["predicted"].get("predicted_speed"), content["measured"].get("measured_speed")
    layers = " ".join(map(str, content["measured"]["layers"]))
    if predicted and measured:
        speed = interval(measured, content["measured"].get("measured_speed_interval"), 2)
        found.append(
            f"placement: exits after blocks {layers}; predicted speed {number(predicted, 2)}, measured {speed} "
            f"({measured / predicted - 1:+.1%} against the prediction)."
        )
    others = [one for one in content["baselines"].values() if one.get("measured_speed") is not None]
    if measured and others:
        slower = sum(one["measured_speed"] < measured for one in others)
        found.append(f"placement: measured faster than {slower} of {len(others)} other placements.")
    return found


def depth_claims(content: Mapping[str, Any]) -> list[str]:
    """Per task: the deepest dip among the curves whose interval lies above 0."""
    found = []
    for task, one in content["tasks"].items():
        dips = {
            name: dip
            for name, dip in one.get("dips", {}).items()
            if dip is not None and dip["depth"] > 0 and dip["interval"][0] > 0
        }
        if dips:
            name = max(dips, key=lambda n: dips[n]["depth"])
            depth = interval(dips[name]["depth"], dips[name]["interval"])
            found.append(f"{task}: the deepest dip of accuracy is at block {dips[name]['block']} ({name}): {depth}.")
        else:
            found.append(f"{task}: no curve has a dip of accuracy that is told from noise.")
    return found


def robustness_claims(content: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    """Per task: quality against full depth at the worst corruption; then transfer, calibration and length at their
    worst."""
    found = []
    rows = [row for row in content["corruptions"] if row["threshold"] is not None and row["level"] > 0]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task and row["quality_full"]]
        if own:
            worst = min(own, key=lambda row: row["quality"] / row["quality_full"])
            name = labels.get(worst["method"], worst["method"])
            kept = percent(worst["quality"] / worst["quality_full"])
            where = f"{worst['kind']} {worst['level']:g}, {name}, threshold {threshold_text(worst['threshold'])}"
            found.append(
                f"{task}: at worst exits keep {kept} of what full depth keeps on the same spoilt pictures ({where}), at a speed "
                f"of {number(worst['speed'], 2)}."
            )
    moved = content["transfer"]
    for name, own in (
        ("on the same task's test split", [row for row in moved if _task(row["from"]) == _task(row["to"])]),
        ("on another task", [row for row in moved if _task(row["from"]) != _task(row["to"])]),
    ):
        live = [row for row in own if row["threshold"] < 1]
        if own:
            held = sum(row["got"] <= row["wanted"] for row in live)
            off = len(own) - len(live)
            more = f"; in {off} more no threshold could be certified, and the exit stays off" if off else ""
            kept = f"keep their promise {name} in {held} of {len(live)} cases"
            found.append(f"thresholds chosen on the calibration split {kept}{more}.")
    if content["ece"]:
        worst = max(content["ece"], key=lambda row: row["ece"])
        found.append(
            f"the largest calibration error of an exit is {interval(worst['ece'], worst['interval'], 4)} ({worst['task']}, block "
            f"{worst['exit']}, against {worst.get('target', 'labels')})."
        )
    lengths = [row for row in content["length"] if row["threshold"] is not None]
    if lengths:
        worst = min(lengths, key=lambda row: row["ratio"])
        ratio, name = interval(worst["ratio"], worst["ratio_interval"]), labels.get(worst["method"], worst["method"])
        found.append(
            f"the shortest answers are {ratio} of full depth's length ({worst['task']}, {name}, threshold "
            f"{threshold_text(worst['threshold'])})."
        )
    return found


def ablation_claims(content: Mapping[str, Any]) -> list[str]:
    """For every changed setting: at how many exits and tasks it is better or worse than the base, paired by seed."""
    found = []
    names = dict.fromkeys(row["ablation"] for row in content["rows"] if row["difference_interval"] is not None)
    for name in names:
        intervals = [row["difference_interval"] for row in content["rows"] if row["ablation"] == name]
        known = [one for one in intervals if one is not None]
        better, worse = sum(low > 0 for low, _ in known), sum(high < 0 for _, high in known)
        found.append(
            f"{name}: better than the base with 95% confidence in {better}, worse in {worse} of {len(known)} exits and tasks."
        )
    return found


def _task(place: str) -> str:
    return place.partition("/")[0]
