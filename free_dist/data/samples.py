"""What becomes of a Record: Sample (one row before tokenisation), then Batch (tensors).

Knows how image and text share one sequence; does not know where records come from or who consumes batches.

A row is laid out as  ``opening, prompt_1, answer_1, eos, prompt_2, answer_2, eos, ...``, the opening being what
``TokenLayout`` says: placeholders of the image, the token that begins a text, a template.  Targets are stored *already
shifted*: ``targets[b, t]`` is the token that position ``t`` must predict, so features, logits and targets of one position
line up without any further shift.  Where an encoder reads the prompt, the last answer stands in a sequence of its own.

Shape letters: B rows, I distinct images, T positions, N decoder positions, S tokens of an instruction.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from free_dist.backbones import Instruction, TokenLayout
from free_dist.config import TASKS, DataConfig, UserError
from free_dist.data.images import decode_image
from free_dist.data.origin import Origin, question_origin, turn_origin
from free_dist.data.prompts import Turn, caption_turn, dialogue_turns, drawn_answer, drawn_caption, question_turn
from free_dist.data.records import Record

IGNORE = -100
"""Target of a position whose prediction is not trained or scored."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row: an image and one or more turns, every answer of which is a target."""

    key: str
    task: str
    image: bytes
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = field(default=())
    """Acceptable texts for the last answer; used by metrics only.  Empty where they are withheld."""
    origin: Origin = field(default_factory=Origin)

    @property
    def record_key(self) -> str:
        """The key of the record that it was made from."""
        return re.sub(r"-[qt]\d+$", "", self.key) if self.task != "caption" else self.key


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
    """[B, T] ([B, N] with ``decoder_ids``), the token that each position must predict, or IGNORE."""
    decoder_ids: Tensor | None = None
    """[B, N], padded on the right: what the decoder reads where an encoder reads ``input_ids``."""
    instruction: Instruction | None = None
    """What a Q-Former that reads text is given."""

    def inputs(self) -> dict[str, Any]:
        """The arguments of ``Backbone.forward`` that come from data."""
        return {
            "pixel_values": self.pixel_values,
            "image_index": self.image_index,
            "input_ids": self.input_ids,
            "decoder_ids": self.decoder_ids,
            "instruction": self.instruction,
        }

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            task=self.task,
            keys=self.keys,
            pixel_values=self.pixel_values.to(device),
            image_index=self.image_index.to(device),
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            decoder_ids=None if self.decoder_ids is None else self.decoder_ids.to(device),
            instruction=None if self.instruction is None else self.instruction.to(device),
        )


def image_numbers(samples: Sequence[Sample]) -> list[int]:
    """Which image each sample is about, the images numbered from 0 as they come; what is said of one hangs together."""
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(sample.image, len(numbers)) for sample in samples]


def training_samples(record: Record, task: str, config: DataConfig, rng: random.Random) -> list[Sample]:
    """The samples that one record gives to one epoch of ``task``; empty if it has nothing for it."""
    if task == "caption":
        caption = drawn_caption(record, config, rng)
        if caption is None:
            return []
        turn = caption_turn(caption, config)
        return [
            Sample(
                key=record.key, task=task, image=record.image, turns=(turn,), references=record.captions or (caption,)
            )
        ]
    if task == "dialogue" and record.dialogue:
        rows = _dialogue_samples(record, config)
        rng.shuffle(rows)
        return rows[: config.questions_per_image]
    questions = [question for question in record.questions if question.given]
    rng.shuffle(questions)
    if task == "vqa":
        return [
            Sample(
                key=f"{record.key}-q{i}",
                task=task,
                image=record.image,
                turns=(question_turn(question, drawn_answer(question, rng), config),),
                references=question.answers,
            )
            for i, question in enumerate(questions[: config.questions_per_image])
        ]
    if task == "dialogue":
        turns = [question_turn(q, drawn_answer(q, rng), config) for q in questions[: config.max_turns]]
        if not turns:
            return []
        return [
            Sample(key=record.key, task=task, image=record.image, turns=tuple(turns), references=(turns[-1].answer,))
        ]
    raise UserError(f"data.tasks: unknown task {task!r}; known: {', '.join(TASKS)}")


