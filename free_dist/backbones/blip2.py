"""BLIP-2 with a decoder-only OPT language model, on transformers' own classes.

Knows transformers' module names and numbering; the embedded backbone and published checkpoints pass through here alike.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, BlipImageProcessorPil, PreTrainedTokenizerBase
from transformers.models.opt.modeling_opt import OPTDecoder

from free_dist.backbones.base import Backbone, BlockCall, LayerCache, TokenLayout, causal_mask
from free_dist.backbones.opt_block import opt_block
from free_dist.config import MissingFileError, UserError


def call_opt_block(block: nn.Module, hidden: Tensor, cache: LayerCache | None) -> Tensor:
    """Run one ``OPTDecoderLayer``: [B, T, D] -> [B, T, D], causal.

    Decoding (a cache, no gradient, no dropout) takes the lean path, which fires no module hooks.
    """
    if cache is not None and not torch.is_grad_enabled() and not block.training:
        return opt_block(block, hidden, cache)
    n_past = 0 if cache is None else cache.length
    mask = causal_mask(hidden.shape[1], n_past, hidden.device)
    return block(hidden, attention_mask=mask, past_key_values=cache)


class Blip2Backbone(Backbone):
    """Adapter over ``Blip2ForConditionalGeneration`` whose language model is OPT (pre-norm)."""

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        text = model.config.text_config
        if text.model_type != "opt" or not text.do_layer_norm_before:
            raise UserError(
                f"Blip2Backbone runs a pre-norm OPT language model, this checkpoint has {text.model_type!r}"
            )
        if model.config.image_token_id is None:
            raise UserError(
                "this BLIP-2 checkpoint has no image_token_index in config.json: it predates image placeholders"
            )
        self.model = model
        self.n_blocks = text.num_hidden_layers
        self.hidden_size = text.hidden_size
        self.vocab_size = text.vocab_size
        self.max_positions = text.max_position_embeddings
        self.layout = TokenLayout(
            image_token_id=model.config.image_token_id,
            num_query_tokens=model.config.num_query_tokens,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
        )
        self._n_heads = text.num_attention_heads
        # Looking a block up through five modules takes as long as a tenth of running it at batch 1.  A list is not
        # registered, so the blocks still belong to the model alone.
        self._blocks = list(self._decoder.layers)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Blip2Backbone:
        """Load a Hugging Face directory with all weights frozen, in ``dtype`` and evaluation mode."""
        if not (Path(directory) / "config.json").is_file():
            raise MissingFileError(
                f"backbone.path: {directory} has no config.json; give a Hugging Face BLIP-2 directory"
            )
        model = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=dtype, local_files_only=True)
        return cls(model.eval().requires_grad_(False))

    @property
    def _decoder(self) -> OPTDecoder:
        decoder = self.model.language_model.model.decoder
        assert isinstance(decoder, OPTDecoder)
        return decoder

    def encode_prefix(self, pixel_values: Tensor) -> Tensor:
        return self.prefix_from_patches(self.model.vision_model(pixel_values=pixel_values).last_hidden_state)

    def prefix_from_patches(self, patches: Tensor) -> Tensor:
        """The second half of :meth:`encode_prefix`: vision features [I, patches + 1, width] -> visual prefix [I, Q, D]."""
        queries = self.model.query_tokens.expand(patches.shape[0], -1, -1)
        queries = self.model.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
        return self.model.language_projection(queries.to(patches.dtype))

    def embed(self, input_ids: Tensor, prefix: Tensor | None = None, past_length: int = 0) -> Tensor:
        decoder = self._decoder
        embedded = decoder.embed_tokens(input_ids)
        if prefix is not None:
            is_image = (input_ids == self.layout.image_token_id).unsqueeze(-1).expand_as(embedded)
            embedded = embedded.masked_scatter(is_image, prefix.to(embedded.dtype))
        positions = torch.arange(past_length, past_length + input_ids.shape[1], device=input_ids.device)
        return embedded + decoder.embed_positions(None, position_ids=positions[None])

    def block(self, k: int) -> nn.Module:
        if not 1 <= k <= self.n_blocks:
            raise ValueError(f"block {k}: blocks are numbered 1 to {self.n_blocks}")
        return self._blocks[k - 1]

    @property
    def block_call(self) -> BlockCall:
        return call_opt_block

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self._decoder.final_layer_norm(hidden)

    def lm_head(self, features: Tensor) -> Tensor:
        return self.model.language_model.lm_head(features)

    def shared_modules(self) -> tuple[nn.Module, nn.Module]:
        return self._decoder.final_layer_norm, self.model.language_model.lm_head

    def new_layer_cache(self, batch_size: int, capacity: int) -> LayerCache:
        weight = self._decoder.embed_positions.weight
        return LayerCache(
            batch_size=batch_size,
            n_heads=self._n_heads,
            head_dim=self.hidden_size // self._n_heads,
            capacity=capacity,
            dtype=weight.dtype,
            device=weight.device,
        )


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer stored with a backbone."""
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def load_image_processor(directory: str | Path) -> BlipImageProcessorPil:
    """The image processor stored with a backbone (PIL; needs no torchvision)."""
    return BlipImageProcessorPil.from_pretrained(directory, local_files_only=True)
