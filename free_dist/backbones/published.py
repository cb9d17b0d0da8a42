"""The published backbones by name: transformers' own configurations with the published hyperparameters, and meta models.

For counting and planning: nothing here has weights, reads a file or needs memory.  Does not know exits, and promises no
token ids of a checkpoint beyond those named here: what is run is read from the checkpoint's own directory.

Sources.  Vision: EVA-ViT-g as in BLIP-2 (arXiv 2301.12597, section 3.3) without its last block: 39 x 1408, patches of 14 at
224 pixels; the Q-Former is BERT-base with 32 queries and cross-attention in every second block (section 3.1).  OPT: arXiv
2205.01068, table 1; 50,272 rows as released, 50,304 in today's BLIP-2 checkpoints (padded after the image token joined).
FlanT5: T5 v1.1's shapes (github google-research/text-to-text-transfer-transformer, released_checkpoints.md), 32,128 rows.
Vicuna and LLaMA-2: LLaMA's shapes (arXiv 2302.13971, table 2; 2307.09288), 32,000 rows, and one more for ``[PAD]`` in
InstructBLIP and in Vicuna v0, which MiniGPT-4 builds on.  InstructBLIP: arXiv 2305.06500; its Q-Former reads text with one
more token, [DEC].
SmolLM2-135M: its config.json (arXiv 2502.02737).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from free_dist.backbones.embedded import new_model
from free_dist.config import EMBEDDED_BACKBONE, UserError, nearest

_VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
_QFORMER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
}
_OPT_IMAGE_TOKEN = 50265
_T5_IMAGE_TOKEN = 32100


def _opt(width: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=50304,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        # BLIP-2 ends an answer with a line break.
        eos_token_id=50118,
    )


def _flan_t5(width: int, inner: int, n_heads: int) -> T5Config:
    return T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        d_ff=inner,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=n_heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )


def _llama(width: int, inner: int, n_blocks: int, n_heads: int, *, vocab_size: int, context: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=n_blocks,
        num_attention_heads=n_heads,
        max_position_embeddings=context,
        pad_token_id=32000 if vocab_size == 32001 else None,
    )


def _vicuna_7b() -> LlamaConfig:
    return _llama(4096, 11008, 32, 32, vocab_size=32001, context=2048)


def _vicuna_13b() -> LlamaConfig:
    return _llama(5120, 13824, 40, 40, vocab_size=32001, context=2048)


def _smollm2() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )


def _blip2(text: PreTrainedConfig, image_token: int | None = None, n_queries: int = 32) -> Blip2Config:
    return Blip2Config(
        vision_config=Blip2VisionConfig(**_VISION),
        qformer_config=Blip2QFormerConfig(**_QFORMER),
        text_config=text,
        num_query_tokens=n_queries,
        image_token_index=image_token,
    )


def _instructblip(text: PreTrainedConfig, image_token: int | None = None) -> InstructBlipConfig:
    return InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**_VISION),
        qformer_config=InstructBlipQFormerConfig(**_QFORMER, vocab_size=30523),
        text_config=text,
        num_query_tokens=32,
        image_token_index=image_token,
    )


def _embedded() -> Blip2Config:
    with torch.device("meta"):
        return new_model().config


_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "blip2-opt-2.7b": lambda: _blip2(_opt(2560), _OPT_IMAGE_TOKEN),
    "blip2-opt-6.7b": lambda: _blip2(_opt(4096), _OPT_IMAGE_TOKEN),
    "blip2-flan-t5-xl": lambda: _blip2(_flan_t5(2048, 5120, 32), _T5_IMAGE_TOKEN),
    "blip2-flan-t5-xxl": lambda: _blip2(_flan_t5(4096, 10240, 64), _T5_IMAGE_TOKEN),
    "instructblip-vicuna-7b": lambda: _instructblip(_vicuna_7b()),
    "instructblip-vicuna-13b": lambda: _instructblip(_vicuna_13b()),
    "instructblip-flan-t5-xl": lambda: _instructblip(_flan_t5(2048, 5120, 32), _T5_IMAGE_TOKEN),
    "instructblip-flan-t5-xxl": lambda: _instructblip(_flan_t5(4096, 10240, 64), _T5_IMAGE_TOKEN),
    "minigpt4-vicuna-7b": lambda: _blip2(_vicuna_7b()),
    "minigpt4-vicuna-13b": lambda: _blip2(_vicuna_13b()),
    "minigpt4-llama2-7b": lambda: _blip2(_llama(4096, 11008, 32, 32, vocab_size=32000, context=4096), n_queries=64),
    "smollm2-135m": _smollm2,
    EMBEDDED_BACKBONE: _embedded,
}

PUBLISHED_BACKBONES: tuple[str, ...] = tuple(_CONFIGS)
"""Names that :func:`published_config` and :func:`meta_model` know."""


def published_config(name: str) -> PreTrainedConfig:
    """A configuration of one's own to change; raises UserError for a name that is not in ``PUBLISHED_BACKBONES``.

    ``minigpt4-llama2-7b`` stands here with a Q-Former, but its release has none: it joins four neighbouring patches to one
    of 64 image positions (minigpt4_llama2.yaml, ``has_qformer: False``), so only the language half and the 64 are its own.
    Of ``smollm2-135m`` this is the language model alone, a ``LlamaConfig``: features from elsewhere stand before it.
    """
    if name not in _CONFIGS:
        raise UserError(
            f"backbone {name!r}: want one of {', '.join(_CONFIGS)}; did you mean {nearest(name, _CONFIGS)!r}?"
        )
    return _CONFIGS[name]()


def meta_model(name: str, *, n_blocks: int | None = None) -> PreTrainedModel:
    """The whole model on the meta device, without storage; with ``n_blocks``, its language model that shallow."""
    config = published_config(name)
    text = _text(config)
    if n_blocks is not None:
        _shorten(text, n_blocks)
    model_class = AutoModelForCausalLM if text is config else AutoModelForImageTextToText
    with torch.device("meta"):
        model = model_class.from_config(config)
        _untie(model if text is config else model.language_model)
        return model


def meta_language_model(name: str, *, n_blocks: int | None = None) -> PreTrainedModel:
    """The language half of :func:`meta_model` alone, in milliseconds for one block."""
    text = _text(published_config(name))
    if n_blocks is not None:
        _shorten(text, n_blocks)
    with torch.device("meta"):
        if isinstance(text, T5Config):
            return _untie(T5ForConditionalGeneration(text))
        return AutoModelForCausalLM.from_config(text)


def _untie(language_model: PreTrainedModel) -> PreTrainedModel:
    # transformers 5 ties the head of every T5 to the embeddings; the released FlanT5 has a head of its own.
    if isinstance(language_model, T5ForConditionalGeneration):
        language_model.lm_head.weight = nn.Parameter(torch.empty_like(language_model.lm_head.weight))
    return language_model


def n_language_blocks(name: str) -> int:
    """Blocks that exits can follow, L; with an encoder, the decoder's."""
    text = _text(published_config(name))
    return text.num_decoder_layers if isinstance(text, T5Config) else text.num_hidden_layers


def _text(config: PreTrainedConfig) -> PreTrainedConfig:
    return config if isinstance(config, LlamaConfig) else config.text_config


def _shorten(text: PreTrainedConfig, n_blocks: int) -> None:
    if isinstance(text, T5Config):
        text.num_layers = text.num_decoder_layers = n_blocks
    else:
        text.num_hidden_layers = n_blocks