def evaluation_samples(record: Record, task: str, config: DataConfig, *, withheld: bool = False) -> list[Sample]:
    """The samples that one record gives to an evaluation of ``task``: every question, in the published order.

    ``withheld``: instead of these, what is published without an answer; the last answer of such a sample is empty, and it has
    no references.
    """
    if task == "vqa":
        wanted = [bool(question.given) if not withheld else not question.answers for question in record.questions]
        return [
            Sample(
                key=f"{record.key}-q{i}",
                turns=(question_turn(question, "" if withheld else question.answer, config),),
                references=question.answers,
                origin=question_origin(record, question),
                task=task,
                image=record.image,
            )
            for i, question in enumerate(record.questions)
            if wanted[i]
        ]
    if task == "caption":
        if bool(record.captions) == withheld:
            return []
        turn = caption_turn("" if withheld else record.captions[0], config)
        return [
            Sample(
                key=record.key,
                task=task,
                image=record.image,
                turns=(turn,),
                references=record.captions,
                origin=Origin(image_id=record.image_id, domain=record.domain),
            )
        ]
    if task == "dialogue" and (record.dialogue or withheld):
        return _dialogue_samples(record, config, withheld=withheld)
    if task == "dialogue":
        questions = [question for question in record.questions if question.given][: config.max_turns]
        if not questions:
            return []
        turns = tuple(question_turn(question, question.answer, config) for question in questions)
        return [
            Sample(
                key=record.key,
                turns=turns,
                references=questions[-1].answers,
                origin=question_origin(record, questions[-1]),
                task=task,
                image=record.image,
            )
        ]
    raise UserError(f"evaluation.tasks: unknown task {task!r}; known: {', '.join(TASKS)}")


def _dialogue_samples(record: Record, config: DataConfig, *, withheld: bool = False) -> list[Sample]:
    """One sample per answered turn of a recorded dialogue: what was said before it is text, not a target."""
    samples = []
    for i, turn in dialogue_turns(record, config, withheld=withheld):
        samples.append(
            Sample(
                key=f"{record.key}-t{i}",
                task="dialogue",
                image=record.image,
                turns=(turn,),
                references=() if withheld else (turn.answer,),
                origin=turn_origin(record, i),
            )
        )
    return samples


