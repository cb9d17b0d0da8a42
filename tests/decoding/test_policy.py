"""When an exit is confident enough: four measures against float64 formulas, thresholds per exit and position, patience."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from free_dist.config import UserError
from free_dist.decoding.policy import (
    POLICY_NAMES,
    Decision,
    EntropyPolicy,
    MarginPolicy,
    MaxProbPolicy,
    PatiencePolicy,
    Scores,
    ThresholdTable,
    _fetched_together,
    make_policy,
)

HALF = torch.tensor([[2.0, 2.0, -math.inf]])
"""Logits whose largest probability is exactly one half."""
CERTAIN = torch.tensor([[500.0, -500.0]])

every_policy = pytest.mark.parametrize("name", POLICY_NAMES)


def reference(name: str, logits: Tensor) -> list[float]:
    """Confidences [R] by the textbook formula in float64."""
    probabilities = torch.softmax(logits.double(), dim=-1)
    if name == "entropy":
        rows = [[p for p in row if p > 0] for row in probabilities.tolist()]
        return [1.0 + math.fsum(p * math.log(p) for p in row) / math.log(logits.shape[-1]) for row in rows]
    ordered = probabilities.sort(dim=-1, descending=True).values
    return (ordered[:, 0] - ordered[:, 1] if name == "margin" else ordered[:, 0]).tolist()


def decide(policy, logits: Tensor, exit_index: int = 0, *, positions=None, earlier=None, ids=None) -> Decision:
    """A decision at the first answer token, where no exit was checked before, unless said otherwise."""
    rows = len(logits)
    return policy.decide(exit_index, Scores(logits, ids), positions or [0] * rows, earlier or [[]] * rows)


def alone(name: str, thresholds=0.0, n_exits: int = 1):
    """The policy of that name, without a say of other exits."""
    return make_policy(name, thresholds, n_exits, patience=1)


def random_logits(rows: int, columns: int, seed: int = 0) -> Tensor:
    """From nearly uniform rows to nearly certain ones, float64."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, rows, dtype=torch.float64)[:, None]
    return scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@every_policy
@pytest.mark.parametrize("columns", [2, 50, 5000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 2e-6), (torch.float16, 2e-6), (torch.float32, 2e-6), (torch.float64, 1e-13)],
)
def test_confidence_is_the_float64_formula_of_the_same_logits(name, columns, dtype, tolerance) -> None:
    logits = random_logits(24, columns).to(dtype)
    decision = decide(alone(name), logits)
    assert decision.confidences == pytest.approx(reference(name, logits), abs=tolerance)
    assert decision.tokens.dtype == torch.int64
    assert torch.equal(decision.tokens, logits.argmax(dim=-1))


@every_policy
def test_forbidden_tokens_take_no_part(name) -> None:
    logits = random_logits(6, 40)
    logits[:, ::3] = -math.inf
    assert decide(alone(name), logits).confidences == pytest.approx(reference(name, logits), abs=1e-13)


@every_policy
def test_a_constant_added_to_the_logits_changes_nothing(name) -> None:
    logits = (random_logits(12, 64) * 256).round().float() / 256  # so that the sums below are exact
    there, here = decide(alone(name), logits + 8192), decide(alone(name), logits)
    assert there.confidences == here.confidences
    assert torch.equal(there.tokens, here.tokens)


@every_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confidence_stays_between_0_and_1_at_extreme_logits(name, dtype) -> None:
    for columns in (2, 3, 1000, 50_000):
        extreme = torch.zeros(8, columns, dtype=dtype)
        extreme[1] = 1e30
        extreme[2, 0] = 1e30
        extreme[3, 1:] = -1e30
        extreme[4, 1:] = -math.inf
        extreme[5] = torch.linspace(-1e30, 1e30, columns, dtype=dtype)
        extreme[6] = 1e-30
        extreme[7, -1] = 1e-7
        for threshold in (0.0, 1.0):
            decision = decide(alone(name, threshold), extreme)
            assert all(0.0 <= confidence <= 1.0 for confidence in decision.confidences)
        assert [decision.confidences[row] for row in (2, 3, 4, 5)] == [1.0] * 4


