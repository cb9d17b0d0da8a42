"""The learning-rate schedule, and what a recipe may leave out of it."""

from __future__ import annotations

import pytest

from free_dist.recipe_io import load_recipe
from free_dist.training.schedule import DEFAULT_WARMUP, warmup_cosine


@pytest.mark.parametrize("max_steps", [1, 10, 300])
def test_a_run_of_any_length_needs_no_word_about_its_warm_up(max_steps: int) -> None:
    training = load_recipe(None, [f"training.max_steps={max_steps}"]).training
    left_out = warmup_cosine(warmup_steps=training.warmup_steps, max_steps=max_steps)
    named = warmup_cosine(warmup_steps=min(DEFAULT_WARMUP, max_steps), max_steps=max_steps)
    factors = [left_out(step) for step in range(max_steps)]
    assert factors == [named(step) for step in range(max_steps)]
    assert max(factors) == 1.0
    assert all(factor > 0 for factor in factors), "a step without learning rate is lost"
