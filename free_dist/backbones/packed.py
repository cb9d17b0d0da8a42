"""Rows of a training batch as one list of positions, each computed once and only where something depends on it.

The plain layout [B, T, D] computes padding, repeats an image's positions in every row of that image, and gives every
position of an exit transformer a query.  A :class:`PackedRows` lists the positions that count, [M, D]: linear maps and norms
run on the list, and attention gathers from it what each query may see.  Causality makes this exact: the positions that open
every row of one image depend on nothing that differs between these rows, and nothing depends on padding on the right.

Knows positions, not architectures: a block that can run on such a list is :func:`~free_dist.backbones.opt_block.packed_opt_block`
or :func:`~free_dist.backbones.llama_block.packed_llama_block`.

Shape letters: B rows, T positions of a row, I images, P positions that open every row, M listed positions, N answer positions,
R rows of an attention, A queries of such a row, S keys of such a row, H heads, E head width, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RAGGED_FROM = 1 / 16
"""Share of positions that must be padding before rows of different lengths are listed: below, gathering costs what it saves."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What need not be computed in a training forward; without any of the three, the list is the plain layout."""

    answers: Tensor
    """Boolean [B, T], true where a feature is wanted: the only positions whose features come back."""
    drop_padding: bool = False
    """Leave out what follows a row's last answer position, or, where rows are nearly equal, the longest row's."""
    share_prefix: bool = False
    """Compute what opens every row once per image.  Rows must begin with ``TokenLayout.opening``."""
    answer_queries: bool = False
    """In exit transformers and the last block, give only answer positions a query; the others keep keys and values."""


