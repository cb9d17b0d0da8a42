"""What a generation returns: tokens, and a trace of where each was emitted and what it cost.

Shape letters: B rows, N generated tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from free_dist.decoding.cache import Counts


class TokenRecord(NamedTuple):
    """One emitted token and what its row took part in since the token before it."""

    token: int
    exit_layer: int | None
    """Block after which it was emitted (lossless: drafted); None at full depth."""
    confidence: float | None
    """Confidence of the exit that emitted it; None at full depth, where none is computed."""
    blocks: int
    """Backbone blocks executed, one per block and call: weight reads.  Pending positions ride along in the same call.

    In lossless mode a whole verified group of tokens is counted at its first token.
    """
    block_positions: int
    """Backbone blocks executed times the row's positions in each call; the first token carries the prompt."""
    exit_calls: int
    """Exit transformers run."""
    head_calls: int
    """Vocabulary heads run, at exits and at full depth."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """One finished row."""

    records: tuple[TokenRecord, ...]
    """One per generated token, the end-of-sequence token included where it was generated."""
    n_blocks: int
    """Blocks of the full model, L."""
    drafted: int = 0
    """Lossless mode: tokens drafted by exits."""
    accepted: int = 0
    """Lossless mode: drafts that the full model agreed with."""
    score: float | None = None
    """Beam search: sum of log-probabilities over length ** length_penalty."""

    @property
    def tokens(self) -> list[int]:
        """Generated ids, without the prompt."""
        return [record.token for record in self.records]

    @property
    def exit_layers(self) -> list[int | None]:
        """Per token: the block after which it was emitted, None at full depth."""
        return [record.exit_layer for record in self.records]

    @property
    def confidences(self) -> list[float | None]:
        """Per token: confidence of the exit that emitted it, None at full depth."""
        return [record.confidence for record in self.records]

    @property
    def blocks_executed(self) -> list[int]:
        """Per token: backbone blocks executed (weight reads); exit transformers and heads are not included."""
        return [record.blocks for record in self.records]

    @property
    def mean_backbone_blocks(self) -> float:
        """Backbone blocks executed per token; exit transformers are not included."""
        return sum(self.blocks_executed) / len(self.records)

    @property
    def exit_calls(self) -> int:
        """Exit transformers run over the whole sequence."""
        return sum(record.exit_calls for record in self.records)

    @property
    def head_calls(self) -> int:
        """Vocabulary heads run over the whole sequence."""
        return sum(record.head_calls for record in self.records)


@dataclass(frozen=True, kw_only=True)
class Generation(Sequence[GenerationResult]):
    """The rows of a generation, in the order of the prompts."""

    rows: tuple[GenerationResult, ...]
    pad_token_id: int
    calls: Counts
    """Work of the whole batch: a call counts once, however many rows share it."""

    @property
    def sequences(self) -> Tensor:
        """Generated ids without prompts, int64 [B, N], shorter rows padded on the right."""
        longest = max(len(row.records) for row in self.rows)
        padding = [self.pad_token_id] * longest
        return torch.tensor([(row.tokens + padding)[:longest] for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> GenerationResult: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[GenerationResult]: ...

    def __getitem__(self, index: int | slice) -> GenerationResult | Sequence[GenerationResult]:
        return self.rows[index]
