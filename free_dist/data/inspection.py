"""Records as a backbone sees them: prompts, targets, and which tokens are targets, ready to be shown.

Knows records, samples and the encoder's ids; does not know terminals, pages or pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from free_dist.config import DataConfig, UserError
from free_dist.data.records import Record
from free_dist.data.samples import IGNORE, Sample, SampleEncoder, Turn, evaluation_samples

WORD_STARTS = ("\u0120", "\u2581")
"""How byte-level and SentencePiece tokenizers write the space before a word."""


@dataclass(frozen=True)
class ShownToken:
    """A token as text, or a run of image placeholders."""

    text: str
    is_target: bool = False
    """Whether the model is trained to predict it."""
    is_image: bool = False


@dataclass(frozen=True, kw_only=True)
class ShownSequence:
    """What one part of a model reads or says."""

    reader: str
    """``language model``, or ``encoder`` and ``decoder``, and ``q-former`` where that reads text."""
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """One row of a task."""

    key: str
    task: str
    turns: tuple[Turn, ...]
    references: tuple[str, ...]
    sequences: tuple[ShownSequence, ...]
    """Empty without an encoder, or where the row is too long."""
    problem: str | None = None
    """Why there are no tokens."""


@dataclass(frozen=True, kw_only=True)
class ShownRecord:
    """One image and the rows that it gives."""

    split: str
    record: Record
    samples: tuple[ShownSample, ...]


def show_record(
    split: str,
    record: Record,
    tasks: Sequence[str],
    config: DataConfig,
    encoder: SampleEncoder | None,
    *,
    samples_per_task: int = 2,
) -> ShownRecord:
    """The first rows of every task that a record has something for, as an evaluation asks them."""
    samples = (
        _shown(sample, encoder)
        for task in tasks
        for sample in evaluation_samples(record, task, config)[:samples_per_task]
    )
    return ShownRecord(split=split, record=record, samples=tuple(samples))


def _shown(sample: Sample, encoder: SampleEncoder | None) -> ShownSample:
    sequences: tuple[ShownSequence, ...] = ()
    problem = None
    if encoder is not None:
        try:
            sequences = tuple(_sequences(sample, encoder))
        except UserError as error:
            problem = str(error)
    return ShownSample(
        key=sample.key,
        task=sample.task,
        turns=sample.turns,
        references=sample.references,
        sequences=sequences,
        problem=problem,
    )


def _sequences(sample: Sample, encoder: SampleEncoder) -> Iterator[ShownSequence]:
    ids, targets = encoder.encode_text(sample.turns)
    instruction = encoder.encode_instructions([sample.turns])
    if instruction is not None and encoder.qformer_tokenizer is not None:
        text = encoder.qformer_tokenizer.decode(instruction.input_ids[0].tolist())
        yield ShownSequence(reader="q-former", tokens=(ShownToken(text),))
    if encoder.layout.decoder_start_token_id is None:
        # The token that position t must predict stands at t + 1.
        is_target = [False, *(target != IGNORE for target in targets[:-1])]
        yield ShownSequence(reader="language model", tokens=_tokens(ids, is_target, encoder))
    else:
        yield ShownSequence(reader="encoder", tokens=_tokens(ids, [False] * len(ids), encoder))
        kept = [target for target in targets if target != IGNORE]
        yield ShownSequence(reader="decoder", tokens=_tokens(kept, [True] * len(kept), encoder))


def _tokens(ids: Sequence[int], is_target: Sequence[bool], encoder: SampleEncoder) -> tuple[ShownToken, ...]:
    image = encoder.layout.image_token_id
    shown: list[ShownToken] = []
    for is_image, run in groupby(zip(ids, is_target, strict=True), key=lambda pair: pair[0] == image):
        tokens = list(run)
        if is_image:
            shown.append(ShownToken(f"<image> x {len(tokens)}", is_image=True))
        else:
            shown += [ShownToken(_text(token, encoder), wanted) for token, wanted in tokens]
    return tuple(shown)


def _text(token: int, encoder: SampleEncoder) -> str:
    """A token by itself, with the space that belongs to it."""
    piece = encoder.tokenizer.convert_ids_to_tokens(token)
    text = str(encoder.tokenizer.decode([token])) or str(piece)
    starts_word = str(piece).startswith(WORD_STARTS)
    return f" {text.lstrip(' ')}" if starts_word else text
