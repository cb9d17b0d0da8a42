"""``traces.jsonl``: every generated token with the block it left after and the class of its word, for histograms and
examples.

The first line says what made the file, every other line is one answer of one decoder.  The first answers of a task
bring their picture, as a small PNG, so a page can show them without the data.  Word classes are read off English text
by a closed list of function words; a token of a word has the word's class.

Does not know decoding, robustness or pages.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from free_dist.atomic import write_atomically
from free_dist.config import UserError
from free_dist.data.images import decode_image
from free_dist.data.samples import SampleEncoder
from free_dist.evaluation.robustness import TaskAnswers

TRACES = "traces.jsonl"
CLASSES = ("content word", "function word", "punctuation", "end")
_FUNCTION_WORDS = """
    a an the this that these those some any no every each either neither both all
    of in on at by for with about against between into through during before after above below to from up down out off over under
    near behind beside inside outside onto upon across along around toward towards within without
    and or but nor so yet if because as until while than though although
    i me my mine we us our ours you your yours he him his she her hers it its they them their theirs who whom whose which what
    is am are was were be been being do does did has have had having will would shall should can could may might must
    not there here when where why how ca wo sha
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""Articles, determiners, prepositions, conjunctions, pronouns, auxiliaries; see :func:`token_classes` for answers of
one word."""
PICTURED = 6
"""Samples per task whose picture is kept."""
LONGEST_SIDE = 192
"""Pixels of a kept picture's longest side, at most."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One generated token."""

    text: str
    exit: int
    """Block it left after; L at full depth."""
    word: str
    """One of ``CLASSES``."""


@dataclass(frozen=True, kw_only=True)
class TracedAnswer:
    """One answer of one decoder."""

    task: str
    index: int
    """Place of its sample among the task's."""
    key: str
    question: str
    method: str
    threshold: float | None
    text: str
    references: tuple[str, ...]
    tokens: tuple[Token, ...]
    picture: str | None = None
    """PNG in base64."""


@dataclass(frozen=True, kw_only=True)
class Traces:
    """What the file holds."""

    command: str
    n_blocks: int
    """L."""
    answers: tuple[TracedAnswer, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    """Provenance and recipe."""


def traced(clean: Sequence[TaskAnswers], encoder: SampleEncoder) -> list[TracedAnswer]:
    """All answers of all tasks with their words' classes."""
    found = []
    for task in clean:
        for i, arm in enumerate(task.arms):
            for n, (sample, result) in enumerate(zip(task.samples, task.results, strict=True)):
                answer = result.answers[i]
                if answer is None:
                    continue
                pieces = token_texts(answer.tokens, encoder.tokenizer)
                classes = token_classes(pieces, ends=[t == encoder.layout.eos_token_id for t in answer.tokens])
                tokens = zip(pieces, answer.exits, classes, strict=True)
                found.append(
                    TracedAnswer(
                        task=task.task,
                        index=n,
                        key=sample.key,
                        question=encoder.prompt_text(sample.turns[-1]),
                        method=arm.method,
                        threshold=arm.threshold,
                        text=result.texts[i] or "",
                        references=tuple(dict.fromkeys(sample.references)),
                        tokens=tuple(Token(text=text, exit=layer, word=word) for text, layer, word in tokens),
                        picture=small_picture(sample.image) if i == 0 and n < PICTURED else None,
                    )
                )
    return found


def token_texts(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the decoded text, spaces included; a special token is its name."""
    texts = []
    special = set(tokenizer.all_special_ids)
    plain: list[int] = []
    before = ""
    for token in tokens:
        if token in special:
            texts.append(str(tokenizer.convert_ids_to_tokens(token)))
            continue
        plain.append(token)
        text = str(tokenizer.decode(plain, clean_up_tokenization_spaces=False))
        texts.append(text[len(before) :] if text.startswith(before) else str(tokenizer.decode([token])))
        before = text
    return texts


def token_classes(pieces: Sequence[str], *, ends: Sequence[bool]) -> list[str]:
    """The class of the word that each piece belongs to; ``ends`` marks closing tokens.

    A piece without letter or digit is punctuation.  A word that is the whole answer is content, whatever it is.
    """
    words: list[list[int]] = []
    for i, piece in enumerate(pieces):
        if ends[i] or not any(c.isalnum() for c in piece):
            continue
        inner = words and words[-1][-1] == i - 1 and not piece[:1].isspace()
        words[-1].append(i) if inner else words.append([i])
    classes = ["end" if end else "punctuation" for end in ends]
    for places in words:
        word = "".join(pieces[i] for i in places).strip().strip('.,;:!?"()').lower()
        known = word in FUNCTION_WORDS or word.partition("'")[0].removesuffix("n") in FUNCTION_WORDS  # "isn't", "it's"
        name = "function word" if known and len(words) > 1 else "content word"
        for i in places:
            classes[i] = name
    return classes


def small_picture(image: bytes) -> str:
    """A picture of at most ``LONGEST_SIDE`` pixels as PNG in base64; raises BadSample for one that does not decode."""
    picture = decode_image(image)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def write_traces(
    path: Path, answers: Iterable[TracedAnswer], *, n_blocks: int, command: str, extra: dict[str, Any]
) -> Path:
    """Write the file, whole or not at all."""
    head = {"format": 1, "command": command, "n_blocks": n_blocks} | extra
    lines = [json.dumps(head), *(json.dumps(asdict(answer)) for answer in answers)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def read_traces(path: Path) -> Traces:
    """Inverse of :func:`write_traces`; raises UserError naming the line that is none."""
    answers: list[TracedAnswer] = []
    try:
        lines = path.read_text().splitlines()
        head = json.loads(lines[0]) if lines else {}
        if head.pop("format", None) != 1:
            raise ValueError("not of format 1")
        for line in lines[1:]:
            raw = json.loads(line)
            tokens = tuple(Token(**token) for token in raw.pop("tokens"))
            answers.append(TracedAnswer(**raw | {"tokens": tokens, "references": tuple(raw["references"])}))
        return Traces(command=head.pop("command"), n_blocks=head.pop("n_blocks"), answers=tuple(answers), extra=head)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: no traces after {len(answers)} answers ({error}); make it again with launch/robustness.py"
        ) from error


def counts_by(answers: Iterable[TracedAnswer], key: str, *, last: int = 8) -> Counter[str]:
    """Group -> its tokens; ``key`` is ``position`` (1, 2, ..., the last one open) or ``word``."""
    return Counter(group for group, _ in _grouped(answers, key, last))


def shares_by(
    answers: Iterable[TracedAnswer], groups: Sequence[str], key: str, *, last: int = 8
) -> dict[str, dict[int, float]]:
    """Group, as in :func:`counts_by` -> exit -> share of the group's tokens.

    Only ``groups`` that have tokens are returned, in that order.
    """
    answers = list(answers)
    counts, exits = counts_by(answers, key, last=last), Counter(_grouped(answers, key, last))
    return {
        group: {k: n / counts[group] for (own, k), n in sorted(exits.items()) if own == group}
        for group in groups
        if group in counts
    }


def _grouped(answers: Iterable[TracedAnswer], key: str, last: int) -> Iterator[tuple[str, int]]:
    """(group, exit) of every token."""
    for answer in answers:
        for place, token in enumerate(answer.tokens, start=1):
            yield (token.word if key == "word" else position_name(place, last)), token.exit


def position_name(place: int, last: int) -> str:
    """``1``, ``2``, ..., and ``8+`` for all from the last on."""
    return str(place) if place < last else f"{last}+"
