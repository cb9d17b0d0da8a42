"""Measures what the cost model needs, on a real backbone: blocks at several positions, small exits, heads, gates, bookkeeping.

Every call of :meth:`CostMeter.sample` times each piece once, so that samples can be taken between the runs that the model is
compared with and drift hits both alike; medians are what counts.  Blocks take turns, so that no measurement finds its weights in
a processor cache.  Does not know exit distributions or predictions.

Shape letters: T positions, D model width, L blocks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from free_dist.backbones import Backbone, Start
from free_dist.decoding.cache import PendingCache
from free_dist.decoding.policy import MaxProbPolicy
from free_dist.evaluation.benchmark import wait_for_device
from free_dist.evaluation.cost_model import DecodeCosts
from free_dist.exits import ExitBank, ExitTransformer
from free_dist.exits.gate import ExitChecks
from free_dist.exits.variants import BlockExit

POSITIONS = (1, 2, 4, 8)
REPEATS = 3
"""Times that the small pieces are run per sample."""


class CostMeter:
    """Collects timings of the pieces of decoding, in seconds."""

    def __init__(
        self,
        backbone: Backbone,
        bank: ExitBank,
        checks: Mapping[str, ExitChecks],
        *,
        gated: ExitChecks | None = None,
        positions: Sequence[int] = POSITIONS,
        past: int = 16,
        blocks_per_sample: int = 4,
    ) -> None:
        """``checks``: name of an exit head -> checks that use it.  ``gated``: checks with gates, whose gate is timed.

        ``bank``: exits as they decode, merged.  ``positions``: new positions to time blocks at, 1 among them; ``past``:
        positions cached before.
        """
        self._backbone = backbone
        self._checks = dict(checks)
        self._gated = gated
        self._positions = sorted({1, *positions})
        self._past = past
        self._blocks_per_sample = min(blocks_per_sample, backbone.n_blocks)
        self._next_block = 0
        self._times: dict[tuple[str, object], list[float]] = defaultdict(list)
        weight = next(bank.transformers.parameters())
        self._device = weight.device
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, self._positions[-1], backbone.hidden_size, generator=generator)
        self._hidden = hidden.to(weight)
        capacity = past + self._positions[-1]
        self._caches = [backbone.new_layer_cache(1, capacity) for _ in range(backbone.n_blocks)]
        exit_transformer = bank.transformers[0]
        assert isinstance(exit_transformer, ExitTransformer)
        # One that is a block costs what blocks do at as many positions.
        self._small_exit = None if isinstance(exit_transformer, BlockExit) else exit_transformer
        self._policy = MaxProbPolicy(2.0, len(bank.exit_layers))
        self._token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        # A stack whose first segment has no blocks: what it costs to run is bookkeeping.
        self._empty = PendingCache(
            backbone,
            [(0, exit_transformer)],
            Start(self._hidden[:, :1], [1], None),
            past,
        )

    @torch.inference_mode()
    def sample(self) -> None:
        """Time every piece once."""
        for n in self._positions:
            self._time_blocks(n)
        self._note(("head", ""), self._full_depth_head, 1)
        for name, checks in self._checks.items():
            self._note(("exit_head", name), partial(self._exit_head, checks), 1)
        gated = self._gated
        if gated is not None:
            self._note(("gate", ""), lambda: _answered(gated.may_exit(0, self._hidden[:, -1])), REPEATS)
        small_exit = self._small_exit
        if small_exit is not None:
            self._note(("exit_transformer", ""), lambda: small_exit(self._hidden, last_only=True), REPEATS)
        self._note(("token", ""), self._enter, REPEATS)
        self._note(("segment", ""), lambda: self._empty.advance(0, [0]), 1)
        self._empty.roll_back(0, 1)

    def forget(self) -> None:
        """Drop what was sampled so far, such as a warm-up."""
        self._times.clear()

    def costs(self, origin: str = "") -> DecodeCosts:
        """Medians of what was sampled; raises ValueError before the first sample."""
        if not self._times:
            raise ValueError("nothing was measured: call sample first")
        found = {key: median(times) for key, times in self._times.items()}
        blocks = {n: found["block", n] for n in self._positions}
        return DecodeCosts(
            n_blocks=self._backbone.n_blocks,
            block=blocks,
            last_block={n: found["last_block", n] if n > 1 else blocks[1] for n in self._positions},
            head=found["head", ""],
            exit_heads={name: found["exit_head", name] for name in self._checks},
            gate=found.get(("gate", ""), 0.0),
            token=found["token", ""],
            segment=found["segment", ""],
            exit_transformer=found.get(("exit_transformer", "")),
            origin=origin,
        )

    def _time_blocks(self, n: int) -> None:
        backbone, count = self._backbone, self._blocks_per_sample
        hidden = self._hidden[:, :n]
        span = backbone.new_span(self._past, n, self._device)
        start = self._turn(count)
        self._note(
            ("block", n), lambda: backbone.run_blocks(hidden, start, start + count, self._caches, span), 1, count
        )
        if n == 1:
            return
        start = self._turn(count)
        call = backbone.block_call

        def last_outputs() -> None:
            for k in range(start, start + count):
                call(backbone.block(k + 1), hidden, self._caches[k], span, last_only=True)

        self._note(("last_block", n), last_outputs, 1, count)

    def _turn(self, count: int) -> int:
        """The next ``count`` blocks' first."""
        start = self._next_block if self._next_block + count <= self._backbone.n_blocks else 0
        self._next_block = start + count
        return start

    def _full_depth_head(self) -> list[int]:
        features = self._backbone.final_norm(self._hidden[:, -1])
        return torch.argmax(self._backbone.lm_head(features), dim=-1).tolist()

    def _exit_head(self, checks: ExitChecks) -> list[int]:
        features = self._backbone.final_norm(self._hidden[:, -1])
        return self._policy.decide(0, checks.scores(0, features), [0], [[]]).tokens.tolist()

    def _enter(self) -> None:
        hidden = self._backbone.embed(self._token, None, self._past)
        if self._empty.length(0) > 1:
            self._empty.roll_back(0, 1)
        self._empty.append([0], hidden)

    def _note(self, key: tuple[str, object], run: Callable[[], object], repeats: int, share: int = 1) -> None:
        for _ in range(repeats):
            wait_for_device(self._device)
            start = time.perf_counter()
            run()
            wait_for_device(self._device)
            self._times[key].append((time.perf_counter() - start) / share)


def _answered(likely: Tensor | None) -> list[bool]:
    assert likely is not None
    return likely.tolist()
