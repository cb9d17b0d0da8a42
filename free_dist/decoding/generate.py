"""Greedy generation at batch 1 that stops at the first confident exit: prefill, decode_one_token, generate.

With no active exit this is an ordinary full-depth decoder: one ``run_blocks`` call per token, nothing pending, no softmax.
Does not know how confidence is computed, how exits were trained, text, or image files.

Shape letters: T prompt positions (image placeholders included), D model width, V vocabulary, K exits, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from free_dist.backbones import Backbone
from free_dist.config import UserError
from free_dist.decoding.cache import PendingCache
from free_dist.decoding.policy import ExitPolicy, MaxProbPolicy
from free_dist.exits import ExitBank


class TokenRecord(NamedTuple):
    """One emitted token and what it cost since the token before it."""

    token: int
    exit_layer: int | None
    """Block after which it was emitted; None at full depth."""
    confidence: float | None
    """Confidence of the exit that emitted it; None at full depth, where none is computed."""
    blocks: int
    """Backbone blocks executed, one per block and call: weight reads.  Pending positions ride along in the same call."""
    block_positions: int
    """Backbone blocks executed times the positions in each call; the first token carries the prompt."""
    exit_calls: int
    """Exit transformers run, one per check."""
    head_calls: int
    """Vocabulary heads run, one per check and one at full depth."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """A finished generation."""

    records: tuple[TokenRecord, ...]
    """One per generated token, the end-of-sequence token included where it was generated."""
    n_blocks: int
    """Blocks of the full model, L."""

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
        """Exit transformers run over the whole sequence; each costs about one block."""
        return sum(record.exit_calls for record in self.records)

    @property
    def head_calls(self) -> int:
        """Vocabulary heads run over the whole sequence."""
        return sum(record.head_calls for record in self.records)


class DecodingState:
    """One sequence being decoded: what :func:`decode_one_token` needs to emit the next token."""

    def __init__(self, backbone: Backbone, bank: ExitBank | None, policy: ExitPolicy | None, capacity: int) -> None:
        """``bank`` and ``policy`` come together or not at all; ``capacity`` is prompt plus new tokens."""
        self.backbone = backbone
        self.bank = bank
        self.policy = policy
        self.active: tuple[int, ...] = ()
        """Indices into the bank of the exits that can fire."""
        exits = []
        if bank is not None:
            assert policy is not None
            self.active = tuple(index for index in range(len(bank.exit_layers)) if policy.is_active(index))
            exits = [(bank.exit_layers[index], bank.transformers[index]) for index in self.active]
        self.cache = PendingCache(backbone, exits, capacity)  # type: ignore[arg-type]
        self.length = 0
        """Positions embedded so far."""
        self.last_token: Tensor | None = None
        """The token emitted last, [1, 1]."""


@torch.inference_mode()
def prefill(state: DecodingState, pixel_values: Tensor, prompt_ids: Tensor) -> TokenRecord:
    """Encode the image [1, 3, height, width], read the prompt [1, T] and emit the first token."""
    hidden = state.backbone.embed(prompt_ids, state.backbone.encode_prefix(pixel_values))
    state.length = prompt_ids.shape[1]
    return _emit(state, hidden)


@torch.inference_mode()
def decode_one_token(state: DecodingState) -> TokenRecord:
    """Read the token emitted last and emit the next one."""
    assert state.last_token is not None, "prefill comes first"
    hidden = state.backbone.embed(state.last_token, None, state.length)
    state.length += 1
    return _emit(state, hidden)


@torch.inference_mode()
def generate(
    backbone: Backbone,
    bank: ExitBank | None,
    pixel_values: Tensor,
    prompt_ids: Tensor | Sequence[int],
    *,
    thresholds: float | Sequence[float] | ExitPolicy | None = None,
    max_new_tokens: int,
    eos: int | None = None,
) -> GenerationResult:
    """Decode greedily from one image [1, 3, height, width] and one prompt ([1, T] or a list of ids, placeholders included).

    Without a bank, or with every threshold at 1 or above, this is the full model: the tokens of Hugging Face's greedy
    ``generate``.  ``thresholds`` is one confidence threshold, one per exit, or a policy; it must be given with a bank.
    ``eos`` ends the answer (None: the backbone's own; a negative id: never).  Raises UserError for
    unusable thresholds, ``max_new_tokens`` below 1 or more positions than the backbone has; plain ValueError for a batch,
    a missing threshold, exits that do not fit the backbone, or blocks in training mode.
    """
    device = pixel_values.device
    ids = prompt_ids if isinstance(prompt_ids, Tensor) else torch.tensor([list(prompt_ids)], device=device)
    if pixel_values.shape[0] != 1 or ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(
            f"generate decodes one sequence: want pixel_values [1, 3, h, w] and prompt_ids [1, T], "
            f"got {list(pixel_values.shape)} and {list(ids.shape)}"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: want at least 1")
    capacity = ids.shape[1] + max_new_tokens - 1  # the last token is never read
    if capacity > backbone.max_positions:
        raise UserError(
            f"a prompt of {ids.shape[1]} positions and max_new_tokens={max_new_tokens} exceed the backbone's "
            f"{backbone.max_positions} positions; lower max_new_tokens or shorten the prompt"
        )
    policy = None if bank is None else _policy(backbone, bank, thresholds)
    if backbone.block(1).training:
        raise ValueError("the backbone is in training mode, where dropout makes decoding random: call backbone.eval()")
    state = DecodingState(backbone, bank, policy, capacity)
    eos_id = backbone.layout.eos_token_id if eos is None else eos
    records = [prefill(state, pixel_values, ids)]
    while records[-1].token != eos_id and len(records) < max_new_tokens:
        records.append(decode_one_token(state))
    return GenerationResult(records=tuple(records), n_blocks=backbone.n_blocks)


def _policy(backbone: Backbone, bank: ExitBank, thresholds: float | Sequence[float] | ExitPolicy | None) -> ExitPolicy:
    """The policy behind ``thresholds``, after checking that the exits fit the backbone and are in evaluation mode."""
    # A fresh wrapper says "training" although its blocks do not: the blocks are what dropout listens to.
    if any(module.training for exit_transformer in bank.transformers for module in exit_transformer.children()):
        raise ValueError("the exits are in training mode, where dropout makes decoding random: call bank.eval()")
    theirs, ours = next(bank.transformers.parameters()), next(backbone.block(1).parameters())
    if theirs.dtype != ours.dtype or theirs.device != ours.device:
        raise ValueError(
            f"exits are {theirs.dtype} on {theirs.device}, the backbone's blocks {ours.dtype} on {ours.device}; "
            "convert one with .to()"
        )
    if thresholds is None:
        raise ValueError("thresholds: give one for all exits, one per exit, or a policy (1 or more never exits)")
    if isinstance(thresholds, (int, float, Sequence)):
        try:
            return MaxProbPolicy(thresholds, len(bank.exit_layers))
        except ValueError as error:
            raise UserError(str(error)) from error
    return thresholds


def _emit(state: DecodingState, hidden: Tensor) -> TokenRecord:
    """New ``h_0`` [1, T, D] -> the next token, from the first confident exit or from full depth."""
    cache = state.cache
    counts = cache.counts
    before = (counts.block_calls, counts.block_positions, counts.exit_calls, counts.head_calls)
    exit_layer: int | None = None
    confidence: float | None = None
    for depth, index in enumerate(state.active):
        assert state.bank is not None
        assert state.policy is not None
        hidden = cache.advance(depth, hidden)
        logits = state.bank.logits(state.bank.final_norm(cache.run_exit(depth, hidden)))
        counts.head_calls += 1
        decision = state.policy.decide(index, logits[0])
        if decision.emit:
            cache.hold(depth + 1, hidden)
            token, confidence, exit_layer = decision.token, decision.confidence, state.bank.exit_layers[index]
            break
    else:
        hidden = cache.advance(len(state.active), hidden)
        logits = state.backbone.lm_head(state.backbone.final_norm(hidden[:, -1]))
        counts.head_calls += 1
        token = logits[0].argmax(dim=-1)
    state.last_token = token.view(1, 1)
    return TokenRecord(
        int(token.item()),
        exit_layer,
        confidence,
        counts.block_calls - before[0],
        counts.block_positions - before[1],
        counts.exit_calls - before[2],
        counts.head_calls - before[3],
    )
