"""The promises of calibration, checked by simulation, and its p-values against an independent computation."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest

from free_dist.decoding.calibrate import (
    calibrate,
    conformal_risk_control,
    descent_path,
    hoeffding_bentkus_p_value,
    learn_then_test,
    monotone_envelope,
    replay,
    resplit,
    smallest_epsilon,
    undominated,
)

N_UNITS = 400
COSTS = np.linspace(16.0, 3.0, 14)
FULL_COST = 17.0
RESPLITS = 200


def above_by_chance(rate: float, n: int) -> float:
    """Three binomial standard deviations above ``rate``."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / n)


@pytest.fixture(scope="module", params=["errors", "shares"])
def pool(request) -> np.ndarray:
    """[N, C] losses of a path that grows steadily more harmful, with means just below and above 0.05: errors, or shares."""
    errors = np.array([0, 0, 1, 2, 4, 8, 12, 16, 19, 21, 24, 32, 48, 80])
    rank = np.random.default_rng(3).permutation(N_UNITS)[:, None]
    if request.param == "errors":
        return (rank < errors).astype(float)
    return (rank < 2 * errors) * np.where(rank % 2, 0.25, 0.75)


@pytest.mark.parametrize(("total", "n", "epsilon"), [(0, 300, 0.01), (2, 300, 0.01), (7.3, 400, 0.05), (40, 50, 0.9)])
def test_p_value_is_the_smaller_of_both_bounds_in_high_precision(total: float, n: int, epsilon: float) -> None:
    with mpmath.workdps(40):
        a, b = mpmath.mpf(total) / n, mpmath.mpf(epsilon)
        divergence = (a * mpmath.log(a / b) if a else 0) + (1 - a) * mpmath.log((1 - a) / (1 - b))
        k = math.ceil(total)
        tail = mpmath.betainc(n - k, k + 1, 0, 1 - b, regularized=True)
        wanted = min(mpmath.exp(-n * divergence), mpmath.e * tail, 1)
    assert hoeffding_bentkus_p_value(total, n, epsilon) == pytest.approx(float(wanted), rel=1e-9)


