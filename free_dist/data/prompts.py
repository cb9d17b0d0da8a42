"""What a recipe makes of a record's texts: prompts, the answers that follow them, and what was said before.

The default templates are LAVIS's for the embedded backbone's tasks; a recipe states its backbone's.  Does not know images or
tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from free_dist.config import DataConfig
from free_dist.data.lavis_text import caption_text, question_text
from free_dist.data.records import Question, Record


@dataclass(frozen=True, kw_only=True)
class History:
    """What was said before a question, as text that goes in front of its prompt."""

    parts: tuple[str, ...]
    """The oldest first."""
    template: str
    """``{history}`` in it is replaced by the parts, with spaces between them."""
    opens_with_caption: bool
    """Whether the first part is a caption, which stays longest when the history is cut."""
    max_tokens: int | None
    """Tokens that it may add to the prompt; None for no limit."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A prompt and the answer expected to follow it."""

    prompt: str
    answer: str
    history: History | None = None
    """Cut to its budget where the tokenizer is known; :meth:`SampleEncoder.prompt_text` is the whole prompt."""


def caption_turn(caption: str, config: DataConfig) -> Turn:
    """The caption prompt and a caption."""
    return Turn(prompt=config.caption_prompt, answer=_cleaned_caption(caption, config))


def question_turn(question: Question, answer: str, config: DataConfig) -> Turn:
    """A question by itself and one of its answers."""
    return Turn(prompt=_question_prompt(question.question, config), answer=answer)


def dialogue_turns(record: Record, config: DataConfig, *, withheld: bool = False) -> list[tuple[int, Turn]]:
    """Every answered turn of a recorded dialogue, with its number and what was said before: the caption, then earlier turns.

    ``max_turns`` bounds the turns of a history and its question together.  ``withheld``: instead of these, the turns whose
    answers are not published, with an empty answer.
    """
    opening = tuple(_cleaned_caption(caption, config) for caption in record.captions[:1])
    said: list[str] = []
    turns = []
    for i, turn in enumerate(record.dialogue):
        if turn.answer is None and not withheld:
            continue
        history = History(
            parts=opening + tuple(said[max(0, len(said) - config.max_turns + 1) :]),
            template=config.history_prompt,
            opens_with_caption=bool(opening),
            max_tokens=config.max_history_tokens,
        )
        if (turn.answer is None) == withheld:
            prompt = _question_prompt(turn.question, config)
            turns.append((i, Turn(prompt=prompt, answer=turn.answer or "", history=history)))
        if turn.answer is None:
            continue
        question = _cleaned_question(turn.question, config)
        said.append(config.history_turn.format(question=question, answer=turn.answer))
    return turns


def drawn_answer(question: Question, rng: random.Random) -> str:
    """Each person's answer is as likely as any other's, which weighs answers as often as they were given."""
    return question.given[0] if len(question.given) == 1 else rng.choice(question.given)


def drawn_caption(record: Record, config: DataConfig, rng: random.Random) -> str | None:
    """A human or a synthetic caption, by the recipe's share; None where there is none of the wanted kind."""
    share = config.synthetic_share
    human = record.captions if share < 1 else ()
    synthetic = tuple(caption.text for caption in record.synthetic_captions) if share > 0 else ()
    # Drawn only where there is a choice: without synthetic captions, the numbers that follow are what they always were.
    if human and synthetic:
        human, synthetic = ((), synthetic) if rng.random() < share else (human, ())
    captions = human or synthetic
    return rng.choice(captions) if captions else None


def _question_prompt(question: str, config: DataConfig) -> str:
    return config.question_prompt.format(question=_cleaned_question(question, config))


def _cleaned_question(text: str, config: DataConfig) -> str:
    return question_text(text) if config.clean_text else text


def _cleaned_caption(text: str, config: DataConfig) -> str:
    return caption_text(text) if config.clean_text else text