@every_policy
def test_a_lone_column_is_certain(name) -> None:
    decision = decide(alone(name, math.nextafter(1.0, 0.0)), torch.tensor([[-3.0], [1e30]]), ids=torch.tensor([7]))
    assert decision.confidences == [1.0, 1.0] and decision.emit == [True, True] and decision.tokens.tolist() == [7, 7]


def test_uniform_logits_are_no_confidence_for_entropy_and_margin() -> None:
    uniform = torch.zeros(1, 1000)
    assert decide(EntropyPolicy(0.5, 1), uniform).confidences == pytest.approx([0.0], abs=1e-6)
    assert decide(MarginPolicy(0.5, 1), uniform).confidences == [0.0]
    assert decide(MaxProbPolicy(0, 1), uniform).emit == [True]  # of a thousand, one in a thousand is still above 0


@every_policy
def test_logits_without_a_softmax_are_never_emitted(name) -> None:
    broken = torch.zeros(4, 5)
    broken[0, 2], broken[1, 3], broken[2] = math.nan, math.inf, -math.inf
    broken[3, 4] = 9.0
    assert decide(alone(name), broken).emit == [False, False, False, True]


@every_policy
def test_of_equal_logits_the_first_column_is_the_token(name) -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [70, 4999]] = 3.0
    logits[1, [1, 2, 3]] = 3.0
    assert decide(alone(name), logits).tokens.tolist() == [70, 1]


@every_policy
def test_the_token_is_the_largest_logit_even_where_probabilities_round_to_the_same(name) -> None:
    assert decide(alone(name), torch.tensor([[0.0, 1e-9, -1.0]])).tokens.tolist() == [1]


@every_policy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_logits_are_left_as_they_were(name, dtype) -> None:
    logits = random_logits(3, 20).to(dtype)
    logits[:, 4] = -math.inf
    before = logits.clone()
    decide(alone(name), logits)
    assert torch.equal(logits, before)


@every_policy
def test_columns_are_named_by_their_token_ids(name) -> None:
    ids = torch.tensor([3, 17, 2**24 + 1, 2**40 + 1])
    logits = torch.eye(4) * 9
    decision = decide(alone(name), logits, ids=ids)
    assert torch.equal(decision.tokens, ids)
    assert decision.confidences == decide(alone(name), logits).confidences


@every_policy
def test_rows_do_not_influence_each_other(name) -> None:
    rows, rng = 40, random.Random(1)
    thresholds = [[rng.random() for _ in range(4)] for _ in range(3)]
    policy = make_policy(name, thresholds, 3, patience=2)
    logits = random_logits(rows, 6, seed=2)
    ids = torch.tensor([1, 4, 5, 8, 9, 11])
    positions = [rng.randrange(6) for _ in range(rows)]
    earlier = [[int(ids[rng.choice([int(row.argmax()), rng.randrange(6)])])] for row in logits]
    for exit_index in range(3):
        together = policy.decide(exit_index, Scores(logits, ids), positions, earlier)
        singly = [
            policy.decide(exit_index, Scores(logits[r : r + 1], ids), [positions[r]], [earlier[r]]) for r in range(rows)
        ]
        assert together.tokens.tolist() == [int(one.tokens) for one in singly]
        assert together.confidences == pytest.approx([one.confidences[0] for one in singly], rel=1e-12)
        assert together.emit == [one.emit[0] for one in singly]
        assert {True, False} == set(together.emit)


@every_policy
def test_a_confidence_equal_to_the_threshold_does_not_exit(name) -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0]])
    (confidence,) = decide(alone(name), logits).confidences
    assert decide(alone(name, confidence), logits).emit == [False]
    assert decide(alone(name, math.nextafter(confidence, 0.0)), logits).emit == [True]


def test_a_confidence_of_exactly_one_half_is_not_above_one_half() -> None:
    assert decide(MaxProbPolicy(0.5, 1), HALF).emit == [False]
    assert decide(MaxProbPolicy(math.nextafter(0.5, 0.0), 1), HALF).emit == [True]


@every_policy
def test_thresholds_of_one_and_above_switch_an_exit_off(name) -> None:
    policy = alone(name, [0.0, math.nextafter(1.0, 0.0), 1.0, 1.1, math.inf], 5)
    assert [policy.is_active(index) for index in range(5)] == [True, True, False, False, False]
    assert [policy.is_active_at(index, 3) for index in range(5)] == [True, True, False, False, False]
    assert [decide(policy, CERTAIN, index).emit for index in range(5)] == [[True], [True], [False], [False], [False]]