def test_p_value_is_one_at_and_above_epsilon_and_falls_as_epsilon_grows() -> None:
    assert hoeffding_bentkus_p_value(5, 100, 0.05) == hoeffding_bentkus_p_value(100, 100, 0.05) == 1.0
    values = [hoeffding_bentkus_p_value(3.5, 200, epsilon) for epsilon in np.linspace(0.001, 0.999, 200)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


LOSSES = {
    "errors": lambda generator, shape, mean: (generator.random(shape) < mean).astype(float),
    "half errors": lambda generator, shape, mean: 0.5 * (generator.random(shape) < 2 * mean),
    "beta": lambda generator, shape, mean: generator.beta(0.5, 0.5 * (1 - mean) / mean, shape),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("n", "epsilon"), [(100, 0.05), (400, 0.01)])
def test_p_values_at_the_edge_of_the_null_are_no_smaller_than_uniform_ones(kind: str, n: int, epsilon: float) -> None:
    draws = 2000
    losses = LOSSES[kind](np.random.default_rng(11), (draws, n), epsilon)
    values = np.array([hoeffding_bentkus_p_value(math.fsum(row), n, epsilon) for row in losses.tolist()])
    for level in (0.01, 0.05, 0.1, 0.3):
        assert (values <= level).mean() <= above_by_chance(level, draws)


def test_the_simulation_above_catches_a_normal_approximation() -> None:
    n, epsilon, draws = 100, 0.05, 2000
    losses = LOSSES["errors"](np.random.default_rng(11), (draws, n), epsilon)
    z = (losses.mean(axis=1) - epsilon) / np.maximum(losses.std(axis=1), 1e-9) * math.sqrt(n)
    values = np.array([0.5 * math.erfc(-score / math.sqrt(2)) for score in z])
    assert (values <= 0.01).mean() > above_by_chance(0.01, draws)


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_learn_then_test_breaks_its_promise_no_more_often_than_delta(pool: np.ndarray, delta: float) -> None:
    found = resplit(pool, COSTS, FULL_COST, method="ltt", epsilon=0.05, delta=delta, repeats=RESPLITS, seed=1)
    assert found.unsafe_candidates >= 3
    assert found.violations / RESPLITS <= above_by_chance(delta, RESPLITS)
    assert found.faster > 0.9 * RESPLITS
    assert found.mean_cost < 0.7 * FULL_COST


def test_the_largest_mean_below_epsilon_breaks_it_often(pool: np.ndarray) -> None:
    found = resplit(pool, COSTS, FULL_COST, method="ltt", epsilon=0.05, delta=0.05, repeats=RESPLITS, seed=1)
    assert found.naive_violations / RESPLITS > above_by_chance(0.2, RESPLITS)


def test_a_path_of_many_candidates_just_above_epsilon_is_safe_too() -> None:
    # Testing each candidate at level delta without stopping would certify some unsafe one in most draws.
    losses = (np.random.default_rng(5).random((N_UNITS, 60)) < 0.055).astype(float)
    losses = losses[:, losses.mean(axis=0) > 0.05]
    costs = np.linspace(10.0, 2.0, losses.shape[1])
    found = resplit(losses, costs, FULL_COST, method="ltt", epsilon=0.05, delta=0.2, repeats=RESPLITS, seed=2)
    assert found.unsafe_candidates == losses.shape[1] > 20
    assert found.violations / RESPLITS <= above_by_chance(0.2, RESPLITS)
    generator = np.random.default_rng(2)
    one_by_one = 0
    for _ in range(50):
        drawn = losses[generator.integers(0, N_UNITS, N_UNITS)]
        one_by_one += any(hoeffding_bentkus_p_value(column.sum(), N_UNITS, 0.05) <= 0.2 for column in drawn.T)
    assert one_by_one / 50 > above_by_chance(0.2, 50)


@pytest.mark.parametrize("epsilon", [0.01, 0.05])
def test_conformal_risk_control_keeps_the_mean_loss_below_epsilon(pool: np.ndarray, epsilon: float) -> None:
    found = resplit(pool, COSTS, FULL_COST, method="crc", epsilon=epsilon, delta=0.5, repeats=RESPLITS, seed=1)
    assert found.mean_loss <= epsilon  # the envelope leaves more room than the error of the simulation
    assert found.faster > 0.9 * RESPLITS
    assert found.unsafe_candidates >= 3


def test_risk_control_is_needed_with_few_units_where_the_observed_mean_is_not_enough() -> None:
    epsilon, n, draws = 0.1, 20, 1500
    risks = np.linspace(0, 0.5, 40)
    generator = np.random.default_rng(8)
    costs = np.linspace(10.0, 2.0, len(risks))
    expected = {"crc": 0.0, "observed mean": 0.0}
    for _ in range(draws):
        losses = (generator.random((n, 1)) < risks).astype(
            float
        )  # a unit hurt by one candidate is hurt by all faster ones
        decision = conformal_risk_control(losses, costs, FULL_COST, epsilon=epsilon)
        expected["crc"] += (0.0 if decision.chosen is None else risks[decision.chosen]) / draws
        expected["observed mean"] += risks[np.flatnonzero(losses.mean(axis=0) <= epsilon)[-1]] / draws
    error = 3 * 0.07 / math.sqrt(draws)
    assert expected["crc"] <= epsilon + error
    assert expected["crc"] > 0.05
    assert expected["observed mean"] > epsilon + error


def test_bound_of_risk_control_is_the_mean_with_one_more_unit_that_is_lost() -> None:
    losses = np.array([[0.0, 0.5], [0.0, 0.0], [0.0, 0.25]])
    decision = conformal_risk_control(losses, np.array([5.0, 4.0]), 9.0, epsilon=0.3)
    assert decision.values == pytest.approx((1 / 4, 1.75 / 4))
    assert (decision.certified, decision.chosen) == ((True, False), 0)


def test_envelope_is_monotone_never_below_the_losses_and_touches_them() -> None:
    losses = np.array([[0.0, 0.3, 0.1, 0.6], [0.2, 0.1, 0.0, 0.0]])
    assert monotone_envelope(losses).tolist() == [[0.0, 0.3, 0.3, 0.6], [0.2, 0.2, 0.2, 0.2]]


def test_a_recovery_behind_a_harmful_candidate_is_never_certified() -> None:
    losses = np.zeros((N_UNITS, 3))
    losses[:100, 1] = 1.0
    for method in ("ltt", "crc"):
        decision = calibrate(losses, np.array([5.0, 4.0, 3.0]), 9.0, method=method, epsilon=0.05, delta=0.05)
        assert (decision.certified, decision.chosen) == ((True, False, False), 0)


def test_the_cheapest_certified_candidate_is_chosen_and_none_that_costs_as_much_as_no_exit() -> None:
    losses = np.zeros((N_UNITS, 3))
    assert learn_then_test(losses, np.array([5.0, 3.0, 4.0]), 9.0, epsilon=0.05, delta=0.05).chosen == 1
    decision = learn_then_test(losses, np.array([12.0, 9.0, 9.5]), 9.0, epsilon=0.05, delta=0.05)
    assert (decision.certified, decision.chosen) == ((True, True, True), None)


@pytest.mark.parametrize("method", ["ltt", "crc"])
@pytest.mark.parametrize("total", [0.0, 3.5])
def test_smallest_epsilon_is_where_certification_begins(method: str, total: float) -> None:
    n = 200
    losses = np.zeros((n, 1))
    losses[:8, 0] = total / 8
    edge = smallest_epsilon(total, n, method=method, delta=0.05)
    for epsilon, certified in ((edge * 1.0001, True), (edge * 0.9999, False)):
        decision = calibrate(losses, np.array([1.0]), 2.0, method=method, epsilon=epsilon, delta=0.05)
        assert decision.certified == (certified,)


def test_unusable_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        learn_then_test(np.array([[1.2]]), np.array([1.0]), 2.0, epsilon=0.1, delta=0.1)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        learn_then_test(np.array([[math.nan]]), np.array([1.0]), 2.0, epsilon=0.1, delta=0.1)
    with pytest.raises(ValueError, match=r"got \[1, 2\] and \[1\]"):
        conformal_risk_control(np.zeros((1, 2)), np.array([1.0]), 2.0, epsilon=0.1)
    with pytest.raises(ValueError, match="epsilon=0"):
        hoeffding_bentkus_p_value(0, 10, 0.0)
    with pytest.raises(ValueError, match="ltt, crc"):
        calibrate(np.zeros((1, 1)), np.zeros(1), 1.0, method="bonferroni", epsilon=0.1, delta=0.1)


def test_replay_agrees_with_walking_through_the_tokens_one_by_one() -> None:
    generator = np.random.default_rng(0)
    confidences, wrong = generator.random((50, 3)), generator.random((50, 3)) < 0.3
    weights = generator.random(50)
    weights /= weights.sum()
    layers, n_blocks, head_cost = (2, 4, 7), 16, 1.64
    for thresholds in itertools.product((1.1, 0.8, 0.3), repeat=3):
        loss, costs = 0.0, []
        for t in range(50):
            cost = 0.0
            for k in range(3):
                if thresholds[k] >= 1:
                    continue
                cost += 1 + head_cost
                if confidences[t, k] > thresholds[k]:
                    costs.append(cost + layers[k])
                    loss += weights[t] * wrong[t, k]
                    break
            else:
                costs.append(cost + n_blocks + head_cost)
        found = replay(
            confidences, wrong, weights, np.array(thresholds), layers, n_blocks=n_blocks, head_cost=head_cost
        )
        assert found == pytest.approx((loss, sum(costs) / 50))


def test_descent_meets_cheaper_and_cheaper_candidates_and_lowers_the_harmless_exit_first() -> None:
    def measure(levels: tuple[int, ...]) -> tuple[float, float]:
        harmless, harmful = levels
        # A first level that only costs: the check is paid for and never fires.
        return 0.01 * harmful, 20 - 2 * harmless - 3 * harmful + (4 if harmless else 0) + (4 if harmful else 0)

    path = descent_path(4, 2, measure)
    costs = [measure(levels)[1] for levels in path]
    assert all(later < earlier for earlier, later in itertools.pairwise([20, *costs]))
    assert path[-1] == (4, 4)
    assert {levels for levels in path if levels[1] == 0} == {(3, 0), (4, 0)}
    assert all(levels[0] == 4 for levels in path if levels[1] > 0)


def test_candidates_that_a_cheaper_one_beats_are_dropped_and_equal_losses_kept() -> None:
    losses, costs = np.array([0.0, 0.0, 0.3, 0.1, 0.4]), np.array([9.0, 8.0, 7.0, 5.0, 4.0])
    assert undominated(losses, costs) == [0, 1, 3, 4]
