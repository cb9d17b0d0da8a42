"""The cost model's arithmetic: what a token pays for, what waits, and what an exit distribution means."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from free_dist.config import ConfigError, MissingFileError, UserError
from free_dist.evaluation.cost_model import (
    DecodeCosts,
    ExitSetting,
    at_positions,
    draw_script,
    load_costs,
    predict,
    save_costs,
    token_costs,
    typical_script,
    visit_cost,
)

N_BLOCKS = 10
LAYERS = (2, 5)


def costs(block: Mapping[int, float], last_block: Mapping[int, float] | None = None) -> DecodeCosts:
    """Costs whose parts cannot be mistaken for each other."""
    return DecodeCosts(
        n_blocks=N_BLOCKS,
        block=block,
        last_block=block if last_block is None else last_block,
        head=1000.0,
        exit_heads={"full": 2000.0, "pruned": 200.0},
        gate=30.0,
        token=0.5,
        segment=0.25,
    )


FLAT = costs({1: 1.0})
"""A call costs the same at any number of positions: what counts is calls."""
PER_POSITION = costs({1: 1.0, 2: 2.0})
"""A call costs its positions."""


def totals(tokens: list[dict[str, float]]) -> list[float]:
    return [sum(parts.values()) for parts in tokens]


def test_a_curve_passes_through_what_was_measured_and_is_straight_in_between_and_beyond() -> None:
    curve = {1: 1.0, 4: 2.5, 8: 3.0}
    assert [at_positions(curve, n) for n in curve] == list(curve.values())
    assert at_positions(curve, 2) == pytest.approx(1.5)
    assert at_positions(curve, 6) == pytest.approx(2.75)
    assert at_positions(curve, 16) == pytest.approx(4.0)
    assert at_positions({1: 1.0}, 7) == 1.0


def test_full_depth_pays_every_block_and_the_head_once_per_token() -> None:
    tokens = token_costs(PER_POSITION, None, [N_BLOCKS] * 3, prompt=4)
    assert [parts["blocks"] for parts in tokens] == [4.0 * N_BLOCKS, N_BLOCKS, N_BLOCKS]
    assert all(parts["heads"] == 1000.0 and parts["checks"] == 0.0 for parts in tokens)


def test_a_token_pays_for_what_waits_before_the_deeper_segments_and_nobody_pays_twice() -> None:
    setting = ExitSetting(layers=LAYERS)
    tokens = token_costs(PER_POSITION, setting, [N_BLOCKS, 2, 2, 5, N_BLOCKS], prompt=1)
    # Blocks 3 to 5 run three positions at the fourth token; blocks 6 to 10 run four at the last.
    assert [parts["blocks"] for parts in tokens] == [10.0, 2.0, 2.0, 2.0 + 3 * 3, 2.0 + 3 + 5 * 4]
    assert sum(parts["blocks"] for parts in tokens) == 5 * N_BLOCKS  # caught up in full: nothing is saved, nothing lost
    calls = token_costs(FLAT, setting, [N_BLOCKS, 2, 2, 5, N_BLOCKS], prompt=1)
    assert [parts["blocks"] for parts in calls] == [10.0, 2.0, 2.0, 5.0, 10.0]


def test_the_prompt_waits_before_segments_that_no_token_needs() -> None:
    tokens = token_costs(PER_POSITION, ExitSetting(layers=LAYERS), [2, 2, 5], prompt=8)
    assert [parts["blocks"] for parts in tokens] == [2.0 * 8, 2.0, 2.0 + 3 * 10]


def test_a_check_costs_an_exit_transformer_and_its_head_at_every_exit_on_the_way() -> None:
    tokens = token_costs(FLAT, ExitSetting(layers=LAYERS, head="pruned"), [2, 5, N_BLOCKS], prompt=1)
    assert [parts["checks"] for parts in tokens] == [201.0, 402.0, 402.0]


def test_a_closed_gate_leaves_positions_to_the_exit_transformers_next_call() -> None:
    linear = costs({1: 0.0}, {1: 1.0, 2: 2.0})
    tokens = token_costs(linear, ExitSetting(layers=(2,), gate=True), [N_BLOCKS, N_BLOCKS, 2], prompt=1)
    assert [parts["checks"] for parts in tokens] == [30.0, 30.0, 30.0 + 3.0 + 2000.0]


def test_a_gate_that_always_opens_costs_itself_and_no_more() -> None:
    script = [N_BLOCKS, 2, 5, N_BLOCKS, 2]
    plain = token_costs(PER_POSITION, ExitSetting(layers=LAYERS), script, prompt=3)
    open_gate = token_costs(PER_POSITION, ExitSetting(layers=LAYERS, gate=True, false_open=1.0), script, prompt=3)
    visits = [2, 1, 2, 2, 1]
    for with_gate, without, asked in zip(totals(open_gate), totals(plain), visits, strict=True):
        assert with_gate == pytest.approx(without + 30.0 * asked)


def test_an_exit_that_is_no_block_costs_the_same_however_many_positions_it_was_not_asked_about() -> None:
    small = replace(costs({1: 0.0}, {1: 1.0, 2: 2.0}), exit_transformer=7.0)
    setting = ExitSetting(layers=(2,), gate=True)
    tokens = token_costs(small, setting, [N_BLOCKS, N_BLOCKS, 2], prompt=1)
    assert [parts["checks"] for parts in tokens] == [30.0, 30.0, 30.0 + 7.0 + 2000.0]
    with pytest.raises(ConfigError, match="exit_transformer="):
        replace(FLAT, exit_transformer=-1.0)


def test_exits_that_nobody_asks_cost_bookkeeping_alone() -> None:
    script = [N_BLOCKS] * 4
    cut = token_costs(PER_POSITION, ExitSetting(layers=LAYERS, checked=False), script, prompt=3)
    whole = token_costs(PER_POSITION, None, script, prompt=3)
    for a, b in zip(totals(cut), totals(whole), strict=True):
        assert a == pytest.approx(b + 2 * PER_POSITION.segment)


def test_a_script_meets_its_shares_as_well_as_whole_tokens_can() -> None:
    shares = {2: 0.5, 5: 0.3}
    assert Counter(draw_script(shares, 10, N_BLOCKS, random.Random(0))) == {2: 5, 5: 3, N_BLOCKS: 2}
    for tokens in range(1, 30):
        script = draw_script(shares, tokens, N_BLOCKS, random.Random(tokens))
        assert len(script) == tokens
        for layer, share in {**shares, N_BLOCKS: 0.2}.items():
            assert abs(script.count(layer) - share * tokens) < 1


@pytest.mark.parametrize("shares", [{2: 0.7, 5: 0.5}, {2: -0.1}, {2: float("nan")}])
def test_shares_that_are_none_are_refused(shares: dict[int, float]) -> None:
    with pytest.raises(UserError, match="exit shares"):
        draw_script(shares, 4, N_BLOCKS, random.Random(0))


def test_a_prediction_adds_up_and_agrees_with_a_walk_of_the_only_possible_script() -> None:
    setting = ExitSetting(layers=LAYERS)
    expected = predict(PER_POSITION, setting, {2: 1.0}, tokens=4, prompt=3, draws=3)
    walked = totals(token_costs(PER_POSITION, setting, [2] * 4, prompt=3))
    assert expected.seconds_per_token == pytest.approx(sum(walked) / 4)
    assert sum(expected.parts.values()) == pytest.approx(expected.seconds_per_token)
    full = totals(token_costs(PER_POSITION, None, [N_BLOCKS] * 4, prompt=3))
    assert expected.speedup == pytest.approx(sum(full) / sum(walked))


def test_decoding_alone_leaves_out_the_prompt() -> None:
    setting = ExitSetting(layers=LAYERS)
    short, long = (predict(PER_POSITION, setting, {2: 0.5}, tokens=6, prompt=n, full_first=True) for n in (1, 1000))
    assert short.speedup == pytest.approx(long.speedup)
    assert (
        predict(PER_POSITION, setting, {2: 0.5}, tokens=6, prompt=1000).seconds_per_token > 100 * long.parts["blocks"]
    )


def test_a_typical_script_has_the_shares_and_nearly_the_mean_time() -> None:
    setting = ExitSetting(layers=LAYERS)
    shares = {2: 0.8}
    script = typical_script(PER_POSITION, setting, shares, tokens=20, prompt=2, full_first=True)
    assert script[0] == N_BLOCKS and Counter(script[1:]) == {2: 16, N_BLOCKS: 4}
    time = sum(totals(token_costs(PER_POSITION, setting, script, prompt=2))[1:])
    expected = predict(PER_POSITION, setting, shares, tokens=20, prompt=2, full_first=True)
    assert time == pytest.approx(20 * expected.seconds_per_token, rel=0.01)


def test_a_fruitless_visit_is_counted_in_blocks() -> None:
    unit = costs({1: 10.0})
    assert visit_cost(unit, ExitSetting(layers=LAYERS)) == pytest.approx((10 + 2000) / 10)
    gated = ExitSetting(layers=LAYERS, head="pruned", gate=True, false_open=0.25)
    assert visit_cost(unit, gated) == pytest.approx((30 + 0.25 * (10 + 200)) / 10)
    assert visit_cost(replace(unit, exit_transformer=2.0), gated) == pytest.approx((30 + 0.25 * (2 + 200)) / 10)


def test_costs_survive_a_file(tmp_path: Path) -> None:
    for known in (PER_POSITION, replace(PER_POSITION, exit_transformer=0.125)):
        save_costs(known, tmp_path / "costs.json")
        assert load_costs(tmp_path / "costs.json") == known


def test_a_file_that_holds_no_costs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with pytest.raises(MissingFileError, match=r"costs\.json"):
        load_costs(path)
    for text in (
        "{",
        "[]",
        "{}",
        '{"format_version": 1}',
        '{"format_version": 1, "block": {"a": 1}, "last_block": {}}',
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=r"costs\.json"):
            load_costs(path)


def test_impossible_costs_are_refused() -> None:
    with pytest.raises(ConfigError, match="block has positions"):
        costs({2: 1.0})
    with pytest.raises(ConfigError, match="gate="):
        replace(FLAT, gate=-1.0)
    with pytest.raises(UserError, match="exit head 'other'"):
        predict(FLAT, ExitSetting(layers=LAYERS, head="other"), {2: 0.5}, tokens=2, prompt=1)
    with pytest.raises(UserError, match="exit layers"):
        predict(FLAT, ExitSetting(layers=(5, 2)), {2: 0.5}, tokens=2, prompt=1)


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/plan.py", "decode", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_predicts_from_a_file_what_the_model_does(tmp_path: Path) -> None:
    save_costs(PER_POSITION, tmp_path / "costs.json")
    flags = ("--costs", str(tmp_path / "costs.json"), "--tokens", "8", "--prompt", "3", "--exit-shares")
    finished = plan(*flags, "2:0.5,5:0.25")
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    expected = predict(PER_POSITION, ExitSetting(layers=LAYERS), {2: 0.5, 5: 0.25}, tokens=8, prompt=3)
    assert found["speedup"] == pytest.approx(expected.speedup)
    for shares, complaint in (("2", "LAYER:SHARE"), ("2:0.9,5:0.9", "sum of at most 1"), ("77:0.5", "exit layers")):
        refused = plan(*flags, shares)
        assert refused.returncode == 2 and complaint in refused.stderr and "Traceback" not in refused.stderr
