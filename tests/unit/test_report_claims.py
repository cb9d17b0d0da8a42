"""Sentences of a report against contents of which one knows what they say."""

from __future__ import annotations

from typing import Any

from free_dist.evaluation.report_claims import depth_claims, placement_claims


def dips(**found: tuple[float, float, float]) -> dict[str, Any]:
    rows = {name: {"block": 5, "depth": depth, "interval": [low, high]} for name, (depth, low, high) in found.items()}
    return {"tasks": {"vqa": {"dips": rows}}}


def test_a_dip_is_claimed_only_where_its_interval_lies_above_zero() -> None:
    none = ["vqa: no curve has a dip of accuracy that is told from noise."]
    assert depth_claims(dips(logit=(0.0, 0.0, 0.0))) == none
    assert depth_claims(dips(logit=(0.09, -0.01, 0.19))) == none
    assert depth_claims(dips()) == none
    (claim,) = depth_claims(dips(logit=(0.09, -0.01, 0.19), tuned=(0.04, 0.01, 0.07)))
    assert "block 5 (tuned)" in claim and "0.040" in claim


def test_a_prediction_is_compared_in_the_sense_of_the_launcher() -> None:
    own = {"layers": [2, 5], "predicted_speed": 2.0, "measured_speed": 1.9, "measured_speed_interval": [1.8, 2.0]}
    claim = placement_claims({"predicted": own, "measured": own, "baselines": {}})[0]
    assert "-5.0% against the prediction" in claim
