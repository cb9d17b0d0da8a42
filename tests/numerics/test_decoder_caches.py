"""Caches of every decoder type: contiguous and ragged calls against rows on their own, and the encoder read once."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class Reads(TorchFunctionMode):
    """Counts operators that read a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.counts.update(id(argument) for argument in args[1:] if isinstance(argument, nn.Parameter))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 3, 12])
def test_cached_blocks_equal_uncached(case, split: int) -> None:
    hidden, memory = case.inputs(0)
    backbone, n = case.backbone, hidden.shape[1]
    whole = backbone.run_blocks(hidden, 0, 3, case.caches(1, memory), backbone.new_span(0, n, CPU))
    held = case.caches(1, memory)
    parts = [
        backbone.run_blocks(hidden[:, start:stop], 0, 3, held, backbone.new_span(start, stop - start, CPU))
        for start, stop in itertools.pairwise((0, split, n - 1, n))
        if stop > start
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **case.tolerance)


@torch.no_grad()
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 9), (5, 6), (5, 12)])
def test_last_only_equals_the_last_of_all_and_leaves_the_same_cache(case, start: int, stop: int) -> None:
    hidden, memory = case.inputs(0)
    backbone, block = case.backbone, case.backbone.block(1)
    outputs, held = [], []
    for last_only in (False, True):
        cache = backbone.new_layer_cache(1, 40, memory)
        if start:
            backbone.block_call(block, hidden[:, :start], cache, backbone.new_span(0, start, CPU))
        span = backbone.new_span(start, stop - start, CPU)
        outputs.append(backbone.block_call(block, hidden[:, start:stop], cache, span, last_only))
        held.append(cache)
    assert outputs[1].shape == (1, 1, 32)
    torch.testing.assert_close(outputs[1], outputs[0][:, -1:], **case.tolerance)
    assert torch.equal(held[0].keys[:, :, :stop], held[1].keys[:, :, :stop])
    assert torch.equal(held[0].values[:, :, :stop], held[1].values[:, :, :stop])


@torch.no_grad()
@pytest.mark.parametrize("last_only", [False, True])
def test_ragged_calls_equal_rows_on_their_own(case, last_only: bool) -> None:
    backbone = case.backbone
    inputs = [
        case.inputs(row, answer) for row, answer in enumerate([case.answer[:7], case.answer[3:6], case.answer[2:11]])
    ]
    n = [hidden.shape[1] for hidden, _ in inputs]
    alone = [
        backbone.run_blocks(hidden, 0, 3, case.caches(1, memory), backbone.new_span(0, hidden.shape[1], CPU))[0]
        for hidden, memory in inputs
    ]
    start = backbone.start(case.prompts, backbone.encode_prefix(case.pixels))
    first = list(start.lengths)
    held = case.caches(3, start.memory)
    for cache in held:  # what was never written may hold anything
        cache.keys.uniform_(-9, 9)
        cache.values.uniform_(-9, 9)
    # A first call of all rows, calls of some rows in any order, and the rest of every row.
    calls = [
        ([0, 1, 2], [0, 0, 0], first),
        ([2, 0], [first[2], first[0]], [first[2] + 5, first[0] + 2]),
        ([1], [first[1]], [first[1] + 1]),
        ([0, 1, 2], [first[0] + 2, first[1] + 1, first[2] + 5], n),
    ]
    for rows, starts, stops in calls:
        lengths = [stop - begin for begin, stop in zip(starts, stops, strict=True)]
        padded = torch.full((len(rows), max(lengths), 32), 3.0, dtype=torch.float64)
        for i, row in enumerate(rows):
            padded[i, -lengths[i] :] = inputs[row][0][0, starts[i] : stops[i]]
        out = backbone.run_blocks(padded, 0, 3, held, case.ragged(rows, starts, stops), last_only=last_only)
        assert out.isfinite().all()
        for i, row in enumerate(rows):
            wanted = alone[row][starts[i] : stops[i]]
            if last_only:
                torch.testing.assert_close(out[i], wanted[-1:], **case.tolerance)
            else:
                torch.testing.assert_close(out[i, -lengths[i] :], wanted, **case.tolerance)


@torch.no_grad()
def test_rows_that_start_together_start_as_on_their_own(case) -> None:
    backbone = case.backbone
    prefix = backbone.encode_prefix(case.pixels)
    together = backbone.start(case.prompts, prefix)
    for row, prompt in enumerate(case.prompts):
        alone = backbone.start([prompt], prefix[row : row + 1])
        assert together.lengths[row] == alone.lengths[0] == alone.hidden.shape[1]
        torch.testing.assert_close(together.hidden[row, : alone.lengths[0]], alone.hidden[0], **case.tolerance)
        assert (together.memory is not None) == case.is_t5
        if together.memory is not None:
            assert alone.memory.mask is None
            torch.testing.assert_close(
                together.memory.states[row, : len(prompt)], alone.memory.states[0], **case.tolerance
            )
            assert together.memory.mask[row].flatten().tolist() == [i < len(prompt) for i in range(14)]


@pytest.mark.parametrize("case", ["flan-t5"], indirect=True)
@torch.no_grad()
def test_cross_attention_reads_the_encoder_once_and_only_in_blocks_that_run(case) -> None:
    backbone = case.backbone
    start = backbone.start(case.prompts, backbone.encode_prefix(case.pixels))
    held = case.caches(3, start.memory)
    with Reads() as reads:
        for position in range(4):
            backbone.run_blocks(start.hidden, 0, 2, held, backbone.new_span(position, 1, CPU))
        backbone.run_blocks(start.hidden[:2], 0, 2, held, case.ragged([2, 0], [4, 4], [5, 5]))
    cross = [block.layer[1].EncDecAttention for block in backbone.model.language_model.decoder.block]
    assert [[reads.counts[id(part.weight)] for part in (layer.q, layer.k, layer.v)] for layer in cross] == [
        [5, 1, 1],
        [5, 1, 1],
        [0, 0, 0],
    ]
    assert held[2].cross is None
