"""What every backbone offers: a frozen VLM as a stack of blocks that runs from any block to any block.

Layer convention, everywhere: ``h_0`` is the embedded input and ``h_k`` the hidden state *after block k*, 1-based,
before the final norm.  Only adapters translate this to a library's own numbering.

This module does not know any architecture, and nothing about exits, training or distribution.

Shape letters: B batch, I distinct images, T text positions (image placeholders included), P cached positions,
Q query tokens, D model width, V vocabulary, L blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from free_dist.backbones.packed import PackedRows, Packing
from free_dist.backbones.span import ContiguousSpan, LayerCache, Memory, Span
from free_dist.config import ConfigError

SpanT = TypeVar("SpanT", bound=Span)


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The ids that a tokenizer alone does not tell: how image and text share one sequence."""

    image_token_id: int
    """Placeholder replaced by a query token's projection; V, one past the last token, where a vocabulary has none."""
    num_query_tokens: int
    """Placeholders per image, Q."""
    bos_token_id: int | None
    """Opens a text as the model's config has it (a tokenizer may differ: see ``opening``); None for T5."""
    eos_token_id: int
    """Ends an answer."""
    pad_token_id: int
    """Fills rows on the right."""
    opening: tuple[int, ...]
    """Everything before the first prompt's text: the Q placeholders, the opening token, what a template puts around an image."""
    prompt_end: tuple[int, ...] = ()
    """Follows the text of a prompt that an encoder reads."""
    decoder_start_token_id: int | None = None
    """Opens the decoder's sequence; None for decoder-only models, whose answers continue the prompt."""

    def decoder_positions(self, prompt_ids: Sized) -> int:
        """Positions of the decoder's blocks before an answer: the prompt's, or one where an encoder reads the prompt."""
        return len(prompt_ids) if self.decoder_start_token_id is None else 1


@dataclass(frozen=True, kw_only=True)
class BackboneFeatures:
    """What one training forward of a frozen backbone yields."""

    exits: tuple[Tensor, ...]
    """``h_k`` for each requested exit layer, each [B, T, D]; of a packed forward [M, D], as ``span`` lists them."""
    final: Tensor
    """Final-layer feature *after* the final norm, [B, T, D]; of a packed forward at the answer positions alone, [N, D]."""
    memory: Memory | None = None
    """What an encoder read, for the exits' blocks too; None for decoder-only models."""
    span: Span | PackedRows | None = None
    """Where the positions are, if the blocks need to be told; None if not."""


class Instruction(NamedTuple):
    """What a Q-Former reads besides an image (InstructBLIP): the prompt, in the Q-Former's own vocabulary."""

    input_ids: Tensor
    """[B, S], padded on the right."""
    mask: Tensor
    """Boolean [B, S], true where there is a token."""

    def to(self, device: torch.device | str) -> Instruction:
        """The same on another device."""
        return Instruction(self.input_ids.to(device), self.mask.to(device))

    @staticmethod
    def joined(parts: Sequence[Instruction]) -> Instruction:
        """The rows of all parts, one after the other."""
        width = max(part.mask.shape[1] for part in parts)
        grown = [[F.pad(tensor, (0, width - tensor.shape[1])) for tensor in part] for part in parts]
        return Instruction(*(torch.cat(tensors) for tensors in zip(*grown, strict=True)))


class Start(NamedTuple):
    """What the blocks read first."""

    hidden: Tensor
    """``h_0`` [B, T, D], rows padded on the right."""
    lengths: list[int]
    """Positions of each row, B values from 1 to T."""
    memory: Memory | None
    """What an encoder read, for cross-attention; None for decoder-only models."""
    start_token_id: int | None = None
    """With an encoder: the token that opens the decoder's sequence."""


