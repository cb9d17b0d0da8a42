"""A pretrained backbone together with the encoder of its samples: what every entry point starts from.

Knows which adapter and which files a kind of checkpoint needs; does not know how weights are read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from free_dist.backbones import Blip2Backbone, FeatureLmBackbone, InstructBlipBackbone, TokenLayout
from free_dist.backbones.blip2 import PROBE, load_image_processor, load_tokenizer
from free_dist.backbones.embedded import resolve_backbone
from free_dist.backbones.loading import MODEL_CLASSES, check_vocabulary, load_model, read_config
from free_dist.config import BackboneConfig, MissingFileError, UserError
from free_dist.data.samples import SampleEncoder

ADAPTERS = {adapter.model_type: adapter for adapter in (Blip2Backbone, InstructBlipBackbone, FeatureLmBackbone)}
"""``model_type`` in config.json -> adapter."""

QFORMER_TOKENIZER = "qformer_tokenizer"
"""Directory, below a checkpoint's, of the tokenizer whose ids an InstructBLIP Q-Former reads."""


def load_pretrained(
    path: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str = "sdpa",
    allow_pickle: bool = False,
    sharding: AbstractContextManager[None] | None = None,
) -> tuple[Blip2Backbone, SampleEncoder]:
    """``backbone.path`` -> the frozen backbone, in ``dtype``, and the encoder with its tokenizers and image processor.

    The other arguments are those of :func:`free_dist.backbones.loading.load_model`.  Raises MissingFileError or UserError for
    a directory that is not a usable checkpoint.
    """
    directory = resolve_backbone(path)
    model = load_model(
        directory, dtype=dtype, attn_implementation=attn_implementation, allow_pickle=allow_pickle, sharding=sharding
    )
    backbone = ADAPTERS[model.config.model_type](model)
    return backbone, _encoder(directory, backbone)


def load_encoder(path: str) -> SampleEncoder:
    """The encoder of :func:`load_pretrained` alone: reads no weights, so it is as quick for a backbone of any size.

    Raises MissingFileError or UserError for a directory without configuration, tokenizers or image processor that load.
    """
    directory = resolve_backbone(path)
    name = read_config(directory).get("model_type")
    if name not in MODEL_CLASSES:
        raise UserError(
            f"backbone.path: {directory}/config.json has model_type {name!r}, want one of {', '.join(ADAPTERS)}"
        )
    model_class = MODEL_CLASSES[name]
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_pretrained(directory))
    return _encoder(directory, ADAPTERS[name](model))


def _encoder(directory: str | Path, backbone: Blip2Backbone) -> SampleEncoder:
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, backbone.model, directory)
    backbone.layout = text_layout(backbone.layout, tokenizer, read_config(directory))
    return SampleEncoder(
        tokenizer,
        load_image_processor(directory),
        backbone.layout,
        backbone.max_positions,
        _qformer_tokenizer(directory, backbone) if isinstance(backbone, InstructBlipBackbone) else None,
    )


def load_for_inference(
    config: BackboneConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32
) -> tuple[Blip2Backbone, SampleEncoder]:
    """What a recipe's ``backbone`` section names, on ``device`` and in ``dtype``, as :func:`load_pretrained` gives it.

    Raises what that raises, and UserError for a device that is not there, or that cannot run the section's attention.
    """
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: want cpu, cuda, or one of several such as cuda:1") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} GPUs here")
    if config.attn_implementation == "flash_attention_2" and place.type != "cuda":
        raise UserError(
            f"backbone.attn_implementation=flash_attention_2 needs a GPU, --device is {device}: give --device cuda and --dtype "
            "bfloat16, or set backbone.attn_implementation=sdpa"
        )
    backbone, encoder = load_pretrained(
        config.path, dtype=dtype, attn_implementation=config.attn_implementation, allow_pickle=config.allow_pickle
    )
    return backbone.to(place), encoder


def text_layout(layout: TokenLayout, tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> TokenLayout:
    """``layout`` with what a checkpoint's tokenizer and ``config`` (its config.json) say about the ends of a text.

    A tokenizer that puts tokens around a text is right about them, whatever config.json says: Vicuna in InstructBLIP opens
    texts with ``</s>``.  ``image_opening`` and ``image_closing`` in config.json are text around the image (MiniGPT-4).
    """
    text, whole = tokenizer.encode(PROBE, add_special_tokens=False), tokenizer.encode(PROBE)
    if len(whole) > len(text):
        start = next(n for n in range(len(whole)) if whole[n : n + len(text)] == text)
        before, after = whole[:start], whole[start + len(text) :]
    else:
        before = [] if layout.bos_token_id is None else [layout.bos_token_id]
        after = list(layout.prompt_end)
    opening = [layout.image_token_id] * layout.num_query_tokens + before
    if config.get("image_opening") or config.get("image_closing"):
        image = [layout.image_token_id] * layout.num_query_tokens
        around = [str(config.get(name) or "") for name in ("image_opening", "image_closing")]
        first, last = (tokenizer.encode(part, add_special_tokens=False) for part in around)
        opening = before + first + image + last
    return replace(
        layout,
        opening=tuple(opening),
        # A prompt that the answer continues must not be ended.
        prompt_end=() if layout.decoder_start_token_id is None else tuple(after),
    )


def _qformer_tokenizer(directory: str | Path, backbone: Blip2Backbone) -> PreTrainedTokenizerBase:
    path = Path(directory) / QFORMER_TOKENIZER
    if not path.is_dir():
        raise MissingFileError(
            f"backbone.path: {path} does not exist: an InstructBLIP checkpoint needs the tokenizer of its Q-Former there, "
            "as InstructBlipProcessor.save_pretrained writes it"
        )
    tokenizer = load_tokenizer(path)
    # Tokenizers are saved without a limit as often as not; what the Q-Former has positions for is the real one.
    limit = backbone.model.config.qformer_config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer
