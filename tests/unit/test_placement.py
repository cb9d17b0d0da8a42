"""The search for exits against brute force: every set, every choice of thresholds, walked token by token by the cost model."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from free_dist.config import UserError
from free_dist.evaluation.arms import Split
from free_dist.evaluation.calibration import OFF
from free_dist.evaluation.cost_model import DecodeCosts, ExitSetting, token_costs
from free_dist.evaluation.placement_run import shared_thresholds
from free_dist.evaluation.recording import RecordedAnswers, Timed, anchored_costs, placement_costs
from free_dist.exits.placement import (
    Choice,
    Placement,
    PlacementCosts,
    Recording,
    best_set,
    fastest,
    full_seconds,
    on_set,
    search,
)

LEVELS = (0.2, 0.5, 0.8)


def decode_costs(seed: int = 0, *, small_exits: bool = False) -> DecodeCosts:
    """Curves with a price per call and per position, and parts that differ from each other."""
    draw = random.Random(seed)
    call, position = draw.uniform(0.5, 2.0), draw.uniform(0.1, 1.0)
    block = {n: call + position * n for n in (1, 2, 4, 8)}
    block[8] += draw.uniform(0.0, 3.0)  # not one straight line
    return DecodeCosts(
        n_blocks=6,
        block=block,
        last_block={n: seconds * (1.0 if n == 1 else 0.8) for n, seconds in block.items()},
        head=draw.uniform(0.5, 3.0),
        exit_heads={"full": draw.uniform(0.2, 2.0)},
        gate=0.0,
        token=0.3,
        segment=0.2,
        exit_transformer=0.4 if small_exits else None,
    )


def random_recording(seed: int, *, n_answers: int = 4, longest: int = 4) -> Recording:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, n_answers)
    prompts = generator.integers(1, 7, n_answers)
    answers = np.repeat(np.arange(n_answers), lengths)
    places = np.concatenate([np.arange(n) for n in lengths])
    blocks = (1, 2, 4, 5)
    # Deeper exits are surer and more often right, with much noise.
    depth = np.asarray(blocks)[:, None] / 6
    confidences = np.clip(generator.normal(depth, 0.3, (4, len(answers))), 0.0, 1.0)
    harm = (generator.random((4, len(answers))) > 0.4 + depth / 2).astype(float)
    return Recording(
        n_blocks=6, blocks=blocks, answers=answers, reach=prompts[answers] + places, confidences=confidences, harm=harm
    )


def walked(
    recording: Recording, costs: DecodeCosts, layers: tuple[int, ...], thresholds: tuple[float, ...], answer: float
):
    """(seconds, harm), token by token: what the decoder's cost model says of these exits."""
    script, harm = [], 0.0
    for t in range(len(recording.answers)):
        for layer, threshold in zip(layers, thresholds, strict=True):
            c = recording.blocks.index(layer)
            if recording.confidences[c, t] > threshold:
                script.append(layer)
                harm += recording.harm[c, t]
                break
        else:
            script.append(recording.n_blocks)
    setting = ExitSetting(layers=layers) if layers else None
    seconds = 0.0
    for number in np.unique(recording.answers):
        rows = np.flatnonzero(recording.answers == number)
        own = token_costs(costs, setting, [script[t] for t in rows], prompt=int(recording.reach[rows[0]]))
        seconds += answer + sum(sum(parts.values()) for parts in own)
    return seconds, harm


def tables_for(recording: Recording, costs: DecodeCosts, bounds: list[float], max_exits: int):
    plain = placement_costs(costs, positions=int(recording.reach.max()), answer=0.7)
    return search(recording, plain, LEVELS, max_exits=max_exits, max_harm=bounds)


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_what_brute_force_finds_for_every_set_and_bound(seed: int) -> None:
    recording, costs = random_recording(seed), decode_costs(seed, small_exits=seed % 2 == 1)
    bounds = [0.0, 1.0, 2.0, 4.0]
    table = tables_for(recording, costs, bounds, 3)
    best: dict[tuple[int, ...], list[float]] = {}
    for size in range(4):
        for layers in itertools.combinations(recording.blocks, size):
            found = [walked(recording, costs, layers, t, 0.7) for t in itertools.product(LEVELS, repeat=size)]
            best[layers] = [min((s for s, h in found if h <= bound), default=np.inf) for bound in bounds]
    for layers in best:
        parts = [p for n in range(len(layers) + 1) for p in itertools.combinations(layers, n)]
        for h in range(len(bounds)):
            placement = fastest(table, layers, h)
            assert placement.seconds == pytest.approx(min(best[part][h] for part in parts))
            again = walked(recording, costs, placement.layers, placement.thresholds, 0.7)
            assert (placement.seconds, placement.harm) == (pytest.approx(again[0]), pytest.approx(again[1]))
            assert placement.harm <= bounds[h]


@pytest.mark.parametrize("seed", range(4))
def test_the_best_set_for_several_tasks_is_brute_forces(seed: int) -> None:
    recordings = [random_recording(10 * seed + i) for i in range(2)]
    costs = decode_costs(seed)
    tables = [tables_for(recording, costs, [1.0], 3) for recording in recordings]
    choice = best_set(tables, bound=0, max_exits=2)
    shares = {}
    for layers in itertools.combinations(recordings[0].blocks, 2):
        shares[layers] = on_set(tables, layers, bound=0).relative_seconds
    assert choice.relative_seconds == pytest.approx(min(shares.values()))
    assert len(choice.layers) <= 2
    by_hand = [
        fastest(table, choice.layers, 0).seconds / full_seconds(table) for table in tables
    ]  # the mean, every task with thresholds of its own
    assert choice.relative_seconds == pytest.approx(np.mean(by_hand))


def test_budgets_are_kept_and_more_budget_is_never_slower() -> None:
    recording, costs = random_recording(3, n_answers=12), decode_costs(3)
    bounds = [0.0, 1.0, 3.0, 9.0]
    table = tables_for(recording, costs, bounds, 3)
    parameters = {1: 10, 2: 20, 4: 40, 5: 50}
    for h, bound in enumerate(bounds):
        seconds = []
        for n_exits in (1, 2, 3):
            choice = best_set([table], bound=h, max_exits=n_exits)
            assert len(choice.layers) <= n_exits
            assert choice.placements[0].harm <= bound
            seconds.append(choice.relative_seconds)
        assert seconds == sorted(seconds, reverse=True)
        small = best_set([table], bound=h, max_exits=3, max_parameters=45, parameters=parameters)
        assert sum(parameters[layer] for layer in small.layers) <= 45
        assert small.relative_seconds >= seconds[-1]
    by_bound = [fastest(table, recording.blocks, h).seconds for h in range(len(bounds))]
    assert by_bound == sorted(by_bound, reverse=True)
    assert by_bound[-1] < by_bound[0] <= full_seconds(table)


def test_no_exit_is_chosen_where_checks_cost_more_than_blocks() -> None:
    recording = random_recording(5)
    costs = decode_costs(5)
    dear = placement_costs(costs, positions=20, answer=0.0)
    dear = PlacementCosts(**{**vars(dear), "exit_head": 100.0})
    table = search(recording, dear, LEVELS, max_exits=2, max_harm=[99.0])
    choice = best_set([table], bound=0, max_exits=2)
    assert choice.layers == () and choice.relative_seconds == 1.0


def test_anchored_costs_give_full_depth_the_time_it_took() -> None:
    recording, costs = random_recording(6, n_answers=5), decode_costs(6)
    tokens = len(recording.answers)
    answers = RecordedAnswers(
        task="vqa",
        exit_layers=recording.blocks,
        n_blocks=6,
        answers=recording.answers,
        places=np.concatenate([np.arange(n) for n in np.bincount(recording.answers)]),
        prompts=recording.reach[np.flatnonzero(np.diff(recording.answers, prepend=-1))],
        tokens=np.zeros(tokens, dtype=int),
        labels=np.zeros(tokens, dtype=int),
        confidences=recording.confidences,
        named=np.zeros((4, tokens), dtype=int),
    )
    # What the pieces say, 1.5 times as slow, with 0.3 more per check and 2 seconds to start an answer.
    timed = []
    setting = ExitSetting(layers=(4,))
    for number in range(5):
        script = [6] * int((recording.answers == number).sum())
        prompt = int(answers.prompts[number])
        plain, checked = (
            [1.5 * sum(parts.values()) for parts in token_costs(costs, exits, script, prompt=prompt)]
            for exits in (None, setting)
        )
        split = Split(vision=3.0 + number, prefill=2.0 + plain[0], decode=sum(plain[1:]))
        timed.append(Timed(split, 2.0 + sum(checked) + 0.3 * len(script)))
    anchored = anchored_costs(costs, {"vqa": answers}, {"vqa": timed}, exit_layer=4)["vqa"]
    table = search(answers.recording(), anchored, LEVELS, max_exits=1, max_harm=[0.0])
    assert full_seconds(table) == pytest.approx(sum(sum(one.split) for one in timed))
    assert anchored.exit_head == pytest.approx(1.5 * costs.exit_heads["full"] + 0.3)
    assert anchored.answer == pytest.approx(5.0 + 2.0)
    assert anchored.block[4] == pytest.approx(1.5 * costs.block[4])


def test_a_restricted_search_is_the_search_on_these_blocks_alone() -> None:
    recording, costs = random_recording(8), decode_costs(8)
    whole = tables_for(recording, costs, [1.0], 3)
    part = tables_for(recording.only((2, 5)), costs, [1.0], 2)
    assert fastest(part, (2, 5), 0).seconds == pytest.approx(fastest(whole, (2, 5), 0).seconds)
    with pytest.raises(UserError, match=r"nothing was recorded after blocks \[3\]"):
        recording.only((2, 3))


def test_a_search_without_thresholds_or_with_too_short_costs_is_refused() -> None:
    recording, costs = random_recording(1), decode_costs(1)
    plain = placement_costs(costs, positions=2, answer=0.0)
    with pytest.raises(ValueError, match="positions go up to"):
        search(recording, plain, LEVELS, max_exits=1, max_harm=[0.0])
    with pytest.raises(UserError, match="levels="):
        search(recording, placement_costs(costs, positions=20, answer=0.0), (), max_exits=1, max_harm=[0.0])


def test_a_recording_that_does_not_fit_together_is_refused() -> None:
    recording = random_recording(1)
    with pytest.raises(ValueError, match="increasing numbers from 1 to 5"):
        Recording(**{**vars(recording), "blocks": (1, 2, 4, 6)})
    with pytest.raises(ValueError, match="must not be negative"):
        Recording(**{**vars(recording), "harm": -recording.harm - 1})
    with pytest.raises(ValueError, match="want confidences"):
        Recording(**{**vars(recording), "confidences": recording.confidences[:2]})


def test_placements_name_a_threshold_per_layer() -> None:
    table = tables_for(random_recording(2), decode_costs(2), [4.0], 3)
    for layers, placements in table.items():
        for placement in placements:
            assert placement is None or isinstance(placement, Placement)
            assert placement is None or (placement.layers == layers and len(placement.thresholds) == len(layers))


def test_thresholds_shared_by_tasks_are_the_safest_and_off_where_any_task_has_the_exit_off() -> None:
    placements = (
        Placement(layers=(1, 4), thresholds=(0.5, 0.8), seconds=1.0, harm=0.0),
        Placement(layers=(4,), thresholds=(0.2,), seconds=1.0, harm=0.0),
    )
    assert shared_thresholds(Choice((1, 4), placements, (0.5, 0.5))) == (OFF, 0.8)
    assert shared_thresholds(Choice((1, 4), placements[:1], (0.5,))) == (0.5, 0.8)
