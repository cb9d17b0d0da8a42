"""Pending hidden states and per-segment caches: what makes a skipped block exact instead of faked (batch 1).

K active exits cut the stack of L blocks into K + 1 segments.  A token emitted at an exit leaves its hidden state *pending*
before the next segment; when a later token goes deeper, all pending states run that segment together with it, in one call.
Every key and value is therefore the one a full forward would have written.  The prompt is the first, longest pending entry:
deeper segments see it only when some token first needs them.

Does not know tokens, policies, heads or images.

Shape letters: T positions, D model width, K active exits, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from free_dist.backbones import Backbone, LayerCache
from free_dist.exits import ExitTransformer


@dataclass(kw_only=True, slots=True)
class Counts:
    """Work done so far, counted by the lines that do it."""

    block_calls: int = 0
    """Backbone blocks run, one per block and call: how often a block's weights were read."""
    block_positions: int = 0
    """Backbone blocks run times the positions they ran on: the arithmetic, prompt included."""
    exit_calls: int = 0
    """Exit transformers run, one per call, whatever the number of positions."""
    head_calls: int = 0
    """Vocabulary heads run, at exits and at full depth."""


class PendingCache:
    """Block caches, exit caches and pending hidden states of one sequence."""

    def __init__(self, backbone: Backbone, exits: Sequence[tuple[int, ExitTransformer]], capacity: int) -> None:
        """``exits`` are the active ones, (layer, transformer) from shallow to deep; ``capacity`` is in positions."""
        self._backbone = backbone
        self._exits = tuple(exits)
        self._capacity = capacity
        layers = [layer for layer, _ in self._exits]
        self.segments = tuple(pairwise((0, *layers, backbone.n_blocks)))
        """K + 1 pairs (start, stop): a segment turns ``h_start`` into ``h_stop``."""
        self.block_caches: list[LayerCache] = []
        """Caches of the blocks reached so far; block ``k`` owns entry ``k - 1``."""
        self.exit_caches: list[LayerCache] = []
        """Caches of the active exit transformers reached so far."""
        self.counts = Counts()
        self._pending: list[list[Tensor]] = [[] for _ in self.segments]

    def advance(self, segment: int, hidden: Tensor) -> Tensor:
        """New ``h_start`` [1, T, D] -> ``h_stop`` [1, pending + T, D], in one call with everything pending there."""
        start, stop = self.segments[segment]
        if self._pending[segment]:
            hidden = torch.cat((*self._pending[segment], hidden), dim=1)
            self._pending[segment] = []
        # Blocks that no token needs never get a cache.
        while len(self.block_caches) < stop:
            self.block_caches.append(self._backbone.new_layer_cache(1, self._capacity))
        hidden = self._backbone.run_blocks(hidden, start, stop, self.block_caches)
        self.counts.block_calls += stop - start
        self.counts.block_positions += (stop - start) * hidden.shape[1]
        return hidden

    def run_exit(self, exit_index: int, hidden: Tensor) -> Tensor:
        """All of what :meth:`advance` returned at an active exit -> exit state of its last position, [1, D], un-normed.

        Positions that were pending pass the exit transformer too, so its cache has no holes.
        """
        if exit_index == len(self.exit_caches):
            self.exit_caches.append(self._backbone.new_layer_cache(1, self._capacity))
        state = self._exits[exit_index][1](hidden, self.exit_caches[exit_index])
        self.counts.exit_calls += 1
        return state[:, -1]

    def hold(self, segment: int, hidden: Tensor) -> None:
        """Leave ``h_start`` of a segment pending, [1, T, D]: its tokens were emitted before it."""
        self._pending[segment].append(hidden)

    def pending(self, segment: int) -> int:
        """Positions waiting before a segment."""
        return sum(hidden.shape[1] for hidden in self._pending[segment])

    def flush(self) -> None:
        """Run everything pending to full depth, through the exits on its way; afterwards all caches are complete."""
        for segment in range(1, len(self.segments)):
            if not self._pending[segment]:
                continue
            waiting = torch.cat(self._pending[segment], dim=1)
            self._pending[segment] = []
            hidden = self.advance(segment, waiting)
            if segment < len(self._exits):
                self.run_exit(segment, hidden)
                self.hold(segment + 1, hidden)