class BlockCall(Protocol):
    """Runs one block module of this architecture; holds no parameters of its own."""

    def __call__(
        self,
        block: nn.Module,
        hidden: Tensor,
        cache: LayerCache | None = None,
        span: Span | PackedRows | None = None,
        last_only: bool = False,
        memory: Memory | None = None,
    ) -> Tensor:
        """[R, T, D] -> [R, T, D], causal; with a cache (inference) over the cached positions too, which ``span`` describes.

        ``last_only``: keys and values of all T positions are cached, but only the last output is computed, [R, 1, D].
        ``memory`` is what an encoder read, for a call without a cache; a cache has its own.

        With packed rows (training, architectures that ``can_pack``): [M, D] -> [M, D], or with ``last_only``, whose queries
        are then the answer positions, [N, D].
        """


class Backbone(nn.Module, ABC):
    """A frozen VLM: image -> prefix -> ``h_0`` -> blocks -> final norm -> head."""

    n_blocks: int
    hidden_size: int
    vocab_size: int
    layout: TokenLayout
    max_positions: int
    """Longest sequence, image placeholders included."""
    prefix_reads_prompt: bool = False
    """Whether a visual prefix depends on the row's text, so that rows of one image have prefixes of their own."""

    @abstractmethod
    def encode_prefix(
        self, pixel_values: Tensor, image_index: Tensor | None = None, instruction: Instruction | None = None
    ) -> Tensor:
        """[I, 3, height, width] normalised pixels -> visual prefix [B, Q, D] of B rows.

        ``image_index`` [B] names each row's image; None: one row per image.  ``instruction`` is for a Q-Former that reads
        one per row; the others refuse it with ValueError.
        """

    @abstractmethod
    def embed(self, input_ids: Tensor, prefix: Tensor | None = None, past_length: int | Tensor = 0) -> Tensor:
        """[B, T] ids -> ``h_0`` [B, T, D]; image placeholders take the rows of ``prefix`` [B, Q, D] in order.

        ``past_length`` is the number of positions before the first id, one number or one per row [B].  Rows are unpadded
        or padded on the right.
        """

    def start(self, prompts: Sequence[Sequence[int]], prefix: Tensor) -> Start:
        """B prompts of any lengths (image placeholders included) and their prefix [B, Q, D] -> what the blocks read first."""
        lengths = [len(prompt) for prompt in prompts]
        rows = [[*prompt, *[self.layout.pad_token_id] * (max(lengths) - len(prompt))] for prompt in prompts]
        return Start(self.embed(torch.tensor(rows, device=prefix.device), prefix), lengths, None)

    def training_start(
        self, input_ids: Tensor, prefix: Tensor, decoder_ids: Tensor | None
    ) -> tuple[Tensor, Memory | None, Span | None]:
        """Padded rows as in :meth:`forward` and their prefix [B, Q, D] -> ``h_0``, and what blocks need besides it."""
        if decoder_ids is not None:
            raise ValueError("decoder_ids: this backbone has no encoder, its answers continue the prompt")
        return self.embed(input_ids, prefix), None, None

    @property
    def can_pack(self) -> bool:
        """Whether the blocks run on packed rows."""
        return False

    def pack(self, packing: Packing, image_index: Tensor) -> PackedRows:
        """The list of positions of a batch; raises UserError where :func:`check_packing` does."""
        self.check_packing(share_prefix=packing.share_prefix)
        return PackedRows.of(packing, image_index, len(self.layout.opening))

    def check_packing(self, *, share_prefix: bool) -> None:
        """Raise ConfigError where this backbone cannot run on packed rows, or rows of one image share no prefix."""
        if not self.can_pack:
            raise ConfigError(
                "cost.drop_padding, cost.share_prefix, cost.answer_queries: this language model (T5) reads prompts in an "
                "encoder and nothing but answers in its decoder, so there is nothing to save: leave all three off"
            )
        if share_prefix and self.prefix_reads_prompt:
            raise ConfigError(
                "cost.share_prefix=true: this backbone's Q-Former reads the prompt (InstructBLIP), so rows of one image have "
                "prefixes of their own: leave it off"
            )

    @abstractmethod
    def block(self, k: int) -> nn.Module:
        """The module of block ``k``, 1-based."""

    @property
    @abstractmethod
    def block_call(self) -> BlockCall:
        """How a block module of this backbone is run."""

    @abstractmethod
    def final_norm(self, hidden: Tensor) -> Tensor:
        """``h_L`` (or an exit transformer's output) [..., D] -> normed feature [..., D]."""

    @abstractmethod
    def lm_head(self, features: Tensor) -> Tensor:
        """Normed features [..., D] -> logits [..., V]."""

    @abstractmethod
    def shared_modules(self) -> tuple[nn.Module, nn.Module]:
        """The modules behind :meth:`final_norm` and :meth:`lm_head`, which exits share by reference."""

    @abstractmethod
    def new_layer_cache(self, batch_size: int, capacity: int, memory: Memory | None = None) -> LayerCache:
        """An empty cache for one block."""

    def new_span(self, start: int, n_new: int, device: torch.device) -> Span:
        """The span of T = ``n_new`` positions from ``start`` on, the same for all rows of a cache."""
        return self.with_shared(ContiguousSpan(start, n_new, device), device)

    def with_shared(self, span: SpanT, device: torch.device) -> SpanT:
        """``span`` with what this architecture computes once per call; most need nothing."""
        return span

    def run_blocks(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        caches: Sequence[LayerCache] | None = None,
        span: Span | PackedRows | None = None,
        *,
        last_only: bool = False,
        memory: Memory | None = None,
    ) -> Tensor:
        """``h_start`` [B, T, D] -> ``h_stop`` [B, T, D]; with caches, block ``k`` writes entry ``k - 1`` as ``span`` says.

        ``last_only``: of the last block only the last output is computed, [B, 1, D].  ``memory``: see ``BlockCall``.
        """
        if not 0 <= start <= stop <= self.n_blocks:
            raise ValueError(f"run_blocks({start}, {stop}): want 0 <= start <= stop <= {self.n_blocks}")
        call = self.block_call
        for k in range(start + 1, stop + 1):
            cache = None if caches is None else caches[k - 1]
            hidden = call(self.block(k), hidden, cache, span, last_only and k == stop, memory)
        return hidden

    def forward(
        self,
        pixel_values: Tensor,
        image_index: Tensor,
        input_ids: Tensor,
        exit_layers: Sequence[int],
        *,
        decoder_ids: Tensor | None = None,
        instruction: Instruction | None = None,
        packing: Packing | None = None,
    ) -> BackboneFeatures:
        """One full forward for training: pixels [I, 3, h, w], row -> image [B], ids [B, T], padded on the right.

        With an encoder, ``input_ids`` are what it reads and ``decoder_ids`` [B, N] what the blocks do; features lie on those.
        ``packing``: compute only what the features at its answer positions need.
        A single top-level call, so that a sharded backbone gathers each parameter once.
        """
        prefix = self.encode_prefix(pixel_values, image_index, instruction)
        hidden, memory, span = self.training_start(input_ids, prefix, decoder_ids)
        rows = None if packing is None else self.pack(packing, image_index)
        where = span if rows is None else rows
        hidden = hidden if rows is None else rows.take(hidden)
        taps: list[Tensor] = []
        reached = 0
        for k in exit_layers:
            hidden = self.run_blocks(hidden, reached, k, span=where, memory=memory)
            taps.append(hidden)
            reached = k
        only_answers = rows is not None and rows.at_answers is not None and reached < self.n_blocks
        hidden = self.run_blocks(hidden, reached, self.n_blocks, span=where, memory=memory, last_only=only_answers)
        if rows is not None and not only_answers:
            hidden = hidden.index_select(0, rows.answers)
        return BackboneFeatures(exits=tuple(taps), final=self.final_norm(hidden), memory=memory, span=where)
