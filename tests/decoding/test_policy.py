"""When an exit is confident enough."""

from __future__ import annotations

import math

import pytest
import torch

from free_dist.decoding import MaxProbPolicy

HALF = torch.tensor([2.0, 2.0, -math.inf])
"""Logits whose largest probability is exactly one half."""


def test_confidence_is_the_largest_probability_in_float32() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    decision = MaxProbPolicy(0.5, 1).decide(0, logits)
    wanted = torch.softmax(logits.double(), dim=-1).max()
    assert decision.confidence == pytest.approx(wanted.item(), rel=1e-6)
    assert decision.token == logits.argmax()


def test_a_confidence_equal_to_the_threshold_does_not_exit() -> None:
    assert MaxProbPolicy(0.5, 1).decide(0, HALF).emit is False
    assert MaxProbPolicy(math.nextafter(0.5, 0.0), 1).decide(0, HALF).emit is True


def test_thresholds_of_one_and_above_switch_an_exit_off() -> None:
    policy = MaxProbPolicy([0.0, math.nextafter(1.0, 0.0), 1.0, 1.1], 4)
    assert [policy.is_active(index) for index in range(4)] == [True, True, False, False]
    certain = torch.tensor([500.0, -500.0])
    assert [policy.decide(index, certain).emit for index in range(4)] == [True, True, False, False]


def test_threshold_zero_always_exits() -> None:
    assert MaxProbPolicy(0, 1).decide(0, torch.zeros(100_000)).emit is True


def test_each_exit_has_its_own_threshold_and_one_number_serves_all() -> None:
    policy = MaxProbPolicy([0.4, 0.6], 2)
    assert [policy.decide(index, HALF).emit for index in range(2)] == [True, False]
    assert MaxProbPolicy(0.7, 3).thresholds == (0.7, 0.7, 0.7)


@pytest.mark.parametrize("thresholds", [[0.5], [0.5, 0.5, 0.5], -0.1, math.nan, [0.5, math.nan]])
def test_impossible_thresholds_are_named(thresholds) -> None:
    with pytest.raises(ValueError, match="thresholds"):
        MaxProbPolicy(thresholds, 2)
