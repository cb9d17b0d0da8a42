"""BLIP-2 on transformers' own classes: a vision tower and a Q-Former before an OPT, LLaMA or T5 language model.

Knows the vision half and how a prefix enters a prompt; the language half is an adapter's (:mod:`free_dist.backbones.decoders`).
The embedded backbone and published checkpoints pass through here alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    InstructBlipConfig,
    PreTrainedTokenizerBase,
)

from free_dist.backbones import vision_path
from free_dist.backbones.base import Backbone, BlockCall, Instruction, SpanT, Start, TokenLayout
from free_dist.backbones.decoders import TextDecoder, text_decoder
from free_dist.backbones.loading import load_model
from free_dist.backbones.span import LayerCache, Memory, Span
from free_dist.config import MissingFileError, UserError

PROBE = "a"
"""A text that shows what a tokenizer puts around every text, and that it knows any."""


class Blip2Backbone(Backbone):
    """Adapter over ``Blip2ForConditionalGeneration`` whose language model is OPT (pre-norm), LLaMA or T5."""

    model_type = "blip-2"
    """What config.json calls the models that this adapter is for."""

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        text = model.config.text_config
        decoder = text_decoder(model.language_model)
        self.model = model
        self.n_blocks = len(decoder.blocks)
        self.hidden_size = text.hidden_size
        self.vocab_size = text.vocab_size
        self.max_positions = decoder.max_positions
        self.layout = _layout(model.config, decoder)
        self._decoder = decoder
        self._has_lean_vision = vision_path.supports_vision(model)
        self._has_lean_qformer = vision_path.supports_qformer(model)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load a Hugging Face directory with all weights frozen, in ``dtype`` and evaluation mode; raises as ``load_model``."""
        model = load_model(directory, dtype=dtype)
        if model.config.model_type != cls.model_type:
            raise UserError(
                f"backbone.path: {directory}/config.json has model_type {model.config.model_type!r}, {cls.__name__} is for "
                f"{cls.model_type!r}; free_dist.data.pretrained.load_pretrained takes either"
            )
        return cls(model)

    def encode_prefix(
        self, pixel_values: Tensor, image_index: Tensor | None = None, instruction: Instruction | None = None
    ) -> Tensor:
        if instruction is not None:
            raise ValueError("instruction: the Q-Former of BLIP-2 reads no text; leave it out")
        prefix = self.prefix_from_patches(self.encode_patches(pixel_values))
        return prefix if image_index is None else prefix[image_index]

    def encode_patches(self, pixel_values: Tensor) -> Tensor:
        """The first half of :meth:`encode_prefix`: pixels [I, 3, height, width] -> vision features [I, patches + 1, width].

        Features made before, [I, patches + 1, width] in any precision, pass through in the tower's own: three dimensions are
        never an image's four.  Raises ValueError for any other shape.
        """
        vision = self.model.vision_model
        if pixel_values.dim() == 3:
            width = self.model.config.vision_config.hidden_size
            if pixel_values.shape[-1] != width:
                raise ValueError(
                    f"pixel_values: want vision features [I, patches + 1, {width}], got {list(pixel_values.shape)}"
                )
            return pixel_values.to(next(vision.parameters()).dtype)
        if pixel_values.dim() != 4:
            raise ValueError(
                f"pixel_values: want pixels [I, 3, height, width] or vision features [I, patches + 1, width], got "
                f"{list(pixel_values.shape)}"
            )
        if self._has_lean_vision and _runs_bare(vision):
            return vision_path.encode_patches(vision, pixel_values)
        return vision(pixel_values=pixel_values).last_hidden_state

    def prefix_from_patches(self, patches: Tensor) -> Tensor:
        """The second half of :meth:`encode_prefix`: vision features [I, patches + 1, width] -> visual prefix [I, Q, D]."""
        model = self.model
        if self._has_lean_qformer and _runs_bare(model.qformer):
            queries = vision_path.run_qformer(model.qformer, model.query_tokens, patches)
        else:
            queries = model.query_tokens.expand(patches.shape[0], -1, -1)
            queries = model.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
        return model.language_projection(queries.to(patches.dtype))

    def embed(self, input_ids: Tensor, prefix: Tensor | None = None, past_length: int | Tensor = 0) -> Tensor:
        return self._decoder.add_positions(self._embed(input_ids, prefix), past_length)

    def _embed(self, input_ids: Tensor, prefix: Tensor | None) -> Tensor:
        if prefix is None:
            return self._decoder.embed_tokens(input_ids)
        is_image = input_ids == self.layout.image_token_id
        # A placeholder need not be a token: older checkpoints have none for it.
        embedded = self._decoder.embed_tokens(input_ids.masked_fill(is_image, self.layout.pad_token_id))
        return embedded.masked_scatter(is_image.unsqueeze(-1).expand_as(embedded), prefix.to(embedded.dtype))

    def training_start(
        self, input_ids: Tensor, prefix: Tensor, decoder_ids: Tensor | None
    ) -> tuple[Tensor, Memory | None, Span | None]:
        is_text = input_ids != self.layout.pad_token_id
        return self._decoder.training_start(self.embed(input_ids, prefix), is_text, decoder_ids)

    def start(self, prompts: Sequence[Sequence[int]], prefix: Tensor) -> Start:
        return self._decoder.start(super().start(prompts, prefix))

    def block(self, k: int) -> nn.Module:
        if not 1 <= k <= self.n_blocks:
            raise ValueError(f"block {k}: blocks are numbered 1 to {self.n_blocks}")
        return self._decoder.blocks[k - 1]

    @property
    def can_pack(self) -> bool:
        return self._decoder.can_pack

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


