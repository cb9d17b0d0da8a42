"""The only record formats of the project: Record (in a shard), Sample (one row before tokenisation), Batch (tensors).

Knows how image and text share one sequence; does not know where records come from or who consumes batches.

A row is laid out as  ``<image> * Q, bos, prompt_1, answer_1, eos, prompt_2, answer_2, eos, ...``.  Targets are stored
*already shifted*: ``targets[b, t]`` is the token that position ``t`` must predict, so features, logits and targets of one
position line up without any further shift.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from free_dist.backbones import TokenLayout
from free_dist.config import TASKS, DataConfig, UserError

IGNORE = -100
"""Target of a position whose prediction is not trained or scored."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image and everything said about it, as stored in a shard."""

    key: str
    """Unique within the data set."""
    image: bytes
    """Encoded as published (PNG or JPEG)."""
    questions: tuple[tuple[str, str], ...] = ()
    """(question, answer) pairs, in the published order."""
    captions: tuple[str, ...] = ()
    """Reference captions."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A prompt and the answer expected to follow it."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row: an image and one or more turns, every answer of which is a target."""

    key: str
    task: str
    image: bytes
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = field(default=())
    """Acceptable texts for the last answer; used by metrics only."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tensors of one micro-batch; images shared by several rows appear once."""

    task: str
    keys: tuple[str, ...]
    pixel_values: Tensor
    """[I, 3, height, width], normalised."""
    image_index: Tensor
    """[B], row -> image."""
    input_ids: Tensor
    """[B, T], padded on the right."""
    targets: Tensor
    """[B, T], the token that each position must predict, or IGNORE."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            task=self.task,
            keys=self.keys,
            pixel_values=self.pixel_values.to(device),
            image_index=self.image_index.to(device),
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
        )


def training_samples(record: Record, task: str, config: DataConfig, rng: random.Random) -> list[Sample]:
    """The samples that one record gives to one epoch of ``task``; empty if it has nothing for it."""
    if task == "caption":
        if not record.captions:
            return []
        turn = Turn(prompt=config.caption_prompt, answer=rng.choice(record.captions))
        return [Sample(key=record.key, task=task, image=record.image, turns=(turn,), references=record.captions)]
    turns = [_question_turn(question, answer, config) for question, answer in record.questions]
    rng.shuffle(turns)
    if task == "vqa":
        return [
            Sample(key=f"{record.key}-q{i}", task=task, image=record.image, turns=(turn,), references=(turn.answer,))
            for i, turn in enumerate(turns[: config.questions_per_image])
        ]
    if task == "dialogue":
        turns = turns[: config.max_turns]
        if not turns:
            return []
        return [
            Sample(key=record.key, task=task, image=record.image, turns=tuple(turns), references=(turns[-1].answer,))
        ]
    raise UserError(f"data.tasks: unknown task {task!r}; known: {', '.join(TASKS)}")


def evaluation_samples(record: Record, task: str, config: DataConfig) -> list[Sample]:
    """The samples that one record gives to an evaluation of ``task``: every question, in the published order."""
    if task == "vqa":
        return [
            Sample(
                key=f"{record.key}-q{i}",
                task=task,
                image=record.image,
                turns=(_question_turn(question, answer, config),),
                references=(answer,),
            )
            for i, (question, answer) in enumerate(record.questions)
        ]
    if task == "caption":
        if not record.captions:
            return []
        turn = Turn(prompt=config.caption_prompt, answer=record.captions[0])
        return [Sample(key=record.key, task=task, image=record.image, turns=(turn,), references=record.captions)]
    if task == "dialogue":
        turns = tuple(_question_turn(q, a, config) for q, a in record.questions[: config.max_turns])
        if not turns:
            return []
        return [Sample(key=record.key, task=task, image=record.image, turns=turns, references=(turns[-1].answer,))]
    raise UserError(f"evaluation.tasks: unknown task {task!r}; known: {', '.join(TASKS)}")


def _question_turn(question: str, answer: str, config: DataConfig) -> Turn:
    return Turn(prompt=config.question_prompt.format(question=question), answer=answer)


class SampleEncoder:
    """Samples -> tensors, for one tokenizer, image processor and token layout."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        layout: TokenLayout,
        max_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.layout = layout
        self.max_length = max_length

    def encode_text(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Turns -> (ids, targets), both of length T; raises UserError when they exceed the backbone's positions."""
        ids = self._opening()
        is_answer = [False] * len(ids)
        for i, turn in enumerate(turns):
            prompt = self._ids(turn.prompt, first=i == 0)
            answer = [*self._ids(turn.answer, first=False), self.layout.eos_token_id]
            ids += prompt + answer
            is_answer += [False] * len(prompt) + [True] * len(answer)
        self._check_length(len(ids))
        targets = [ids[t + 1] if is_answer[t + 1] else IGNORE for t in range(len(ids) - 1)] + [IGNORE]
        return ids, targets

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids up to where the last turn's answer begins: what ``generate`` starts from."""
        ids = self._opening()
        for i, turn in enumerate(turns):
            ids += self._ids(turn.prompt, first=i == 0)
            if i < len(turns) - 1:
                ids += [*self._ids(turn.answer, first=False), self.layout.eos_token_id]
        self._check_length(len(ids))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids -> text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def encode_image(self, image: bytes) -> Tensor:
        """Encoded bytes -> normalised pixels [3, height, width]."""
        with Image.open(io.BytesIO(image)) as opened:
            pixels = self.image_processor(opened.convert("RGB"), return_tensors="np")["pixel_values"][0]
        return torch.from_numpy(np.ascontiguousarray(pixels))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Rows of one task -> Batch, every distinct image decoded once."""
        if not samples:
            raise ValueError("cannot collate an empty list of samples")
        images: dict[bytes, int] = {}
        image_index = [images.setdefault(sample.image, len(images)) for sample in samples]
        rows = [self.encode_text(sample.turns) for sample in samples]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), width), self.layout.pad_token_id, dtype=torch.long)
        targets = torch.full((len(rows), width), IGNORE, dtype=torch.long)
        for b, (ids, wanted) in enumerate(rows):
            input_ids[b, : len(ids)] = torch.tensor(ids)
            targets[b, : len(ids)] = torch.tensor(wanted)
        return Batch(
            task=samples[0].task,
            keys=tuple(sample.key for sample in samples),
            pixel_values=torch.stack([self.encode_image(image) for image in images]),
            image_index=torch.tensor(image_index),
            input_ids=input_ids,
            targets=targets,
        )

    def _opening(self) -> list[int]:
        return [self.layout.image_token_id] * self.layout.num_query_tokens + [self.layout.bos_token_id]

    def _ids(self, text: str, *, first: bool) -> list[int]:
        # Words carry their leading space in byte-level BPE; only the very first text of a row has none.
        return self.tokenizer.encode(text if first else " " + text, add_special_tokens=False)

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise UserError(
                f"a row of {length} tokens exceeds the backbone's {self.max_length} positions: lower data.max_turns"
            )
