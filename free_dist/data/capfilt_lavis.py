"""LAVIS's own BLIP captioner and filter for ``capfilt``, where salesforce-lavis is installed.

That needs transformers below 4.27, so an environment of its own (``make lavis-env``); nothing here, nor what it imports, needs
transformers 5 or DeepSpeed.  Every image is captioned by itself, because LAVIS samples from torch's one generator.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from free_dist.config import UserError
from free_dist.data.capfilt import CapFiltSettings

PREFIX = "lavis:"
"""Begins the name of a LAVIS model: ``lavis:blip_caption/base_coco``, ``lavis:blip_image_text_matching/base``."""

TOP_K, REPETITION_PENALTY = 50, 1.1
"""What LAVIS's nucleus sampling is bound to."""


class LavisCaptioner:
    """Writes captions by ``BlipCaption.generate``."""

    def __init__(self, name: str, *, device: torch.device | str = "cpu") -> None:
        """``name`` as above; LAVIS downloads what it lacks.  Raises UserError for an unknown one, or without LAVIS."""
        self._model, self._images, _ = _load(name, device)
        self.name = name

    @torch.inference_mode()
    def write(self, images: Sequence[Image.Image], keys: Sequence[str], settings: CapFiltSettings) -> list[list[str]]:
        """See :class:`~free_dist.data.capfilt.Captioner`; raises UserError for settings that LAVIS does not have."""
        fixed = {
            "--top-k": (settings.top_k, TOP_K),
            "--repetition-penalty": (settings.repetition_penalty, REPETITION_PENALTY),
        }
        for flag, (asked, has) in fixed.items():
            if asked != has:
                raise UserError(f"{flag} {asked}: LAVIS samples with {has}; leave the flag out")
        # LAVIS cuts the prompt's characters off, and with them a space that its tokenizer has taken away before.
        self._model.prompt = settings.prompt.strip() + " "
        self._model.prompt_length = len(self._model.tokenizer(self._model.prompt).input_ids) - 1
        written = []
        for image, key in zip(images, keys, strict=True):
            pixels = self._images["eval"](image).unsqueeze(0).to(self._model.device)
            with _seeded(settings.seed, key):
                texts = self._model.generate(
                    {"image": pixels}, use_nucleus_sampling=True, top_p=settings.top_p, num_captions=settings.captions,
                    min_length=settings.min_length, max_length=settings.max_length,
                )  # fmt: skip
            written.append([" ".join(text.split()) for text in texts])
        return written


class LavisFilter:
    """Judges captions by ``BlipITM``."""

    def __init__(self, name: str, *, device: torch.device | str = "cpu") -> None:
        """As the captioner's."""
        self._model, self._images, self._texts = _load(name, device)
        self.name = name

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """See :class:`~free_dist.data.capfilt.Matcher`."""
        scores: list[list[float]] = []
        for image, asked in zip(images, texts, strict=True):
            if not asked:
                scores.append([])
                continue
            pixels = self._images["eval"](image).unsqueeze(0).to(self._model.device).expand(len(asked), -1, -1, -1)
            words = [self._texts["eval"](text) for text in asked]
            logits = self._model({"image": pixels, "text_input": words}, match_head="itm")
            scores.append(torch.softmax(logits.float(), dim=-1)[:, 1].tolist())
        return scores


def _load(name: str, device: torch.device | str) -> tuple[Any, Any, Any]:
    parts = re.fullmatch(re.escape(PREFIX) + r"([^/]+)/([^/]+)", name)
    if parts is None:
        raise UserError(f"{name}: want {PREFIX}MODEL/TYPE, such as {PREFIX}blip_caption/base_coco")
    try:
        from lavis.models import load_model_and_preprocess, model_zoo
    except ImportError as error:
        raise UserError(
            f"{name}: needs salesforce-lavis (make lavis-env, then .venv-lavis/bin/python): {error}"
        ) from error
    model, kind = parts.groups()
    if kind not in model_zoo.model_zoo.get(model, []):
        raise UserError(
            f"{name}: LAVIS has no model {model} of type {kind}; it prints what it has as lavis.models.model_zoo"
        )
    loaded: tuple[Any, Any, Any] = load_model_and_preprocess(model, kind, is_eval=True, device=device)
    return loaded


@contextmanager
def _seeded(seed: int, key: str) -> Iterator[None]:
    """Inside, torch's generators are seeded by an image's key."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
        yield