class Attended(NamedTuple):
    """One attention call: R rows of A queries on S keys each."""

    queries: Tensor | None
    """[R * A], which of the queries that were computed; padding repeats the first.  None: they are in this order."""
    keys: Tensor | None
    """[R * S], which listed positions; None: all of them, in this order."""
    shape: tuple[int, int, int]
    """R, A, S."""
    mask: Tensor | None
    """Boolean [1 or R, 1, A, S], true where attended; None: plain causality."""
    kept: Tensor | None
    """[n], which of the R * A outputs are no padding, in the order in which they are listed; None: all."""


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Which positions are listed, and who attends to whom; M of them stand for B * T."""

    source: Tensor
    """[M], where each listed position stands in the flattened [B * T]."""
    positions: Tensor
    """[M], its position in its row."""
    answers: Tensor
    """[N], where each answer position is listed, row by row."""
    everywhere: tuple[Attended, ...]
    """The attention of a block that computes all positions; outputs follow each other as listed."""
    at_answers: Attended | None
    """That of one whose queries are the answer positions alone; None: they are computed everywhere and picked."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """What an architecture computes once per batch from the positions."""

    @classmethod
    def of(cls, packing: Packing, image_index: Tensor, n_opening: int) -> PackedRows:
        """The rows of ``packing.answers`` on the images ``image_index`` [B]; the first P = ``n_opening`` positions open a row."""
        answers, device = packing.answers, packing.answers.device
        n_rows, n_positions = answers.shape
        n_images = int(image_index.max()) + 1 if packing.share_prefix else n_rows
        n_shared = n_opening if n_images < n_rows else 0
        column = torch.arange(n_positions, device=device)
        lengths = torch.full((n_rows,), n_positions, device=device)
        if packing.drop_padding:
            # An answer's own last token, which ends the row, predicts nothing: it is left out like padding.
            lengths = ((column + 1) * answers).amax(1).clamp(min=min(n_opening + 1, n_positions))
            n_positions = int(lengths.max())
            if int(lengths.sum()) > (1 - RAGGED_FROM) * n_rows * n_positions:
                lengths = torch.full_like(lengths, n_positions)
            column, answers = column[:n_positions], answers[:, :n_positions]
        own = (column < lengths[:, None]) & (column >= n_shared)  # [B, T], positions that belong to one row
        n_images = n_images if n_shared else 0

        first_row = torch.zeros(n_images, dtype=torch.long, device=device)
        if n_shared:
            rows = torch.arange(n_rows, device=device)
            first_row.scatter_reduce_(0, image_index, rows, "amin", include_self=False)
        opening = first_row[:, None] * packing.answers.shape[1] + column[:n_shared]  # [I, P]
        flat = torch.arange(n_rows, device=device)[:, None] * packing.answers.shape[1] + column  # [B, T]
        listed = torch.where(own, own.flatten().cumsum(0).view(own.shape) - 1 + n_images * n_shared, 0)
        listed[:, :n_shared] = image_index[:, None] * n_shared + column[:n_shared]

        groups = []
        if n_shared:
            # These stand first in the list, of which this attention takes as much as it needs.
            groups.append(Attended(None, None, (n_images, n_shared, n_shared), None, None))
        groups.append(_own_attention(own, listed, n_shared, column))
        return cls(
            source=torch.cat((opening.flatten(), flat[own])),
            positions=torch.cat((column[:n_shared].repeat(n_images), column.expand(n_rows, -1)[own])),
            answers=listed[answers],
            everywhere=tuple(groups),
            at_answers=_answer_attention(answers, groups[-1].keys) if packing.answer_queries else None,
        )

    def take(self, padded: Tensor) -> Tensor:
        """[B, T, D] -> [M, D]."""
        return padded.flatten(0, 1).index_select(0, self.source)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        at_answers: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """Queries [M, H, E], or of the answer positions [N, H, E], on keys and values [M, heads, E] -> [M or N, H * E]."""
        groups = self.everywhere
        if at_answers:
            assert self.at_answers is not None, "this list gives all positions a query"
            groups = (self.at_answers,)
        outputs = [_attention(group, query, key, value, dropout, scale) for group in groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _own_attention(own: Tensor, listed: Tensor, n_shared: int, column: Tensor) -> Attended:
    """Positions after the shared ones: on these, and on what stands before them in their row."""
    n_rows, n_positions = own.shape
    n_queries = n_positions - n_shared
    mine, index = own[:, n_shared:], listed.flatten()
    kept = None if bool(mine.all()) else mine.flatten().nonzero().squeeze(1)
    shape = (n_rows, n_queries, n_positions)
    if n_shared == 0:
        return Attended(None, None, shape, None, None) if kept is None else Attended(index, index, shape, None, kept)
    mask = (column <= column[n_shared:, None])[None, None]
    return Attended(listed[:, n_shared:].flatten(), index, shape, mask, kept)


def _answer_attention(answers: Tensor, keys: Tensor | None) -> Attended:
    """The answer positions alone, on what stands before them in their row; ``keys`` as for all positions."""
    n_rows, n_positions = answers.shape
    counts = answers.sum(1)
    n_queries = int(counts.max())
    slot = torch.arange(n_queries, device=answers.device)
    real = slot < counts[:, None]  # [B, A]
    number = (answers.flatten().cumsum(0) - 1).view(answers.shape)[answers]  # [N]: 0, 1, ...
    queries = torch.zeros(real.shape, dtype=torch.long, device=answers.device)
    queries[real] = number
    place = torch.zeros_like(queries)
    place[real] = answers.nonzero()[:, 1]
    mask = (torch.arange(n_positions, device=answers.device) <= place[:, :, None])[:, None]
    kept = None if bool(real.all()) else real.flatten().nonzero().squeeze(1)
    return Attended(queries.flatten(), keys, (n_rows, n_queries, n_positions), mask, kept)


def _attention(
    group: Attended, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None
) -> Tensor:
    n_rows, n_queries, n_keys = group.shape

    def gathered(listed: Tensor, index: Tensor | None, count: int) -> Tensor:
        rows = listed[: n_rows * count] if index is None else listed.flatten(1).index_select(0, index)
        return rows.view(n_rows, count, *listed.shape[1:]).transpose(1, 2)

    attended = F.scaled_dot_product_attention(
        gathered(query, group.queries, n_queries),
        gathered(key, group.keys, n_keys),
        gathered(value, group.keys, n_keys),
        attn_mask=group.mask,
        dropout_p=dropout,
        is_causal=group.mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    outputs = attended.transpose(1, 2).reshape(n_rows * n_queries, -1)
    return outputs if group.kept is None else outputs.index_select(0, group.kept)
