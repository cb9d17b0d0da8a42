"""BLIP-2 on transformers' own classes: a vision tower and a Q-Former before an OPT, LLaMA or T5 language model.

Knows the vision half and how a prefix enters a prompt; the language half is an adapter's (:mod:`free_dist.backbones.decoders`).
The embedded backbone and published checkpoints pass through here alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, BlipImageProcessorPil, PreTrainedTokenizerBase

from free_dist.backbones import vision_path
from free_dist.backbones.base import Backbone, BlockCall, SpanT, Start, TokenLayout
from free_dist.backbones.decoders import text_decoder
from free_dist.backbones.span import LayerCache, Memory
from free_dist.config import MissingFileError, UserError


class Blip2Backbone(Backbone):
    """Adapter over ``Blip2ForConditionalGeneration`` whose language model is OPT (pre-norm), LLaMA or T5."""

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        if model.config.image_token_id is None:
            raise UserError(
                "this BLIP-2 checkpoint has no image_token_index in config.json: it predates image placeholders"
            )
        text = model.config.text_config
        decoder = text_decoder(model.language_model)
        self.model = model
        self.n_blocks = len(decoder.blocks)
        self.hidden_size = text.hidden_size
        self.vocab_size = text.vocab_size
        self.max_positions = decoder.max_positions
        self.layout = TokenLayout(
            image_token_id=model.config.image_token_id,
            num_query_tokens=model.config.num_query_tokens,
            bos_token_id=decoder.bos_token_id,
            eos_token_id=decoder.eos_token_id,
            pad_token_id=decoder.pad_token_id,
        )
        self._decoder = decoder
        self._has_lean_vision = vision_path.supports(model)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Blip2Backbone:
        """Load a Hugging Face directory with all weights frozen, in ``dtype`` and evaluation mode."""
        if not (Path(directory) / "config.json").is_file():
            raise MissingFileError(
                f"backbone.path: {directory} has no config.json; give a Hugging Face BLIP-2 directory"
            )
        model = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=dtype, local_files_only=True)
        return cls(model.eval().requires_grad_(False))

    def encode_prefix(self, pixel_values: Tensor) -> Tensor:
        vision = self.model.vision_model
        if self._uses_lean_vision():
            return self.prefix_from_patches(vision_path.encode_patches(vision, pixel_values))
        return self.prefix_from_patches(vision(pixel_values=pixel_values).last_hidden_state)

    def prefix_from_patches(self, patches: Tensor) -> Tensor:
        """The second half of :meth:`encode_prefix`: vision features [I, patches + 1, width] -> visual prefix [I, Q, D]."""
        model = self.model
        if self._uses_lean_vision():
            queries = vision_path.run_qformer(model.qformer, model.query_tokens, patches)
        else:
            queries = model.query_tokens.expand(patches.shape[0], -1, -1)
            queries = model.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
        return model.language_projection(queries.to(patches.dtype))

    def _uses_lean_vision(self) -> bool:
        # Whoever hooks the modules, as a sharding engine does to gather their weights, needs them to be called.
        model = self.model
        return (
            self._has_lean_vision
            and not torch.is_grad_enabled()
            and not any(
                half.training or half._forward_pre_hooks or half._forward_hooks
                for half in (model.vision_model, model.qformer)
            )
        )

    def embed(self, input_ids: Tensor, prefix: Tensor | None = None, past_length: int | Tensor = 0) -> Tensor:
        embedded = self._decoder.embed_tokens(input_ids)
        if prefix is not None:
            is_image = (input_ids == self.layout.image_token_id).unsqueeze(-1).expand_as(embedded)
            embedded = embedded.masked_scatter(is_image, prefix.to(embedded.dtype))
        return self._decoder.add_positions(embedded, past_length)

    def start(self, prompts: Sequence[Sequence[int]], prefix: Tensor) -> Start:
        return self._decoder.start(super().start(prompts, prefix))

    def block(self, k: int) -> nn.Module:
        if not 1 <= k <= self.n_blocks:
            raise ValueError(f"block {k}: blocks are numbered 1 to {self.n_blocks}")
        return self._decoder.blocks[k - 1]

    @property
    def block_call(self) -> BlockCall:
        return self._decoder.block_call

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self._decoder.final_norm(hidden)

    def lm_head(self, features: Tensor) -> Tensor:
        return self._decoder.lm_head(features)

    def shared_modules(self) -> tuple[nn.Module, nn.Module]:
        return self._decoder.final_norm, self._decoder.lm_head

    def with_shared(self, span: SpanT, device: torch.device) -> SpanT:
        return self._decoder.with_shared(span, device)

    def new_layer_cache(self, batch_size: int, capacity: int, memory: Memory | None = None) -> LayerCache:
        weight = self._decoder.embed_tokens.weight
        assert isinstance(weight, Tensor)
        return LayerCache(
            batch_size=batch_size,
            n_heads=self._decoder.n_cached_heads,
            head_dim=self._decoder.head_dim,
            capacity=capacity,
            dtype=weight.dtype,
            device=weight.device,
            memory=memory,
        )


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer stored with a backbone."""
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def load_image_processor(directory: str | Path) -> BlipImageProcessorPil:
    """The image processor stored with a backbone (PIL; needs no torchvision)."""
    return BlipImageProcessorPil.from_pretrained(directory, local_files_only=True)
