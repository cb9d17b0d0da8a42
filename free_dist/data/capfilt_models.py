"""BLIP's captioner and image-text-matching filter, from Hugging Face directories, for ``capfilt``.

``BlipForConditionalGeneration`` and ``BlipForImageTextRetrieval`` of transformers, prompted and sampled as BLIP does.  Does
not know shards or records.

Shape letters: I images, R rows (texts), T positions, V vocabulary, P image patches, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from free_dist.backbones.blip2 import load_image_processor, load_tokenizer
from free_dist.backbones.checkpoint_files import open_checkpoint
from free_dist.backbones.checkpoint_hash import checkpoint_hash
from free_dist.backbones.loading import parse_dtype, read_config
from free_dist.config import UserError
from free_dist.data.capfilt import CapFiltSettings
from free_dist.data.lavis_text import caption_text

FILTER_TOKENS = 35
"""Longest text that BLIP's filter was trained to read; more is cut off."""


class SeededNucleus(LogitsProcessor):
    """Makes the likeliest token of greedy decoding a draw from the nucleus, row by row from generators of its own.

    Gumbel-max: the place of the largest of ``log p_i + g_i``, with independent standard Gumbel ``g_i``, is distributed as
    ``p``.  So a row's tokens depend on its generator alone, and rows of several images share one call.
    """

    def __init__(self, generators: Sequence[torch.Generator], *, top_p: float, top_k: int) -> None:
        """``generators``: one per row, on the CPU; the same numbers whatever the device."""
        self._generators = generators
        self._warpers = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
        self._warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Logits [R, V] of the next token -> the same outside the nucleus -inf, inside with noise."""
        noise = [
            torch.empty(scores.shape[-1]).exponential_(generator=generator).log() for generator in self._generators
        ]
        return self._warpers(input_ids, scores) - torch.stack(noise).to(scores.device)


def row_generator(seed: int, key: str, number: int) -> torch.Generator:
    """The random numbers of caption ``number`` of the image ``key``."""
    digest = hashlib.sha256(f"{seed}/{key}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


class BlipCaptioner:
    """Writes captions by nucleus sampling."""

    def __init__(self, directory: str | Path, *, device: torch.device | str = "cpu", dtype: str = "float32") -> None:
        """A Hugging Face directory of a ``BlipForConditionalGeneration``; raises MissingFileError or UserError."""
        self._model = _load(BlipForConditionalGeneration, directory, dtype).to(device)
        self._tokenizer, self._processor = load_tokenizer(directory), load_image_processor(directory)
        self.name = checkpoint_hash(directory)

    @torch.inference_mode()
    def write(self, images: Sequence[Image.Image], keys: Sequence[str], settings: CapFiltSettings) -> list[list[str]]:
        """``settings.captions`` texts for every image; see :class:`~free_dist.data.capfilt.Captioner`."""
        if not images:
            return []
        model, config = self._model, self._model.config.text_config
        patches = model.vision_model(_pixels(self._processor, images, model)).last_hidden_state  # [I, P, D]
        patches = patches.repeat_interleave(settings.captions, dim=0)  # [R, P, D]
        # BLIP opens texts with its own token in the place of [CLS], and a prompt has no end.
        opening = self._tokenizer.encode(settings.prompt, add_special_tokens=False)
        prompt = torch.tensor([[config.bos_token_id, *opening]] * len(patches), device=patches.device)
        generators = [row_generator(settings.seed, key, n) for key in keys for n in range(settings.captions)]
        tokens = model.text_decoder.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            max_length=settings.max_length,
            min_length=settings.min_length,
            repetition_penalty=settings.repetition_penalty,
            do_sample=False,
            num_beams=1,
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
            logits_processor=LogitsProcessorList(
                [SeededNucleus(generators, top_p=settings.top_p, top_k=settings.top_k)]
            ),
        )
        texts = [self._text(row) for row in tokens[:, prompt.shape[1] :].tolist()]
        return [texts[i : i + settings.captions] for i in range(0, len(texts), settings.captions)]

    def _text(self, tokens: list[int]) -> str:
        # [DEC] and [ENC], BLIP's own, have rows in the model but no name in the tokenizer.
        known = [token for token in tokens if token < len(self._tokenizer)]
        return " ".join(str(self._tokenizer.decode(known, skip_special_tokens=True)).split())


class BlipFilter:
    """Judges captions by the image-text-matching head."""

    def __init__(
        self, directory: str | Path, *, device: torch.device | str = "cpu", dtype: str = "float32", rows: int = 64
    ) -> None:
        """A directory of a ``BlipForImageTextRetrieval``; ``rows``: texts judged at once.  Raises as BlipCaptioner."""
        self._model = _load(BlipForImageTextRetrieval, directory, dtype).to(device)
        self._tokenizer, self._processor = load_tokenizer(directory), load_image_processor(directory)
        self._rows = rows
        self.name = checkpoint_hash(directory)

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Softmax of the matching head, for every text of every image; see :class:`~free_dist.data.capfilt.Matcher`."""
        owners = [i for i, of_image in enumerate(texts) for _ in of_image]
        if not owners:
            return [[] for _ in texts]
        patches = self._model.vision_model(_pixels(self._processor, images, self._model)).last_hidden_state
        flat = [caption_text(text) for text in chain(*texts)]
        scores: list[float] = []
        for first in range(0, len(flat), self._rows):
            part = slice(first, first + self._rows)
            scores += self._match(patches[owners[part]], flat[part]).tolist()
        following = iter(scores)
        return [[next(following) for _ in of_image] for of_image in texts]

    def _match(self, patches: Tensor, texts: list[str]) -> Tensor:
        """[R, P, D] and R texts -> [R] probabilities."""
        read = self._tokenizer(
            texts, padding="longest", truncation=True, max_length=FILTER_TOKENS, return_tensors="pt"
        ).to(patches.device)
        ids = read.input_ids.clone()
        # [ENC], which follows the token that begins captions, is what the head was trained to read a match from.
        ids[:, 0] = self._model.config.text_config.bos_token_id + 1
        # Not the model's own forward, which sees the image anew for every text and keeps a mask on the CPU.
        states = self._model.text_encoder(
            input_ids=ids,
            attention_mask=read.attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
        ).last_hidden_state
        return torch.softmax(self._model.itm_head(states[:, 0]).float(), dim=-1)[:, 1]


def _pixels(processor: Any, images: Sequence[Image.Image], model: PreTrainedModel) -> Tensor:
    pixels: Tensor = processor(list(images), return_tensors="pt")["pixel_values"]
    return pixels.to(model.device, model.dtype)


def _load(model_class: type[PreTrainedModel], directory: str | Path, dtype: str) -> Any:
    """The model of a directory, for inference; every weight must come from its files."""
    config = read_config(directory)
    if config.get("model_type") != "blip":
        raise UserError(
            f"{directory}/config.json has model_type {config.get('model_type')!r}; CapFilt wants a BLIP model"
        )
    open_checkpoint(directory)  # whole, and no pickle
    model, found = model_class.from_pretrained(
        directory, dtype=parse_dtype(dtype), local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} weights of {model_class.__name__}, such as {missing[0]}: the captioner is a BLIP "
            "for captioning, the filter one for image-text retrieval"
        )
    return model.eval().requires_grad_(False)
