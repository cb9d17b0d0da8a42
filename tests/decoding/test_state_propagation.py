"""State propagation: exact where nothing exits, otherwise what copying the exited state into every deeper block at once gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from free_dist.config import UserError
from free_dist.decoding import generate
from free_dist.exits import ExitBank
from tests.numerics.conftest import DecoderCase, new_case

LAYERS = (1, 2)
N_TOKENS = 12
NEVER = 1.0


@pytest.fixture(scope="module", params=["opt", "llama-grouped", "flan-t5"])
def case(request: pytest.FixtureRequest) -> DecoderCase:
    """Three prompts of mixed lengths on a model in float64, where a wrong cache cannot pass for rounding."""
    return new_case(request.param)


@pytest.fixture(scope="module")
def bank(case: DecoderCase) -> ExitBank:
    return ExitBank(case.backbone, LAYERS, variant="lens").eval()


def emit_at(*positions: tuple[int, ...]) -> list[list[float]]:
    """Thresholds by which each exit emits at these answer positions and nowhere else."""
    return [[0.0 if position in chosen else NEVER for position in range(N_TOKENS)] for chosen in positions]


def decode(case: DecoderCase, bank: ExitBank, thresholds, row: int | None = None, **settings):
    rows = slice(None) if row is None else slice(row, row + 1)
    return generate(
        case.backbone, bank, case.pixels[rows], case.prompts[rows], thresholds=thresholds, max_new_tokens=N_TOKENS,
        eos_token_id=-1, **settings,
    )  # fmt: skip


@torch.no_grad()
def copied_at_once(case: DecoderCase, row: int, exits_at: dict[int, int]) -> list[int]:
    """Tokens where token ``n`` leaves after block ``exits_at[n]``, its state being handed to every deeper block straight away."""
    backbone = case.backbone
    start = backbone.start([case.prompts[row]], backbone.encode_prefix(case.pixels[row : row + 1]))
    held, hidden, length = case.caches(1, start.memory), start.hidden, 0
    tokens: list[int] = []
    while len(tokens) < N_TOKENS:
        span = backbone.new_span(length, hidden.shape[1], hidden.device)
        leaves = exits_at.get(len(tokens), backbone.n_blocks)
        said: Tensor | None = None
        for k in range(1, backbone.n_blocks + 1):
            after = backbone.run_blocks(
                hidden, k - 1, k, held, span
            )  # writes keys and values of what the block is given
            if k <= leaves or length == 0:  # a prompt is never cut short
                hidden = after
            if k == leaves:
                said = backbone.lm_head(backbone.final_norm(hidden))[0, -1]
        assert said is not None
        tokens.append(int(said.argmax()))
        length = span.positions(hidden.device)[-1].item() + 1
        hidden = backbone.embed(torch.tensor([tokens[-1:]]), None, length)
    return tokens


SCRIPTS = [
    ((1, 2, 3, 7), (5, 8, 9)),
    ((0, 1, 4, 6, 7, 8), (2, 5, 10)),
    ((0,), (1, 2, 3, 4, 6, 7, 9)),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_tokens_are_those_of_copying_at_once(case: DecoderCase, bank: ExitBank, script) -> None:
    exits_at = {n: layer for layer, chosen in zip(LAYERS, script, strict=True) for n in chosen}
    for row in range(len(case.prompts)):
        (found,) = decode(case, bank, emit_at(*script), row, state_propagation=True)
        assert found.exit_layers == [exits_at.get(n) for n in range(N_TOKENS)]
        assert found.tokens == copied_at_once(case, row, exits_at)


def test_it_is_exact_where_nothing_exits_and_another_thing_where_something_does(
    case: DecoderCase, bank: ExitBank
) -> None:
    exact = decode(case, bank, emit_at((), ()))
    found = decode(case, bank, emit_at((), ()), state_propagation=True)
    assert [row.tokens for row in found] == [row.tokens for row in exact]
    assert [row.tokens for row in exact] == [case.greedy(row, N_TOKENS) for row in range(len(case.prompts))]
    # Exits on the way there are asked, and never emit.
    asked = decode(case, bank, [0.999999, 0.999999], state_propagation=True)
    assert [row.exit_calls for row in asked] == [2 * N_TOKENS] * len(case.prompts)
    outputs = [
        [row.tokens for row in decode(case, bank, emit_at(*script), state_propagation=propagated)]
        for script in SCRIPTS
        for propagated in (False, True)
    ]
    assert any(exact != copied for exact, copied in zip(outputs[::2], outputs[1::2], strict=True))


def test_rows_of_a_batch_are_what_they_are_alone(case: DecoderCase, bank: ExitBank) -> None:
    for script in SCRIPTS:
        together = decode(case, bank, emit_at(*script), state_propagation=True)
        alone = [decode(case, bank, emit_at(*script), row, state_propagation=True)[0] for row in range(len(together))]
        assert [row.tokens for row in together] == [row.tokens for row in alone]
        assert [row.blocks_executed for row in together] == [row.blocks_executed for row in alone]


def test_blocks_are_counted_as_they_run_and_copies_are_no_positions(
    case: DecoderCase, bank: ExitBank, weight_watch
) -> None:
    script = SCRIPTS[0]
    with weight_watch:
        (found,) = copied = decode(case, bank, emit_at(*script), 0, state_propagation=True)
    counted = sum(found.blocks_executed)
    watched = 0
    for k in range(1, case.backbone.n_blocks + 1):
        # A map of the feed-forward half, which every run of a block reads once.
        names = {"fc2", "down_proj", "wo"}
        block = case.backbone.block(k)
        maps = [m.weight for name, m in block.named_modules() if name.split(".")[-1] in names]
        watched += weight_watch.reads[id(maps[-1])]
    assert counted == watched == copied.calls.block_calls
    exact = decode(case, bank, emit_at(*script), 0)
    n_blocks = case.backbone.n_blocks
    skipped = sum(n_blocks - layer for layer in found.exit_layers if layer is not None)
    # Of the exact run, what was pending at the end was not caught up; the copies of the others are what is missing.
    left = exact[0].records[-1]
    assert left.exit_layer is None, "the last token goes deep, so everything before it has caught up"
    total = sum(record.block_positions for record in exact[0].records)
    assert sum(record.block_positions for record in found.records) == total - skipped


def test_modes_that_need_exact_caches_are_refused(case: DecoderCase, bank: ExitBank) -> None:
    for more in ({"lossless": True}, {"num_beams": 2}):
        with pytest.raises(UserError, match="state_propagation=True does not go with"):
            decode(case, bank, [0.5, 0.5], state_propagation=True, **more)
