"""Thresholds with a guarantee: which candidates keep their expected loss below epsilon, judged from a table of losses.

Two methods.  Learn then Test (Angelopoulos et al. 2021, arXiv 2110.01052): with probability 1 - delta over the calibration
units, the chosen candidate's expected loss on a new unit is at most epsilon.  Conformal risk control (Angelopoulos et al. 2022,
arXiv 2208.02814): the expected loss of the chosen candidate is at most epsilon, calibration and new unit averaged over together.
Both need units that are drawn independently from what will be served; candidates and their order must not depend on them.

Arrays in, decision out, in float64.  Does not know models, tasks, thresholds or files; candidates are column numbers.

Shape letters: N units (independent draws), C candidates from safe to fast, K exits, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

METHODS = ("ltt", "crc")
"""``ltt``: Learn then Test, with probability 1 - delta; ``crc``: conformal risk control, in expectation."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a calibration says about its candidates."""

    values: tuple[float, ...]
    """Per candidate: its p-value (``ltt``) or its upper bound on the expected loss (``crc``)."""
    certified: tuple[bool, ...]
    """Per candidate: whether the guarantee covers it; always the first ones of the order."""
    chosen: int | None
    """The cheapest certified candidate; None: none is certified and cheaper than not exiting at all."""


@dataclass(frozen=True, kw_only=True)
class Resplits:
    """How often a method breaks its promise when the calibration is repeated on a pool whose losses are all known."""

    repeats: int
    violations: int
    """Repetitions whose chosen candidate has a loss above epsilon over the whole pool."""
    naive_violations: int
    """The same for the cheapest candidate whose observed mean loss is at most epsilon, without any test."""
    faster: int
    """Repetitions that chose something cheaper than not exiting."""
    mean_loss: float
    """Pool loss of the chosen candidates, averaged over the repetitions."""
    mean_cost: float
    """Cost of the chosen candidates, averaged over the repetitions."""
    unsafe_candidates: int
    """Candidates with a pool loss above epsilon; where it is 0, no choice can be wrong."""


def hoeffding_bentkus_p_value(total: float, n: int, epsilon: float) -> float:
    """P-value of "the expected loss exceeds epsilon" from the ``total`` of ``n`` independent losses in [0, 1].

    The smaller of Hoeffding's ``exp(-n KL(mean, epsilon))`` and Bentkus' ``e P(Binomial(n, epsilon) <= ceil(total))``, at
    most 1 (Bates et al. 2021, arXiv 2101.02703, section 3.1).  Raises ValueError unless 0 < epsilon < 1 and 0 <= total <= n.
    """
    if not 0 < epsilon < 1 or n < 1 or not 0 <= total <= n:
        raise ValueError(f"want 0 < epsilon < 1 and 0 <= total <= n >= 1, got epsilon={epsilon}, total={total}, n={n}")
    hoeffding = math.exp(-n * _bernoulli_divergence(min(total / n, epsilon), epsilon))
    bentkus = math.e * _binomial_tail(math.ceil(total), n, epsilon)
    return min(1.0, hoeffding, bentkus)


def learn_then_test(losses: Floats, costs: Floats, full_cost: float, *, epsilon: float, delta: float) -> Decision:
    """Test the candidates in their order and stop at the first that fails: all before it are certified at once.

    ``losses`` [N, C] in [0, 1], ``costs`` [C]; ``full_cost`` is that of not exiting, whose loss is 0.  Fixed-sequence
    testing keeps the chance that any certified candidate has an expected loss above epsilon below delta, whatever the
    order and however the losses of one unit depend on each other.  Raises ValueError for unusable arrays.
    """
    _check(losses, costs)
    n = len(losses)
    values = tuple(hoeffding_bentkus_p_value(_total(column), n, epsilon) for column in losses.T)
    passed = next((c for c, value in enumerate(values) if value > delta), len(values))
    return _decision(values, passed, costs, full_cost)


def conformal_risk_control(losses: Floats, costs: Floats, full_cost: float, *, epsilon: float) -> Decision:
    """Certify the candidates up to the last with ``n / (n + 1) mean + 1 / (n + 1) <= epsilon`` (theorem 1).

    The theorem needs losses that only grow along the order; thresholded decoding gives no such promise, so it is applied
    to the :func:`monotone_envelope`, which is never below the losses themselves.  Raises ValueError for unusable arrays.
    """
    _check(losses, costs)
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon}: want 0 < epsilon < 1")
    n = len(losses)
    values = tuple((_total(column) + 1) / (n + 1) for column in monotone_envelope(losses).T)
    passed = next((c for c, value in enumerate(values) if value > epsilon), len(values))
    return _decision(values, passed, costs, full_cost)