@every_policy
def test_each_exit_has_its_own_threshold_and_one_number_serves_all(name) -> None:
    logits = torch.tensor([[1.0, 0.0]])
    (confidence,) = decide(alone(name), logits).confidences
    policy = alone(name, [confidence - 0.01, confidence + 0.01], 2)
    assert [decide(policy, logits, index).emit for index in range(2)] == [[True], [False]]
    assert alone(name, 0.7, 3).thresholds.values == ((0.7,), (0.7,), (0.7,))


@every_policy
def test_thresholds_by_position_hold_for_their_position_and_the_last_for_all_later_ones(name) -> None:
    logits = torch.tensor([[1.0, 0.0]])
    (confidence,) = decide(alone(name), logits).confidences
    low, high = confidence - 0.01, confidence + 0.01
    policy = alone(name, [[low, 1.0, high], [high, 1.5, low]], 2)
    rows = logits.expand(5, -1)
    assert decide(policy, rows, 0, positions=[0, 1, 2, 3, 99]).emit == [True, False, False, False, False]
    assert decide(policy, rows, 1, positions=[0, 1, 2, 3, 99]).emit == [False, False, True, True, True]
    assert [policy.is_active_at(0, position) for position in (0, 1, 2, 3)] == [True, False, True, True]


@every_policy
def test_an_exit_is_active_if_it_can_fire_at_some_position(name) -> None:
    policy = alone(name, [[1.0, 1.0, 0.9], [1.0, 2.0, 1.0]], 2)
    assert [policy.is_active(0), policy.is_active(1)] == [True, False]
    assert [policy.is_active_at(0, position) for position in (0, 1, 2, 50)] == [False, False, True, True]


@every_policy
@pytest.mark.parametrize("columns", [1, 3])
def test_a_table_of_equal_columns_decides_as_one_threshold_per_exit(name, columns) -> None:
    per_exit = [0.3, 0.8, 1.0]
    plain, table = (make_policy(name, t, 3, patience=2) for t in (per_exit, [[t] * columns for t in per_exit]))
    logits = random_logits(10, 7)
    given = {"positions": list(range(10)), "earlier": [[int(row.argmax())] for row in logits]}
    for index in range(3):
        assert decide(plain, logits, index, **given).emit == decide(table, logits, index, **given).emit
        assert plain.is_active(index) is table.is_active(index)


@every_policy
@pytest.mark.parametrize(
    "thresholds",
    [
        [0.5],
        [0.5, 0.5, 0.5],
        [],
        -0.1,
        math.nan,
        [0.5, math.nan],
        [[0.5, 0.5]],
        [[0.5, 0.5], [0.5]],
        [[], []],
        [[0.5, 0.5], 0.5],
        [[0.5, -0.5], [0.5, 0.5]],
        [[0.5, math.nan], [0.5, 0.5]],
        "0.9",
        ["0.9", "0.9"],
        [[0.5], ["high"]],
        [None, 0.5],
        [[[0.5]], [[0.5]]],
    ],
)
def test_impossible_thresholds_are_named(name, thresholds) -> None:
    with pytest.raises(UserError, match="thresholds"):
        alone(name, thresholds, 2)


def test_text_is_no_threshold() -> None:
    with pytest.raises(UserError, match=r"'0\.9' is not a number"):
        ThresholdTable("0.9", 3)  # three letters for three exits


def test_threshold_tables_answer_for_any_position() -> None:
    table = ThresholdTable([(0.1, 0.2), (0.3, 0.4)], 2)
    assert [table.at(1, position) for position in (0, 1, 2, 1000)] == [0.3, 0.4, 0.4, 0.4]
    assert table.exceeded(0, [0.15, 0.15, 0.25], [0, 1, 7]) == [True, False, True]