def _runs_bare(module: nn.Module) -> bool:
    # Whoever hooks a module, as a sharding engine does to gather its weights, needs it to be called.
    return not (torch.is_grad_enabled() or module.training or module._forward_pre_hooks or module._forward_hooks)


def _layout(config: Blip2Config | InstructBlipConfig, decoder: TextDecoder) -> TokenLayout:
    """How this checkpoint's images and texts share a sequence."""
    # Checkpoints from before image placeholders put the prefix before the text, which is where placeholders stand now.
    image = config.image_token_id
    if image is None:
        image = config.text_config.vocab_size
    bos = () if decoder.bos_token_id is None else (decoder.bos_token_id,)
    has_encoder = decoder.start_token_id is not None
    return TokenLayout(
        image_token_id=image,
        num_query_tokens=config.num_query_tokens,
        bos_token_id=decoder.bos_token_id,
        eos_token_id=decoder.eos_token_id,
        pad_token_id=decoder.pad_token_id,
        opening=(*[image] * config.num_query_tokens, *bos),
        prompt_end=(decoder.eos_token_id,) if has_encoder else (),
        decoder_start_token_id=decoder.start_token_id,
    )


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer stored with a backbone, or below it; raises MissingFileError where there is none."""
    advice = (
        "copy tokenizer.json, tokenizer_config.json and what else its tokenizer has from where the checkpoint came from"
    )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MissingFileError(
            f"backbone.path: {directory} has no tokenizer that loads ({reason}); {advice}"
        ) from error
    # Without its files, a tokenizer is made all the same and knows no word.
    if not tokenizer.encode(PROBE, add_special_tokens=False):
        raise MissingFileError(f"backbone.path: {directory} has no tokenizer files, or empty ones; {advice}")
    return tokenizer


def load_image_processor(directory: str | Path) -> BlipImageProcessorPil:
    """The image processor stored with a backbone (PIL; needs no torchvision); raises MissingFileError where there is none."""
    try:
        return BlipImageProcessorPil.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise MissingFileError(
            f"backbone.path: {directory} has no image processor that loads: copy preprocessor_config.json or "
            "processor_config.json from where the checkpoint came from"
        ) from error
