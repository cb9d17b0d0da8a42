"""Which blocks get an exit, and with which thresholds: an exact search on recordings, under a budget.

A recording holds what an exit after every candidate block said about every token of the full model's own answers: its
confidence, and the harm done if the token left there.  Costs come as plain numbers.  Does not know models, tensors, tasks, how a
recording is made or how costs are measured.

**The objective.**  For a set of exits, each with a threshold, a token leaves at the first of them whose confidence exceeds its
threshold, or at full depth.  Time is that of the cost model (:mod:`free_dist.evaluation.cost_model`), which walks every answer as
the decoder does: a segment of blocks is called for the tokens that are still in the stack, and each call also runs the positions
that left before and wait there, the prompt among them.  Harm is summed over the tokens that left.  Wanted is, for every set and
every bound on harm, the least time.

**The dynamic programme.**  Exits are placed from shallow to deep.  The state is the last exit placed together with the tokens
still in the stack; a transition places the next exit at a threshold, and the tokens that leave with it are what it changes.
It is exact because everything still to be paid is a function of that state: a segment's calls are the tokens in the stack, and
the positions that wait in each call are those since the token before it *in the stack* of the same answer.  Neither the
thresholds so far nor where the others left matter, so of two ways into one state, the one with more time and no less harm
cannot be part of any optimum.  (The last exit alone is no such state: other tokens may be left behind it.)  A state is also
dropped when its harm exceeds every bound, or when its time, with the least that its tokens can still cost, is not below what
its own exits already reach at its harm: more exits behind it then gain nothing over those exits without them.  So the tables hold
the exact least time of a set *or its subsets*: an exit that is not worth asking is switched off by its threshold, as in the
decoder.

Shape letters: C candidate blocks, T tokens, G thresholds, S states, H bounds on harm, L blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from free_dist.config import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

ELEMENTS = 4_000_000
"""Entries of the largest table of states by tokens that is held at once."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What every candidate exit says about the T tokens of the full model's answers."""

    n_blocks: int
    """L."""
    blocks: tuple[int, ...]
    """Candidate exit layers, increasing, each in 1..L-1."""
    answers: Integers
    """[T], the answer that a token belongs to; tokens of an answer stand together and in order."""
    reach: Integers
    """[T], positions that must have been read for the token: the prompt, and the tokens of the answer before it."""
    confidences: Floats
    """[C, T]."""
    harm: Floats
    """[C, T], what is lost if the token leaves there; 0 or more."""

    def __post_init__(self) -> None:
        shape = (len(self.blocks), len(self.answers))
        if list(self.blocks) != sorted(set(self.blocks)) or not 1 <= self.blocks[0] <= self.blocks[-1] < self.n_blocks:
            raise ValueError(f"blocks {self.blocks}: want increasing numbers from 1 to {self.n_blocks - 1}")
        if self.confidences.shape != shape or self.harm.shape != shape or self.reach.shape != shape[1:]:
            raise ValueError(f"want confidences and harm {shape} and reach {shape[1:]}")
        if np.any(np.diff(self.answers) < 0) or not np.all(self.harm >= 0):
            raise ValueError("answers must not decrease, and harm must not be negative")

    def only(self, blocks: Sequence[int]) -> Recording:
        """The same with some of the candidates; raises UserError for a block that is none."""
        missing = sorted(set(blocks) - set(self.blocks))
        if missing:
            raise UserError(f"nothing was recorded after blocks {missing}; candidates are {list(self.blocks)}")
        rows = [self.blocks.index(block) for block in sorted(blocks)]
        return replace(
            self, blocks=tuple(sorted(blocks)), confidences=self.confidences[rows], harm=self.harm[rows]
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlacementCosts:
    """Seconds of decoding one sequence; tables are indexed by the new positions in a call, up to the longest sequence."""

    block: Floats
    """[N + 1], one block."""
    last_block: Floats
    """[N + 1], a block that computes the last output alone."""
    exit_transformer: Floats
    """[N + 1], an exit transformer that so many positions reached since it was last asked."""
    exit_head: float
    """Norm, head and decision of an exit."""
    head: float
    """The same at full depth."""
    token: float
    """Bookkeeping of a token."""
    segment: float
    """Bookkeeping of a call of a segment or of an exit transformer."""
    answer: float = 0.0
    """Once per answer: the vision tower, and what else exits do not touch."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Exits with their thresholds, and what is expected of them on the recording."""

    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    """One per layer; a token leaves where its confidence exceeds it."""
    seconds: float
    """Of the whole recording."""
    harm: float


Table = Mapping[tuple[int, ...], tuple[Placement | None, ...]]
"""Exits, all of which are asked -> per bound on harm the fastest placement; None where the set cannot beat its subsets."""


class _States(NamedTuple):
    """S states that have the same exits behind them."""

    alive: Flags
    """[S, T], tokens still in the stack."""
    seconds: Floats
    """[S], paid so far."""
    harm: Floats
    """[S]."""
    choices: Integers
    """[S, exits], indices of thresholds."""

    def take(self, rows: Integers) -> _States:
        return _States(self.alive[rows], self.seconds[rows], self.harm[rows], self.choices[rows])


class _Due(NamedTuple):
    """What states will pay per block or call, each [S]: functions of the tokens in the stack alone."""

    calls: Floats
    block: Floats
    last_block: Floats
    exit_transformer: Floats

    def take(self, rows: Integers) -> _Due:
        return _Due(self.calls[rows], self.block[rows], self.last_block[rows], self.exit_transformer[rows])


class _Search:
    def __init__(
        self, recording: Recording, costs: PlacementCosts, levels: Sequence[float], max_harm: Sequence[float]
    ) -> None:
        self.recording, self.costs = recording, costs
        self.levels = sorted(levels, reverse=True)
        self.bounds = np.sort(np.asarray(max_harm, dtype=np.float64))
        opens = np.append(True, np.diff(recording.answers) > 0)
        # One number line for all answers: a token's place on it, and where its answer begins.
        ends = np.append(0, np.cumsum(recording.reach[np.append(opens[1:], True)]))
        begins = ends[np.cumsum(opens) - 1]
        self.places, self.begins = (begins + recording.reach).astype(np.int64), begins.astype(np.int64)
        self.n_answers = int(opens.sum())
        self.best: dict[tuple[int, ...], list[Placement | None]] = {}

    def due(self, alive: Flags) -> _Due:
        step = max(1, ELEMENTS // alive.shape[1])
        parts = [self._due(alive[first : first + step]) for first in range(0, len(alive), step)]
        return _Due(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def _due(self, alive: Flags) -> _Due:
        costs = self.costs
        placed = np.where(alive, self.places, 0)
        before = np.maximum.accumulate(placed, axis=1)
        before = np.pad(before[:, :-1], ((0, 0), (1, 0)))
        waiting = np.where(alive, self.places - np.maximum(before, self.begins), 0)

        def total(curve: Floats) -> Floats:
            return np.where(alive, curve[waiting], 0.0).sum(axis=1)

        return _Due(
            alive.sum(axis=1).astype(np.float64),
            total(costs.block),
            total(costs.last_block),
            total(costs.exit_transformer),
        )

    def to_exit(self, due: _Due, n: int) -> Floats:
        """Seconds of ``n`` more blocks and a check."""
        costs = self.costs
        return n * due.block + due.exit_transformer + due.calls * (2 * costs.segment + costs.exit_head)

    def to_end(self, due: _Due, n: int) -> Floats:
        """Seconds of the last ``n`` blocks and the full head."""
        return (n - 1) * due.block + due.last_block + due.calls * (self.costs.segment + self.costs.head)

    def root(self) -> _States:
        tokens = len(self.recording.answers)
        fixed = self.costs.token * tokens + self.costs.answer * self.n_answers
        return _States(np.ones((1, tokens), dtype=bool), np.array([fixed]), np.zeros(1), np.zeros((1, 0), dtype=int))

    def extend(self, layers: tuple[int, ...], states: _States, due: _Due, max_exits: int) -> None:
        """Place one more exit behind ``layers``, in every way, and go on."""
        deepest = layers[-1] if layers else 0
        for c, block in enumerate(self.recording.blocks):
            if block <= deepest:
                continue
            paid = states.seconds + self.to_exit(due, block - deepest)
            children = self.children(states, paid, c)
            if not len(children.harm):
                continue
            owed = self.due(children.alive)
            whole = (*layers, block)
            self.finish(whole, children, owed)
            if len(whole) < max_exits:
                kept = self.promising(whole, children, owed)
                if len(kept):
                    self.extend(whole, children.take(kept), owed.take(kept), max_exits)

    def children(self, states: _States, paid: Floats, c: int) -> _States:
        """States behind an exit after candidate ``c``, one per threshold and way into it, without those that cannot win."""
        confidences, harm = self.recording.confidences[c], self.recording.harm[c]
        tokens = len(confidences)
        leaves = confidences[None] > np.asarray(self.levels)[:, None]  # [G, T]
        parts = []
        step = max(1, ELEMENTS // (tokens * len(self.levels)))
        for first in range(0, len(paid), step):
            rows = slice(first, first + step)
            alive = states.alive[rows]
            lost = alive.astype(np.float64) @ (leaves * harm).T  # [s, G]
            total = states.harm[rows, None] + lost
            s, g = np.nonzero(total <= self.bounds[-1])
            choices = np.concatenate([states.choices[rows][s], g[:, None]], axis=1)
            parts.append(_States(alive[s] & ~leaves[g], paid[rows][s], total[s, g], choices))
        return _undominated(_States(*(np.concatenate(values) for values in zip(*parts, strict=True))))

    def finish(self, layers: tuple[int, ...], states: _States, due: _Due) -> None:
        """Let all tokens left go to full depth; keep the fastest for every bound on harm."""
        n_left = self.recording.n_blocks - (layers[-1] if layers else 0)
        seconds = states.seconds + self.to_end(due, n_left)
        found: list[Placement | None] = []
        for bound in self.bounds:
            allowed = np.flatnonzero(states.harm <= bound)
            if not len(allowed):
                found.append(None)
                continue
            # Of equally fast ones the one with the least harm.
            s = allowed[np.lexsort((states.harm[allowed], seconds[allowed]))[0]]
            thresholds = tuple(self.levels[g] for g in states.choices[s])
            found.append(
                Placement(layers=layers, thresholds=thresholds, seconds=float(seconds[s]), harm=float(states.harm[s]))
            )
        self.best[layers] = found

    def promising(self, layers: tuple[int, ...], states: _States, due: _Due) -> Integers:
        """Indices of states for which more exits may gain anything over ``layers`` alone."""
        reached = np.array([np.inf if found is None else found.seconds for found in self.best[layers]])
        bound = np.minimum(np.searchsorted(self.bounds, states.harm), len(self.bounds) - 1)
        least = states.seconds + np.minimum(self.to_exit(due, 1), self.to_end(due, 1))
        return np.flatnonzero((least < reached[bound]) & (due.calls > 0))


def search(
    recording: Recording,
    costs: PlacementCosts,
    levels: Sequence[float],
    *,
    max_exits: int,
    max_harm: Sequence[float],
) -> Table:
    """The fastest thresholds out of ``levels`` for every set of at most ``max_exits`` candidates and every bound on harm.

    The empty set, full depth, is among them.  A set that no choice of thresholds makes faster than some part of it may be missing
    or have None: ask :func:`fastest`, which looks at subsets too.  Raises UserError for an empty list or a bound below 0.
    """
    if not levels or not len(max_harm) or min(max_harm) < 0 or max_exits < 1:
        raise UserError(
            f"levels={list(levels)}, max_harm={list(max_harm)}, max_exits={max_exits}: want some, 0 or more, 1"
        )
    n = int(recording.reach.max())
    for name in ("block", "last_block", "exit_transformer"):
        if len(getattr(costs, name)) <= n:
            raise ValueError(f"costs.{name}: {len(getattr(costs, name))} entries, positions go up to {n}")
    found = _Search(recording, costs, levels, max_harm)
    root = found.root()
    due = found.due(root.alive)
    found.finish((), root, due)
    found.extend((), root, due, max_exits)
    return {layers: tuple(placements) for layers, placements in found.best.items()}


def fastest(table: Table, layers: Sequence[int], bound: int) -> Placement:
    """The fastest placement on ``layers`` or some of them, under the bound on harm of that index."""
    found = [
        placement
        for size in range(len(layers) + 1)
        for part in itertools.combinations(sorted(layers), size)
        if (placement := table.get(part, (None,) * (bound + 1))[bound]) is not None
    ]
    return min(found, key=lambda placement: (placement.seconds, len(placement.layers)))


class Choice(NamedTuple):
    """A set of exits shared by several recordings, such as tasks."""

    layers: tuple[int, ...]
    """Those that at least one recording uses."""
    placements: tuple[Placement, ...]
    """Per recording, on these layers or some of them."""
    shares: tuple[float, ...]
    """Per recording, time over full depth's."""

    @property
    def relative_seconds(self) -> float:
        """The mean of the shares."""
        return sum(self.shares) / len(self.shares)


def best_set(
    tables: Sequence[Table],
    *,
    bound: int,
    max_exits: int,
    max_parameters: float | None = None,
    parameters: Mapping[int, int] | None = None,
) -> Choice:
    """The set of exits with the least mean time relative to full depth, every recording with thresholds of its own.

    ``parameters``: candidate -> trainable parameters of an exit there; with ``max_parameters``, sets above it are left out.
    Exact: a recording's least time on a set does not depend on the other recordings, and every set that a table knows is tried.
    """
    blocks = sorted({block for table in tables for layers in table for block in layers})
    best: Choice | None = None
    for layers in _sets(blocks, max_exits):
        size = sum((parameters or {}).get(block, 0) for block in layers)
        if max_parameters is not None and size > max_parameters:
            continue
        choice = on_set(tables, layers, bound=bound)
        if best is None or choice.relative_seconds < best.relative_seconds:
            best = choice
    assert best is not None  # the empty set costs nothing
    return best


def on_set(tables: Sequence[Table], layers: Sequence[int], *, bound: int) -> Choice:
    """The same for one set."""
    placements = tuple(fastest(table, layers, bound) for table in tables)
    shares = tuple(own.seconds / full_seconds(table) for own, table in zip(placements, tables, strict=True))
    used = tuple(sorted({block for placement in placements for block in placement.layers}))
    return Choice(used, placements, shares)


def full_seconds(table: Table) -> float:
    """Time of full depth on a recording."""
    full = table[()][0]
    assert full is not None
    return full.seconds


def _sets(blocks: Sequence[int], max_exits: int) -> Iterator[tuple[int, ...]]:
    """Small sets first, so that of equal ones the smallest is kept."""
    for size in range(max_exits + 1):
        yield from itertools.combinations(blocks, size)


def _undominated(states: _States) -> _States:
    """Of states with the same tokens in the stack, those that no other beats in time and harm."""
    if len(states.harm) < 2:
        return states
    packed = np.ascontiguousarray(np.packbits(states.alive, axis=1))
    _, group = np.unique(packed.view(np.dtype((np.void, packed.shape[1]))).ravel(), return_inverse=True)
    order = np.lexsort((states.harm, states.seconds, group))
    sorted_group, harm = group[order], states.harm[order]
    kept, least = [], np.inf
    for i, row in enumerate(order):
        if i == 0 or sorted_group[i] != sorted_group[i - 1]:
            least = np.inf
        if harm[i] < least:
            kept.append(row)
            least = harm[i]
    chosen = np.sort(np.asarray(kept))
    return states.take(chosen)
