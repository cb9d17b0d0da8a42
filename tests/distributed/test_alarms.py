"""Alarms on really broken trainings, and silence on healthy ones: real engines, a real log, a real TensorBoard page."""

from __future__ import annotations

import broken_runs
import pytest
from broken_runs import Log
from ranks import run_ranks

pytestmark = pytest.mark.fault

PER_EXIT = 16
"""Trained parameters of one exit of the made-up model."""


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[Log, str]]:
    return run_ranks(1, broken_runs.one_process)[0]


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Log, str]]:
    return run_ranks(2, broken_runs.two_processes)[0]


def events(run: tuple[Log, str]) -> dict[str, list[str]]:
    """Messages by alarm."""
    found: dict[str, list[str]] = {}
    for line in run[0]:
        if "event" in line:
            found.setdefault(line["event"], []).append(line["message"])
    return found


def first(run: tuple[Log, str], event: str) -> int:
    """Step of the first event of a kind."""
    return min(line["step"] for line in run[0] if line.get("event") == event)


def test_a_healthy_run_raises_nothing(runs) -> None:
    assert events(runs["healthy"]) == {}
    assert len(runs["healthy"][0]) == 24


def test_a_discriminator_that_learns_a_thousand_times_too_fast_is_named(runs) -> None:
    found = events(runs["discriminator too fast"])
    assert "discriminator_loses" in found or "discriminator_wins" in found
    assert any("exit 1" in message for messages in found.values() for message in messages)


def test_a_discriminator_without_an_opinion_is_named(runs) -> None:
    found = events(runs["discriminator blind"])
    assert set(found) == {"discriminator_loses", "no_training"}, "behind weights of zero nothing gets a gradient"
    assert len(found["discriminator_loses"]) == 2, "both exits' discriminators"


def test_a_detached_exit_is_named_with_every_parameter_and_nothing_else_is(runs) -> None:
    found = events(runs["exit detached"])
    assert set(found) == {"no_training"}
    (message,) = found["no_training"]
    assert message.startswith("engine exits, exit 1:")
    assert message.count("transformers.0.") == PER_EXIT and "transformers.1." not in message
    assert first(runs["exit detached"], "no_training") == broken_runs.WINDOW, "as soon as a window is full, not before"


def test_one_bit_of_a_frozen_weight_is_seen_and_named(runs) -> None:
    found = events(runs["weight overwritten"])
    assert set(found) == {"frozen_weight_changed"}
    (message,) = found["frozen_weight_changed"]
    assert "decoder.layers.1.fc1.weight is frozen" in message


def test_exits_that_give_one_anothers_features_are_a_collapse(runs) -> None:
    found = events(runs["one for all"])
    assert len(found["mode_collapse"]) == 2 and "features of another exit" in found["mode_collapse"][0]
    assert "exit 3" in found["no_training"][0]


def test_an_exit_that_says_one_token_to_everything_is_a_collapse(runs) -> None:
    (message,) = events(runs["constant"])["mode_collapse"]
    assert message.startswith("exit 3 has 0.000 of the full model's variety of tokens")


def test_exits_that_move_away_from_the_full_model_forget(runs) -> None:
    run = runs["exits too fast, late"]
    assert len(events(run)["forgetting"]) == 2
    assert first(run, "forgetting") >= 8, "not before they did"


def test_exits_that_are_surer_than_right_are_miscalibrated(runs) -> None:
    run = runs["wrong labels"]
    found = events(run)
    assert len(found["miscalibration"]) == 2 and "more sure than it is right" in found["miscalibration"][0]
    assert first(run, "miscalibration") >= 12, "only in the second half"


def test_a_threshold_that_nothing_passes_piles_tokens_at_the_end(runs) -> None:
    (message,) = events(runs["never leaves"])["piled_exits"]
    assert "leave at no exit" in message


def test_exits_that_learnt_to_end_at_once_are_biased_in_length(runs) -> None:
    messages = events(runs["ends at once"])["length_bias"]
    assert {message[:6] for message in messages} == {"exit 1", "exit 3"}


def test_a_gradient_that_vanishes_is_seen(runs) -> None:
    run = runs["no loss left"]
    assert "grad_norm/exits fell from" in events(run)["vanished_gradient"][0]
    assert first(run, "vanished_gradient") >= 8


@pytest.mark.parametrize("name", ["slow", "slow, shared backbone"])
def test_a_slow_rank_is_named(pairs, name: str) -> None:
    # Where the machine holds up the other rank for a step, the alarm ends and comes again.
    messages = events(pairs[name])["slow_rank"]
    assert messages and all(message.startswith("rank 1 takes") for message in messages)


def skipped(run: tuple[Log, str]) -> tuple[int, str]:
    """Step and message of the one skipped step."""
    (line,) = [line for line in run[0] if line.get("event") == "skipped_step"]
    steps = [line for line in run[0] if "step/stepped" in line]
    assert [line["step"] for line in steps if not line["step/stepped"]] == [line["step"]]
    assert steps[-1]["skipped/steps"] == 1
    return line["step"], line["message"]


def test_a_bad_pixel_is_skipped_jointly_with_rank_and_sample_named(pairs) -> None:
    step, message = skipped(pairs["input"])
    assert step == 4
    assert "rank 1: not finite:" in message and "pixels" in message and "rank 0" not in message
    assert message.endswith("samples rank-1-row-1"), "the one sample, not its neighbours"
    assert "task_loss of exit 1" in message and "engine exits, exit 3" in message and "engine discriminators" in message


def test_an_infinite_gradient_is_skipped_with_engine_and_exit_named(pairs) -> None:
    step, message = skipped(pairs["gradient"])
    assert step == 6
    assert "rank 1: not finite: gradients of engine exits, exit 3 (transformers.1." in message
    assert "exit 1" not in message and "discriminators" not in message and "rank 0" not in message


def test_an_infinite_loss_is_skipped(pairs) -> None:
    step, message = skipped(pairs["loss"])
    assert step == 5
    assert "rank 0: not finite" in message and "rank 1: not finite" in message


def test_skipping_again_and_again_ends_the_run_with_a_clear_error(pairs) -> None:
    log, error = pairs["always"]
    assert [line["step"] for line in log if line.get("event") == "skipped_step"] == [1, 2, 3, 4]
    assert "4 steps in a row were skipped, more than training.max_skipped_in_a_row=3" in error
