"""The language half of a vision-language model, one small adapter per type: OPT, LLaMA (and so Vicuna), T5.

An adapter knows transformers' module names of one language model and what its blocks need besides hidden states: learned
positions, rotary angles, a position bias, an encoder.  Adapters are plain objects that refer to the modules: parameters stay
registered in the model alone.  Does not know images, exits or tokens' meaning.

Shape letters: B rows, T positions, S encoder positions, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, OPTForCausalLM, PreTrainedModel, T5ForConditionalGeneration

from free_dist.backbones.base import BlockCall, SpanT, Start
from free_dist.backbones.llama_block import LlamaBlockCall, RotaryAngles
from free_dist.backbones.opt_block import call_opt_block
from free_dist.backbones.span import ContiguousSpan, Memory, Span
from free_dist.backbones.t5_block import PositionBias, call_t5_block
from free_dist.config import UserError

UNLIMITED_POSITIONS = 1 << 20
"""``max_positions`` of a language model with relative positions, which sets no limit of its own."""


@dataclass(kw_only=True, eq=False)
class TextDecoder:
    """Blocks of a language model and what stands before and after them; as it is, for blocks that need nothing else."""

    embed_tokens: nn.Module
    """[B, T] ids -> [B, T, D]."""
    blocks: list[nn.Module]
    """The decoder's, in order.  Looking one up through five modules takes as long as a tenth of running it at batch 1."""
    block_call: BlockCall
    final_norm: nn.Module
    lm_head: nn.Module
    """One linear map on what ``final_norm`` returns."""
    n_cached_heads: int
    """Heads of keys and values."""
    head_dim: int
    max_positions: int
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int
    start_token_id: int | None = None
    """With an encoder: what opens the decoder's sequence."""
    can_pack: bool = False
    """Whether ``block_call`` runs on packed rows."""

    def add_positions(self, embedded: Tensor, past_length: int | Tensor) -> Tensor:
        """Embedded tokens [B, T, D] after ``past_length`` others (one number, or one per row [B]) -> ``h_0`` [B, T, D]."""
        return embedded

    def with_shared(self, span: SpanT, device: torch.device) -> SpanT:
        """``span`` with what the blocks share in one call."""
        return span

    def start(self, prompt: Start) -> Start:
        """Embedded prompts -> what the blocks read first."""
        return prompt

    def training_start(
        self, embedded: Tensor, is_text: Tensor, decoder_ids: Tensor | None
    ) -> tuple[Tensor, Memory | None, Span | None]:
        """Embedded rows [B, T, D], ``is_text`` [B, T] false where they are padding -> see ``Backbone.training_start``."""
        if decoder_ids is not None:
            raise ValueError("decoder_ids: this backbone has no encoder, its answers continue the prompt")
        return embedded, None, None


@dataclass(kw_only=True, eq=False)
class OptDecoder(TextDecoder):
    """Pre-norm OPT: learned positions, added before the first block."""

    embed_positions: nn.Module

    def add_positions(self, embedded: Tensor, past_length: int | Tensor) -> Tensor:
        positions = torch.arange(embedded.shape[1], device=embedded.device)[None]
        positions = positions + (past_length[:, None] if isinstance(past_length, Tensor) else past_length)
        return embedded + self.embed_positions(None, position_ids=positions)


@dataclass(kw_only=True, eq=False)
class LlamaDecoder(TextDecoder):
    """LLaMA: rotary positions inside the blocks."""

    angles: RotaryAngles
    groups: int
    """Query heads per head of keys and values."""

    def with_shared(self, span: SpanT, device: torch.device) -> SpanT:
        like = self.embed_tokens.weight
        assert isinstance(like, Tensor)
        span.shared = self.angles.shared(span, like, self.groups)
        return span


@dataclass(kw_only=True, eq=False)
class T5Decoder(TextDecoder):
    """T5: prompts go through an encoder once; the decoder starts with one token and looks at what the encoder read."""

    encoder: nn.Module
    bias: PositionBias
    start_token_id: int

    def with_shared(self, span: SpanT, device: torch.device) -> SpanT:
        span.shared = self.bias(span, span.positions(device))
        return span

    def start(self, prompt: Start) -> Start:
        hidden, lengths = prompt.hidden, prompt.lengths
        n_rows, longest, _ = hidden.shape
        mask = None
        if min(lengths) < longest:
            mask = torch.arange(longest, device=hidden.device) < torch.tensor(lengths, device=hidden.device)[:, None]
        first = torch.full((n_rows, 1), self.start_token_id, device=hidden.device)
        return Start(self.embed_tokens(first), [1] * n_rows, self._read(hidden, mask), self.start_token_id)

    def training_start(
        self, embedded: Tensor, is_text: Tensor, decoder_ids: Tensor | None
    ) -> tuple[Tensor, Memory | None, Span | None]:
        if decoder_ids is None:
            raise ValueError("decoder_ids: this backbone has an encoder, so the decoder needs ids of its own")
        span = ContiguousSpan(0, decoder_ids.shape[1], decoder_ids.device)
        return (
            self.embed_tokens(decoder_ids),
            self._read(embedded, is_text),
            self.with_shared(span, decoder_ids.device),
        )

    def _read(self, embedded: Tensor, mask: Tensor | None) -> Memory:
        """Run the encoder on [B, S, D]; ``mask`` [B, S] is false where a row is padding."""
        states = self.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return Memory(states, None if mask is None else mask[:, None, None])


