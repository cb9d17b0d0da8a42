"""Memory of fixed shape and the programs that run on it: what calls of one shape share, one generation after another.

A program runs one segment, one exit, or a segment and what always follows it: its exit's check, or the head at full depth.
Each is built when first needed, for a number of rows and of positions, by the execution it is given.  Does not know rows'
histories, pending positions, policies beyond thresholds, or when a program is called.

Shape letters: B rows held, R rows of a call (spare rows included), T new positions, C capacity, S encoder positions, D model
width, M columns of an exit head, V vocabulary, K active exits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from free_dist.backbones import Backbone, LayerCache, Memory
from free_dist.backbones.static_span import StaticGeometry, StaticSpan, copy_to_device
from free_dist.decoding.execution import Execution
from free_dist.exits import ExitTransformer
from free_dist.exits.gate import ExitChecks


class Program(NamedTuple):
    """Which code runs on which shapes."""

    kind: Literal["segment", "check", "exit", "full"]
    """A segment; a segment with the check of the exit behind it; an exit transformer; the last segment with the full head."""
    place: int
    """Of the segment, or of the exit among the active ones."""
    n_rows: int
    """R"""
    n_new: int
    """T"""
    leading: bool
    """The rows of the call are the first rows held."""
    embeds: bool
    """The one new position of each row is a token to be embedded; otherwise its state is waiting."""
    last_only: bool
    """Of the last block only the last output is computed."""


class Outputs(NamedTuple):
    """What a program leaves; None where its kind has no such thing."""

    hidden: Tensor | None
    """Output of the segment or exit transformer, [R, T, D] or [R, 1, D], un-normed."""
    logits: Tensor | None
    """[R, M] of the exit's head, or [R, T, V] ([R, 1, V] with ``last_only``) of the full head."""
    ids: Tensor | None
    """[M], token id of each column; None: column = token id."""
    report: Tensor | None
    """What the host must know, in one tensor, float64 as that holds every token id.

    A check: [4, R] with the token that was embedded, the exit's most likely token, its largest softmax probability, and 1
    where that exceeds the threshold.  Full depth: [T or 1, R], most likely tokens.
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """What programs compute with."""

    backbone: Backbone
    exits: tuple[tuple[int, ExitTransformer], ...]
    """(layer, transformer) of the active exits, from shallow to deep."""
    exit_indices: tuple[int, ...]
    """Their indices in the bank."""
    checks: ExitChecks | None

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """K + 1 pairs (start, stop) of blocks."""
        return tuple(pairwise((0, *(layer for layer, _ in self.exits), self.backbone.n_blocks)))


class Frame:
    """Caches, states and tokens of B rows with C positions each, at addresses that never change."""

    def __init__(
        self, model: Model, execution: Execution, *, n_rows: int, capacity: int, n_memory: int, like: Tensor
    ) -> None:
        """``like``: hidden states of the type and on the device wanted, [..., D]; ``n_memory``: encoder positions S, or 0."""
        self.model = model
        self.n_rows = n_rows
        self.capacity = capacity
        self.device = like.device
        self._execution = execution
        n_segments = len(model.segments)
        # Buffers outlive the generation that first needs them, so they are not tied to its inference mode.
        with torch.inference_mode(False):
            shape = (n_rows, capacity + 1, like.shape[-1])
            self.inputs = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(n_segments)]
            """Per segment the states that reached it, [B, C + 1, D]."""
            # One entry more than rows: spare rows of a call leave their tokens there.
            self.latest = torch.zeros(n_rows + 1, dtype=torch.long, device=like.device)
            """[B + 1], the most likely token of each row's last check or full-depth output."""
            self.prompt_lengths = torch.zeros(n_rows, dtype=torch.long, device=like.device)
            """[B], positions of each prompt."""
            table = (len(model.exits), capacity + 1)
            self._thresholds = torch.full(table, 2.0, dtype=torch.float64, device=like.device)  # [K, C + 1]
            self.memory: Memory | None = None
            """What the encoder read, of S positions for each row, always with a mask."""
            if n_memory:
                states = torch.zeros(n_rows, n_memory, like.shape[-1], dtype=like.dtype, device=like.device)
                self.memory = Memory(states, torch.ones(n_rows, 1, 1, n_memory, dtype=torch.bool, device=like.device))
        self._threshold_values: Sequence[Sequence[float]] = ()
        self.block_caches: list[LayerCache] = []
        """Of the blocks that some generation reached."""
        self.exit_caches: list[LayerCache | None] = [None] * len(model.exits)
        """Of the active exits that some generation reached."""
        self._geometries: dict[int, StaticGeometry] = {}
        self._programs: dict[Program, Callable[[], Outputs]] = {}
        self.owner: object = None
        """Who uses the memory now."""

    def take_over(self, owner: object, lengths: Sequence[int], memory: Memory | None) -> None:
        """Hand the memory to a new owner, whose prompts have these numbers of positions.

        States of the last one are wiped here, keys and values when a block is reached.
        """
        self.owner = owner
        for store in (*self.inputs, self.latest, self.prompt_lengths):
            store.zero_()
        copy_to_device([lengths], self.prompt_lengths[None, : len(lengths)])
        if memory is not None:
            assert self.memory is not None
            assert self.memory.mask is not None
            n_rows, n_memory = memory.states.shape[:2]
            self.memory.states.zero_()
            self.memory.states[:n_rows, :n_memory] = memory.states
            self.memory.mask.fill_(True)  # rows that nobody holds must see something, or their softmax is NaN
            self.memory.mask[:n_rows, ..., n_memory:] = False
            if memory.mask is not None:
                self.memory.mask[:n_rows, ..., :n_memory] = memory.mask

    def set_thresholds(self, values: Sequence[Sequence[float]]) -> None:
        """Confidence above which a check emits: for each active exit one per answer position, the last one for all later."""
        if values != self._threshold_values:
            self._threshold_values = values
            longest = self.capacity + 1
            copy_to_device([[*row, *[row[-1]] * longest][:longest] for row in values], self._thresholds)

    def block_cache(self, index: int) -> LayerCache:
        """The cache of block ``index + 1``, wiped; blocks are asked for in order."""
        if index == len(self.block_caches):
            self.block_caches.append(self._new_cache())
        return _wiped(self.block_caches[index])

    def exit_cache(self, index: int) -> LayerCache:
        """The cache of an active exit, wiped."""
        cache = self.exit_caches[index]
        if cache is None:
            cache = self.exit_caches[index] = self._new_cache()
        return _wiped(cache)

    def copy_rows(self, source: Frame, rows: Tensor, *, n_blocks: int, exits: Sequence[int]) -> None:
        """Row i becomes row ``rows[i]`` of ``source`` (this frame or another) in the first blocks, these exits and all states."""
        if source is not self:
            for index in range(n_blocks):
                self.block_cache(index)
            for index in exits:
                self.exit_cache(index)
        for new, old in zip(self._per_row(n_blocks, exits), source._per_row(n_blocks, exits), strict=True):
            new[: len(rows)] = old.index_select(0, rows)

    def buffers(self) -> list[Tensor]:
        """All memory that depends on what was decoded."""
        exits = [index for index, cache in enumerate(self.exit_caches) if cache is not None]
        return self._per_row(len(self.block_caches), exits)

    def run(
        self,
        program: Program,
        rows: Sequence[int],
        starts: Sequence[int],
        stops: Sequence[int],
        tokens: Sequence[int] | None,
    ) -> Outputs:
        """Positions ``starts[i]`` to ``stops[i] - 1`` of row ``rows[i]`` through a program whose caches are there.

        ``tokens``: what the program embeds, negative for the row's latest token.  Outputs hold spare rows behind the others,
        and are valid until the next call.
        """
        geometry = self._geometries.get(program.n_rows)
        if geometry is None:
            with torch.inference_mode(False):
                geometry = self._geometries[program.n_rows] = StaticGeometry(program.n_rows, self.device)
        geometry.refill(rows, starts, stops, tokens)
        ready = self._programs.get(program)
        if ready is None:
            body = self._body(program, geometry)
            kept = (*self.buffers(), self._thresholds, geometry.table)
            ready = self._programs[program] = self._execution(body, kept=kept, changed=(self.latest,))
        return ready()

    def _body(self, program: Program, geometry: StaticGeometry) -> Callable[[], Outputs]:
        backbone, index = self.model.backbone, program.place
        segments = self.model.segments

        def new_span() -> StaticSpan:
            span = StaticSpan(geometry, program.n_new, self.capacity, leading=program.leading)
            return backbone.with_shared(span, self.device)

        def segment(span: StaticSpan) -> tuple[Tensor, Tensor | None]:
            embedded = None
            if program.embeds:
                embedded = torch.where(span.tokens < 0, self.latest[span.rows], span.tokens)
                past = span.positions(self.device)[:, 0]
                hidden = backbone.embed(embedded[:, None], None, past)
            else:
                hidden = span.gather(self.inputs[index])
            start, stop = segments[index]
            hidden = backbone.run_blocks(hidden, start, stop, self.block_caches, span, last_only=program.last_only)
            if index + 1 < len(segments):
                span.scatter(self.inputs[index + 1], hidden)
            return hidden, embedded

        def exit_state(hidden: Tensor, span: StaticSpan) -> Tensor:
            return self.model.exits[index][1](hidden, self.exit_caches[index], span, last_only=True)

        def only_segment() -> Outputs:
            return Outputs(segment(new_span())[0], None, None, None)

        def only_exit() -> Outputs:
            span = new_span()
            return Outputs(exit_state(span.gather(self.inputs[index + 1]), span), None, None, None)

        def segment_and_check() -> Outputs:
            checks = self.model.checks
            assert checks is not None
            span = new_span()
            hidden, embedded = segment(span)
            features = backbone.final_norm(exit_state(hidden, span)[:, -1])
            logits, ids = checks.scores(self.model.exit_indices[index], features)
            columns, confidence = most_likely(logits)
            tokens = columns if ids is None else ids.index_select(0, columns)
            positions = (span.stops - self.prompt_lengths[span.rows]).clamp_min(0)
            emits = confidence.double() > self._thresholds[index].index_select(0, positions)
            self._leave_latest(span, tokens)
            read = tokens if embedded is None else embedded
            report = torch.stack((read.double(), tokens.double(), confidence.double(), emits.double()))
            return Outputs(None, logits, ids, report)

        def segment_and_head() -> Outputs:
            span = new_span()
            hidden, _ = segment(span)
            logits = backbone.lm_head(backbone.final_norm(hidden))
            tokens = logits.argmax(dim=-1)
            self._leave_latest(span, tokens[:, -1])
            return Outputs(None, logits, None, tokens.t().double())

        bodies: dict[str, Callable[[], Outputs]] = {
            "segment": only_segment,
            "check": segment_and_check,
            "exit": only_exit,
            "full": segment_and_head,
        }
        return bodies[program.kind]

    def _leave_latest(self, span: StaticSpan, tokens: Tensor) -> None:
        self.latest.index_copy_(0, span.rows.masked_fill(span.is_spare, self.n_rows), tokens)

    def _per_row(self, n_blocks: int, exits: Sequence[int]) -> list[Tensor]:
        caches = [*self.block_caches[:n_blocks], *(self.exit_caches[index] for index in exits)]
        keys_and_values = [store for cache in caches if cache is not None for store in _stores(cache)]
        return [*keys_and_values, *self.inputs, self.latest, self.prompt_lengths, *(self.memory or ())]

    def _new_cache(self) -> LayerCache:
        with torch.inference_mode(False):
            cache = self.model.backbone.new_layer_cache(self.n_rows, self.capacity, self.memory)
            if self.memory is not None:
                shape = (self.n_rows, cache.keys.shape[1], self.memory.states.shape[1], cache.keys.shape[3])
                cache.cross = (cache.keys.new_zeros(shape), cache.keys.new_zeros(shape))
        return cache


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[R, M] -> the most likely column and its softmax probability, both [R]; half precision is widened first."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.argmax(dim=-1), torch.softmax(wide, dim=-1).amax(dim=-1)


def _wiped(cache: LayerCache) -> LayerCache:
    # NaN behind a mask is still NaN, so an earlier generation that overflowed must not be seen by the next.
    for store in _stores(cache):
        store.zero_()
    return cache


def _stores(cache: LayerCache) -> tuple[Tensor, ...]:
    return (cache.keys, cache.values, *(cache.cross or ()))
