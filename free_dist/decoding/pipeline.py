"""Pictures and text in, text out: ``answer`` is ``generate`` for callers who have image files and sentences.

Also tells which part of an answer's text each token stands for.  Does not know exits or policies: whatever else is wanted goes
through to ``generate`` by its own name.

Shape letters: B answers, I images, N generated tokens, Q query tokens, D model width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from free_dist.backbones import Backbone, Instruction
from free_dist.config import DecodingConfig, MissingFileError, UserError
from free_dist.data.samples import SampleEncoder, Turn
from free_dist.decoding.generate import generate
from free_dist.decoding.result import GenerationResult
from free_dist.exits import ExitBank

ImageLike = str | Path | bytes | Image.Image
"""A file, the encoded bytes of one, or an opened picture."""

Prompt = str | Sequence[Turn]
"""The whole text before the answer, or the turns of a dialogue, whose last answer is ignored."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer as text, with the trace of how it came about."""

    text: str
    """Without special tokens and surrounding space."""
    pieces: tuple[str, ...]
    """N parts of ``text``, one per token: joined they are ``text``; empty for special tokens."""
    result: GenerationResult
    """Per token: id, exit, confidence, blocks."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON; lists have one entry per token, and None as an exit is full depth."""
        result = self.result
        return {
            "text": self.text,
            "pieces": list(self.pieces),
            "tokens": result.tokens,
            "exits": result.exit_layers,
            "confidences": result.confidences,
            "blocks": result.blocks_executed,
            "n_blocks": result.n_blocks,
            "mean_backbone_blocks": result.mean_backbone_blocks,
            "exit_calls": result.exit_calls,
            "head_calls": result.head_calls,
            "drafted": result.drafted,
            "accepted": result.accepted,
            "score": result.score,
        }


def answer(
    backbone: Backbone,
    encoder: SampleEncoder,
    bank: ExitBank | None,
    images: ImageLike | Sequence[ImageLike],
    prompts: str | Sequence[Prompt],
    *,
    max_new_tokens: int = DecodingConfig.max_new_tokens,
    **arguments: Any,
) -> list[Answer]:
    """Answer B prompts about B images in one batch; a single image or prompt is meant for all of the others.

    An image that is asked about several times is encoded once.  ``arguments`` are those of
    :func:`~free_dist.decoding.generate.generate`; with a bank, ``thresholds`` must be among them.

    Raises MissingFileError for an image that does not exist, UserError for one that cannot be read or a number of prompts
    that does not fit, and what ``generate`` raises.
    """
    pictures = [images] if isinstance(images, (str, Path, bytes, Image.Image)) else list(images)
    texts: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
    n_answers = max(len(pictures), len(texts))
    if not pictures or not texts or len(pictures) not in (1, n_answers) or len(texts) not in (1, n_answers):
        raise UserError(f"{len(pictures)} images and {len(texts)} prompts: give as many of both, or one of either")
    turns = [[Turn(prompt=text, answer="")] if isinstance(text, str) else text for text in texts]
    prompt_ids = [encoder.encode_prompt(row) for row in turns]
    prefix = encode_images(backbone, encoder, pictures, turns)
    generation = generate(
        backbone,
        bank,
        None,
        prompt_ids * (n_answers // len(prompt_ids)),
        prefix=prefix.expand(n_answers, -1, -1),
        max_new_tokens=max_new_tokens,
        **arguments,
    )
    return [
        Answer(text=encoder.decode(row.tokens), pieces=tuple(token_pieces(encoder, row.tokens)), result=row)
        for row in generation
    ]


class GrowingText(BaseStreamer):
    """A streamer that hands the whole text so far to ``show`` after every final token."""

    def __init__(self, encoder: SampleEncoder, show: Callable[[str], None]) -> None:
        self._encoder = encoder
        self._show = show
        self._tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        """Take new tokens [n]; prompts, which come as [1, T], are not shown."""
        if value.ndim == 1:
            self._tokens += value.tolist()
            self._show(self._encoder.decode(self._tokens))

    def end(self) -> None:
        """The answer is over: what comes next belongs to another one."""
        self._tokens = []


@torch.inference_mode()
def encode_images(
    backbone: Backbone, encoder: SampleEncoder, images: Sequence[ImageLike], turns: Sequence[Sequence[Turn]] = ()
) -> Tensor:
    """I images -> visual prefix [I, Q, D], in the backbone's type and on its device; raises as :func:`answer`.

    Where the Q-Former reads the prompt, a prefix belongs to both: ``turns`` are then the B prompts, and the result [B, Q, D].
    """
    pixels = torch.stack([encoder.encode_image(read_image(image)) for image in images])
    like = next(backbone.parameters())
    instruction = encoder.encode_instructions(turns)
    if instruction is None:
        return backbone.encode_prefix(pixels.to(like))
    n_rows = max(len(images), len(turns))
    image_index = torch.arange(n_rows, device=like.device) % len(images)
    return backbone.encode_prefix(
        pixels.to(like), image_index, Instruction.joined([instruction] * (n_rows // len(turns))).to(like.device)
    )


def read_image(image: ImageLike) -> bytes:
    """An image as encoded bytes that can be decoded; raises MissingFileError or UserError naming the file."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()
    name, content = ("image", image) if isinstance(image, bytes) else (str(image), b"")
    if not isinstance(image, bytes):
        if not Path(image).is_file():
            raise MissingFileError(f"{name}: no such file")
        content = Path(image).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
    except (OSError, SyntaxError) as error:  # Pillow reports some damaged PNG files as a SyntaxError
        raise UserError(f"{name}: not a readable image; give a PNG or JPEG file") from error
    return content


def token_pieces(encoder: SampleEncoder, tokens: Sequence[int]) -> list[str]:
    """N tokens -> the N parts of ``encoder.decode(tokens)`` that they add, joined the whole of it.

    A character that several tokens make up belongs to the last of them.
    """
    text = encoder.decode(tokens)
    raw = str(encoder.tokenizer.decode(tokens, skip_special_tokens=True))
    stripped = len(raw) - len(raw.lstrip())
    pieces, end = [], 0
    for n in range(1, len(tokens) + 1):
        start = end
        said = str(encoder.tokenizer.decode(tokens[:n], skip_special_tokens=True))
        if n == len(tokens):
            end = len(text)
        elif not said.endswith("\ufffd"):  # the mark of a character that is not finished yet
            end = min(max(start, len(said) - stripped), len(text))
        pieces.append(text[start:end])
    return pieces