def monotone_envelope(losses: Floats) -> Floats:
    """[N, C] -> [N, C]: per unit, the largest loss of a candidate and all safer ones."""
    return np.maximum.accumulate(losses, axis=1)


def calibrate(
    losses: Floats, costs: Floats, full_cost: float, *, method: str, epsilon: float, delta: float
) -> Decision:
    """:func:`learn_then_test` or :func:`conformal_risk_control` by name; the latter has no use for ``delta``."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: want one of {', '.join(METHODS)}")
    if method == "ltt":
        return learn_then_test(losses, costs, full_cost, epsilon=epsilon, delta=delta)
    return conformal_risk_control(losses, costs, full_cost, epsilon=epsilon)


def smallest_epsilon(total: float, n: int, *, method: str, delta: float) -> float:
    """The smallest epsilon at which a first candidate with this total of n losses would be certified.

    With ``total=0`` no candidate can be certified below it, however good: about ``ln(1 / delta) / n`` for ``ltt``.
    """
    if method == "crc":
        return min(1.0, (total + 1) / (n + 1))
    low, high = 0.0, 1.0
    for _ in range(60):  # the p-value falls as epsilon grows
        middle = (low + high) / 2
        low, high = (low, middle) if hoeffding_bentkus_p_value(total, n, middle) <= delta else (middle, high)
        if high - low < 1e-12:
            break
    return high


def resplit(
    losses: Floats,
    costs: Floats,
    full_cost: float,
    *,
    method: str,
    epsilon: float,
    delta: float,
    repeats: int,
    seed: int = 0,
) -> Resplits:
    """Repeat a calibration on fresh draws of N units with replacement from the rows of ``losses`` [N, C].

    The rows are the whole population here, so the expected loss of every candidate is known: its mean over all rows.
    """
    _check(losses, costs)
    generator = np.random.default_rng(seed)
    n = len(losses)
    risks = np.array([_total(column) / n for column in losses.T])
    violations = naive_violations = faster = 0
    chosen_losses, chosen_costs = [], []
    for _ in range(repeats):
        drawn = losses[generator.integers(0, n, n)]
        chosen = calibrate(drawn, costs, full_cost, method=method, epsilon=epsilon, delta=delta).chosen
        loss, cost = (0.0, full_cost) if chosen is None else (float(risks[chosen]), float(costs[chosen]))
        violations += loss > epsilon
        faster += chosen is not None
        chosen_losses.append(loss)
        chosen_costs.append(cost)
        plausible = np.flatnonzero((drawn.mean(axis=0) <= epsilon) & (costs < full_cost))
        naive_violations += bool(plausible.size) and bool(risks[plausible[costs[plausible].argmin()]] > epsilon)
    return Resplits(
        repeats=repeats,
        violations=violations,
        naive_violations=naive_violations,
        faster=faster,
        mean_loss=math.fsum(chosen_losses) / repeats,
        mean_cost=math.fsum(chosen_costs) / repeats,
        unsafe_candidates=int((risks > epsilon).sum()),
    )


def replay(
    confidences: Floats,
    wrong: NDArray[np.bool_],
    weights: Floats,
    thresholds: Floats,
    exit_layers: Sequence[int],
    *,
    n_blocks: int,
    head_cost: float,
) -> tuple[float, float]:
    """(loss, cost per token) that ``thresholds`` [K] would have had on T tokens whose exits were all asked and never emitted.

    ``confidences`` [T, K]; ``wrong`` [T, K], where an exit's token is not the full model's; ``weights`` [T] of the tokens, with
    sum 1.  The loss is the weighted share of wrong tokens.  An answer's tokens after its first wrong one are those of the full
    model here and would be others in truth, so this is good enough to propose candidates and not to judge them.  Cost in blocks;
    a check costs an exit transformer (one block) and a head (``head_cost``).
    """
    n_exits = len(thresholds)
    fires = confidences > thresholds
    first = np.where(fires.any(axis=1), fires.argmax(axis=1), n_exits)
    asked = np.cumsum(thresholds < 1)
    checks = np.append(asked, asked[-1])[first]
    depths = np.array([*exit_layers, n_blocks])[first]
    missed = np.pad(wrong, ((0, 0), (0, 1)))[np.arange(len(first)), first]
    costs = depths + checks * (1 + head_cost) + (first == n_exits) * head_cost
    return float((missed * weights).sum()), float(costs.mean())


def descent_path(
    levels: int, n_exits: int, measure: Callable[[tuple[int, ...]], tuple[float, float]]
) -> list[tuple[int, ...]]:
    """Greedy coordinate descent from "no exit" to "every exit at its lowest threshold", one exit and one level at a time.

    A candidate is one level per exit: 0 is off, ``levels`` the lowest threshold.  ``measure`` gives its (loss, cost).  The exit
    to lower next is the one that can buy the most cost per loss by being lowered, by any number of levels.  Returns
    the candidates met that are cheaper than all before them, safe to fast.  To be run on units that are not tested on.
    """
    here = (0,) * n_exits
    loss, cost = measure(here)
    least = cost
    path = []
    while moves := [k for k in range(n_exits) if here[k] < levels]:
        prices = []
        for k in moves:
            # One level may cost more than it saves (a check that never fires) although the next one pays.
            reachable = [measure((*here[:k], level, *here[k + 1 :])) for level in range(here[k] + 1, levels + 1)]
            prices.append(min(_price(there[0] - loss, cost - there[1]) for there in reachable))
        k = moves[prices.index(min(prices))]
        here = (*here[:k], here[k] + 1, *here[k + 1 :])
        loss, cost = measure(here)
        if cost < least:
            least = cost
            path.append(here)
    return path


def undominated(losses: Floats, costs: Floats) -> list[int]:
    """Numbers of the candidates [C] that no cheaper one beats in loss, in order of loss, then from dear to cheap.

    Of candidates with equal loss all stay: the dearer ones are the safer start of a sequence of tests.
    """
    kept = [c for c in range(len(losses)) if not np.any((costs < costs[c]) & (losses < losses[c]))]
    return sorted(kept, key=lambda c: (losses[c], -costs[c]))


def _price(extra_loss: float, saving: float) -> tuple[float, float]:
    """Sort key of a move: no saving comes last; among free moves the one that saves most comes first."""
    return (math.inf, -saving) if saving <= 0 else (max(extra_loss, 0.0) / saving, -saving)


def _decision(values: tuple[float, ...], passed: int, costs: Floats, full_cost: float) -> Decision:
    chosen = min(range(passed), key=lambda c: costs[c], default=None)
    if chosen is not None and costs[chosen] >= full_cost:
        chosen = None
    certified = tuple(c < passed for c in range(len(values)))
    return Decision(values=values, certified=certified, chosen=chosen)


def _total(column: Floats) -> float:
    # Exactly rounded: ten losses of 0.1 are one error, and the binomial tail counts errors.
    return math.fsum(column.tolist())


def _bernoulli_divergence(a: float, b: float) -> float:
    """KL divergence of Bernoulli(a) from Bernoulli(b) in nats, 0 <= a <= b < 1."""
    left = 0.0 if a == 0 else a * math.log(a / b)
    right = 0.0 if a == 1 else (1 - a) * (math.log1p(-a) - math.log1p(-b))
    return max(0.0, left + right)


def _binomial_tail(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k), summed from logarithms of its terms; relative error about 1e-12."""
    if k >= n:
        return 1.0
    logs = _log_factorials(n)
    j = np.arange(k + 1)
    terms = logs[n] - logs[j] - logs[n - j] + j * math.log(p) + (n - j) * math.log1p(-p)
    largest = float(terms.max())
    return min(1.0, math.exp(largest) * math.fsum(np.exp(terms - largest).tolist()))


@cache
def _log_factorials(n: int) -> Floats:
    """[n + 1]: log(0!), ..., log(n!)."""
    return np.array([math.lgamma(j + 1) for j in range(n + 1)])


def _check(losses: Floats, costs: Floats) -> None:
    if losses.ndim != 2 or losses.shape[0] < 1 or costs.shape != losses.shape[1:]:
        raise ValueError(f"want losses [N, C] and costs [C], got {list(losses.shape)} and {list(costs.shape)}")
    if not np.all((losses >= 0) & (losses <= 1)):
        raise ValueError("losses outside [0, 1]: the bounds hold for none such")