def first_run(tokens: list[int], length: int) -> int | None:
    """Index at which ``length`` equal tokens in a row are first complete, counted as in PABEE."""
    count = 0
    for index, token in enumerate(tokens):
        count = count + 1 if index and token == tokens[index - 1] else 1
        if count == length:
            return index
    return None


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
def test_patience_exits_where_that_many_exits_in_a_row_first_agree(patience) -> None:
    rng = random.Random(patience)
    policy = PatiencePolicy(patience, 6)
    found = set()
    for _ in range(200):
        tokens = [rng.choice([4, 9]) for _ in range(6)]
        fired = None
        for index, token in enumerate(tokens):
            logits = torch.full((1, 12), -1.0)
            logits[0, token] = 1.0
            if decide(policy, logits, index, earlier=[tokens[:index]]).emit[0]:
                fired = index
                break
        assert fired == first_run(tokens, patience)
        found.add(fired)
    assert found >= ({0} if patience == 1 else {patience - 1, 5})


def test_patience_counts_the_exits_that_were_checked_whichever_they_are() -> None:
    logits = torch.tensor([[0.0, 5.0]] * 4)
    earlier = [[], [0], [1], [1, 0]]
    assert decide(PatiencePolicy(2, 6), logits, 5, earlier=earlier).emit == [False, False, True, False]


def test_patience_compares_token_ids_not_columns() -> None:
    logits, ids = torch.tensor([[0.0, 5.0]] * 2), torch.tensor([30, 2**24 + 1])
    assert decide(PatiencePolicy(2, 3), logits, 1, earlier=[[2**24 + 1], [1]], ids=ids).emit == [True, False]


def test_patience_and_threshold_must_both_be_met() -> None:
    policy = PatiencePolicy(2, 2, thresholds=0.5)
    logits = torch.tensor([[0.0, 3.0], [0.0, 3.0], [2.0, 2.0]])
    decision = decide(policy, logits, 1, earlier=[[1], [0], [0]])
    assert decision.emit == [True, False, False]
    assert decision.confidences == decide(MaxProbPolicy(0.5, 2), logits).confidences


def test_patience_of_one_is_the_largest_probability_alone() -> None:
    logits, earlier = random_logits(30, 9), [[99]] * 30  # no exit ever agrees
    for threshold in (0.0, 0.4, 0.99):
        mine = decide(PatiencePolicy(1, 2, threshold), logits, 1, earlier=earlier)
        plain = decide(MaxProbPolicy(threshold, 2), logits, 1)
        assert mine.emit == plain.emit and mine.confidences == plain.confidences


def test_exits_that_can_only_agree_are_still_checked() -> None:
    assert [PatiencePolicy(3, 3).is_active(index) for index in range(3)] == [True, True, True]


def test_no_exit_is_checked_where_too_few_are_left_to_agree() -> None:
    policy = PatiencePolicy(2, 3, [[0.0, 1.0, 1.0], [0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    active = [[policy.is_active_at(index, position) for position in range(4)] for index in range(3)]
    assert active == [[True, False, False, False], [True, True, False, False], [False, True, False, False]]
    assert [PatiencePolicy(2, 3, [0.5, 1.0, 1.0]).is_active(index) for index in range(3)] == [False] * 3


@pytest.mark.parametrize("patience", [-1, 0, 4])
def test_a_patience_that_no_token_can_reach_is_named(patience) -> None:
    with pytest.raises(UserError, match=f"patience={patience}.*3 exits"):
        make_policy("patience", 0.0, 3, patience=patience)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_and_confidences_fetched_together_are_exact(dtype) -> None:
    tokens = torch.tensor([0, 2**24 + 1, 2**31 + 1, 2**53 - 1])
    confidence = torch.tensor([0.1, 1 / 3, 1 - 2**-24, 1.0], dtype=dtype)
    ids, confidences = _fetched_together(tokens, confidence)
    assert ids == tokens.tolist() and all(type(token) is int for token in ids)
    assert confidences == confidence.tolist()


def test_policies_are_made_by_name() -> None:
    made = [type(make_policy(name, 0.5, 3)) for name in POLICY_NAMES]
    assert made == [MaxProbPolicy, EntropyPolicy, MarginPolicy, PatiencePolicy]
    assert make_policy("patience", 0.5, 3, patience=3).patience == 3


@pytest.mark.parametrize(("name", "meant"), [("maxprob", "max_prob"), ("entropie", "entropy"), ("patient", "patience")])
def test_an_unknown_policy_is_told_with_the_nearest_name(name, meant) -> None:
    with pytest.raises(UserError, match=f"{name}.*did you mean '{meant}'"):
        make_policy(name, 0.5, 3)