class SampleEncoder:
    """Samples -> tensors, for one tokenizer, image processor and token layout.

    Every answer of a sample is a target, unless the prompt passes through an encoder or the Q-Former, which would see the
    later answers: then the last answer alone is, and the earlier ones belong to its prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        layout: TokenLayout,
        max_length: int,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """``qformer_tokenizer``: of a Q-Former that reads the prompt."""
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.layout = layout
        self.max_length = max_length
        self.qformer_tokenizer = qformer_tokenizer
        self.visual_cache: Callable[[bytes], Tensor] | None = None
        """Encoded bytes -> feature map [W, h, w] that the backbone takes in the place of pixels; None: pixels."""
        # Some tokenizers put a space before whatever they encode, others want it written where a text goes on.
        apart = [*self._encoded("a"), *self._encoded("b")]
        self._joint = "" if apart == self._encoded("a b") else " "

    def encode_text(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Turns -> (ids, targets), both of length T; raises UserError when they exceed the backbone's positions.

        With an encoder the ids are what it reads and the targets are the decoder's, N of them.
        """
        ids, last = self.encode_prompt(turns), self._answer(turns[-1])
        self._check_length(len(ids) + len(last))
        if self.layout.decoder_start_token_id is not None:
            return ids, last
        is_answer = [False] * len(ids) + [True] * len(last)
        if self.qformer_tokenizer is None:
            end = len(self.layout.opening)
            for i, turn in enumerate(turns[:-1]):
                start = end + len(self._prompt(turn, first=i == 0))
                end = start + len(self._answer(turn))
                is_answer[start:end] = [True] * (end - start)
        ids += last
        targets = [ids[t + 1] if is_answer[t + 1] else IGNORE for t in range(len(ids) - 1)] + [IGNORE]
        return ids, targets

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids up to where the last turn's answer begins: what ``generate`` starts from."""
        ids = list(self.layout.opening)
        for i, turn in enumerate(turns):
            ids += self._prompt(turn, first=i == 0)
            if i < len(turns) - 1:
                ids += self._answer(turn)
        ids += self.layout.prompt_end
        self._check_length(len(ids))
        return ids

    def encode_answer(self, text: str) -> list[int]:
        """Ids of an answer after a prompt, the token that ends it among them."""
        # A decoder that starts anew begins a text; everywhere else the answer goes on with one.
        joint = self._joint if self.layout.decoder_start_token_id is None else ""
        return [*self._encoded(joint + text), self.layout.eos_token_id]

    def encode_instructions(self, rows: Sequence[Sequence[Turn]]) -> Instruction | None:
        """What the Q-Former reads of B rows of turns: all text before the last answer; None if it reads none.

        Raises UserError when a text exceeds the Q-Former's positions.
        """
        if self.qformer_tokenizer is None:
            return None
        texts = []
        for turns in rows:
            words = [part for turn in turns for part in (self.prompt_text(turn), turn.answer)]
            texts.append(" ".join(words[:-1]))
        encoded = [self.qformer_tokenizer.encode(text) for text in texts]
        width = max(len(ids) for ids in encoded)
        if width > self.qformer_tokenizer.model_max_length:
            raise UserError(
                f"a prompt of {width} tokens exceeds the {self.qformer_tokenizer.model_max_length} that the Q-Former reads: "
                "lower data.max_turns or data.max_history_tokens"
            )
        input_ids = torch.full((len(rows), width), self.qformer_tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for b, ids in enumerate(encoded):
            input_ids[b, : len(ids)] = torch.tensor(ids)
            mask[b, : len(ids)] = True
        return Instruction(input_ids, mask)

    def encode_instruction(self, turns: Sequence[Turn], device: torch.device | str) -> Instruction | None:
        """:meth:`encode_instructions` of one row, on a device."""
        instruction = self.encode_instructions([turns])
        return None if instruction is None else instruction.to(device)

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids -> text, without special tokens and the token that ended it, which need not be a special one."""
        if len(ids) and ids[-1] == self.layout.eos_token_id:
            ids = ids[:-1]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def encode_image(self, image: bytes) -> Tensor:
        """Encoded bytes -> normalised pixels [3, height, width], or the feature map that ``visual_cache`` has of them.

        Raises BadSample for bytes that are no PNG or JPEG.
        """
        if self.visual_cache is not None:
            return self.visual_cache(image)
        pixels = self.image_processor(decode_image(image), return_tensors="np")["pixel_values"][0]
        return torch.from_numpy(np.ascontiguousarray(pixels))

    def collate(self, samples: Sequence[Sample], decoded: Mapping[bytes, Tensor] | None = None) -> Batch:
        """Rows of one task -> Batch, every distinct image decoded once; ``decoded``: :meth:`encode_image` of some of them."""
        if not samples:
            raise ValueError("cannot collate an empty list of samples")
        images: dict[bytes, int] = {}
        image_index = [images.setdefault(sample.image, len(images)) for sample in samples]
        rows = [self.encode_text(sample.turns) for sample in samples]
        targets = [wanted for _, wanted in rows]
        start = self.layout.decoder_start_token_id
        pad = self.layout.pad_token_id
        return Batch(
            task=samples[0].task,
            keys=tuple(sample.key for sample in samples),
            pixel_values=torch.stack([self._pixels(image, decoded or {}) for image in images]),
            image_index=torch.tensor(image_index),
            input_ids=_padded([ids for ids, _ in rows], pad),
            targets=_padded(targets, IGNORE),
            decoder_ids=None if start is None else _padded([[start, *wanted[:-1]] for wanted in targets], pad),
            instruction=self.encode_instructions([sample.turns for sample in samples]),
        )

    def text_tokens(self, batch: Batch) -> Tensor:
        """Tokens of text that the language model reads, scalar: neither padding nor image placeholders."""
        ids = batch.input_ids
        return ((ids != self.layout.pad_token_id) & (ids != self.layout.image_token_id)).sum()

    def prompt_text(self, turn: Turn) -> str:
        """The prompt of a turn with as much of its history before it as the history's budget of tokens allows."""
        history = turn.history
        if history is None:
            return turn.prompt
        bare = len(self._encoded(turn.prompt))
        parts = list(history.parts)
        while parts:
            text = history.template.replace("{history}", " ".join(parts)) + turn.prompt
            if history.max_tokens is None or len(self._encoded(text)) - bare <= history.max_tokens:
                return text
            del parts[1 if history.opens_with_caption and len(parts) > 1 else 0]
        return turn.prompt

    def _pixels(self, image: bytes, decoded: Mapping[bytes, Tensor]) -> Tensor:
        return decoded[image] if image in decoded else self.encode_image(image)

    def _prompt(self, turn: Turn, *, first: bool) -> list[int]:
        text = self.prompt_text(turn)
        return self._encoded(text if first else self._joint + text)

    def _answer(self, turn: Turn) -> list[int]:
        return self.encode_answer(turn.answer)

    def _encoded(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.layout.image_token_id in ids:
            # A text that names the placeholder, as LLaVA's data does, has no further image to put there: it is read as letters.
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise UserError(
                f"a row of {length} tokens exceeds the backbone's {self.max_length} positions: lower data.max_turns or "
                "data.max_history_tokens"
            )


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows of any lengths -> [B, longest], filled on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), filler, dtype=torch.long)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = torch.tensor(row)
    return padded