class ScaledNorm(nn.Module):
    """A norm and a constant factor.

    The first T5 scales what its head reads, because the head is the embedding matrix.  The factor belongs to the norm here,
    so that the head is one matrix for everything that reads rows of it.
    """

    def __init__(self, norm: nn.Module, factor: float) -> None:
        super().__init__()
        self.norm = norm
        self.factor = factor

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.norm(hidden) * self.factor


def text_decoder(model: PreTrainedModel) -> TextDecoder:
    """The adapter of a language model; raises UserError for one that the blocks here do not compute."""
    if isinstance(model, OPTForCausalLM):
        return _opt(model)
    if isinstance(model, LlamaForCausalLM):
        return _llama(model)
    if isinstance(model, T5ForConditionalGeneration):
        return _t5(model)
    raise UserError(
        f"backbone.path: the language model is {model.config.model_type!r}; want pre-norm OPT, LLaMA (Vicuna) or T5"
    )


def _opt(model: OPTForCausalLM) -> OptDecoder:
    config, decoder = model.config, model.model.decoder
    if not config.do_layer_norm_before or decoder.final_layer_norm is None or decoder.project_in is not None:
        raise UserError(
            "backbone.path: the language model is 'opt', but not pre-norm OPT with a final norm and equal widths of "
            "embeddings and blocks; OPT-350m is the one published size that is not"
        )
    _check_causal(model)
    return OptDecoder(
        embed_tokens=decoder.embed_tokens,
        embed_positions=decoder.embed_positions,
        blocks=list(decoder.layers),
        block_call=call_opt_block,
        can_pack=True,
        final_norm=decoder.final_layer_norm,
        lm_head=model.lm_head,
        n_cached_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        max_positions=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=_one_eos(config.eos_token_id),
        pad_token_id=config.pad_token_id,
    )


def _llama(model: LlamaForCausalLM) -> LlamaDecoder:
    config, decoder = model.config, model.model
    _check_causal(model)
    eos_token_id = _one_eos(config.eos_token_id)
    angles = RotaryAngles(config)
    return LlamaDecoder(
        embed_tokens=decoder.embed_tokens,
        blocks=list(decoder.layers),
        block_call=LlamaBlockCall(angles),
        can_pack=True,
        final_norm=decoder.norm,
        lm_head=model.lm_head,
        angles=angles,
        groups=config.num_attention_heads // config.num_key_value_heads,
        n_cached_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_positions=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=eos_token_id,
        # LLaMA was trained without padding.  Rows are padded on the right, where nothing attends to it.
        pad_token_id=eos_token_id if config.pad_token_id in (None, -1) else config.pad_token_id,
    )


def _t5(model: T5ForConditionalGeneration) -> T5Decoder:
    config, decoder = model.config, model.decoder
    if decoder.embed_tokens.weight.dtype == torch.float16:
        raise UserError("backbone.path: T5 overflows in float16; load it in bfloat16 or float32")
    defaults = model.generation_config
    start_token_id = defaults.decoder_start_token_id
    if start_token_id is None:
        raise UserError(
            "backbone.path: the T5 language model has no decoder_start_token_id in config.json; usually it is 0"
        )
    factor = config.d_model**-0.5
    return T5Decoder(
        embed_tokens=decoder.embed_tokens,
        encoder=model.encoder,
        blocks=list(decoder.block),
        block_call=call_t5_block,
        bias=PositionBias(decoder.block[0].layer[0].SelfAttention),
        final_norm=ScaledNorm(decoder.final_layer_norm, factor)
        if config.scale_decoder_outputs
        else decoder.final_layer_norm,
        lm_head=model.lm_head,
        n_cached_heads=config.num_heads,
        head_dim=config.d_kv,
        max_positions=UNLIMITED_POSITIONS,
        bos_token_id=None,
        eos_token_id=_one_eos(config.eos_token_id),
        pad_token_id=config.pad_token_id,
        start_token_id=start_token_id,
    )


def _one_eos(eos_token_id: int | list[int]) -> int:
    if not isinstance(eos_token_id, int):
        raise UserError(
            f"backbone.path: eos_token_id={eos_token_id} in the language model's config.json; name the one that ends an answer"
        )
    return eos_token_id


def _check_causal(model: PreTrainedModel) -> None:
    # Training runs the library's own blocks without a mask: its eager attention would then see the future.
    if model.config._attn_implementation == "eager":
        raise UserError("attn_implementation='eager' is not causal without a mask: load the backbone with 'sdpa'")
