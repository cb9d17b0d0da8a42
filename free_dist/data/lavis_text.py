"""Captions and questions in the form in which LAVIS trains on them and BLIP's filter reads them.

LAVIS's text processors ``blip_caption`` and ``blip_question``: lower case, without some punctuation, cut to so many words.
Does not know prompts or tokens.
"""

from __future__ import annotations

PUNCTUATION = '.!"()*#:;~'
"""What is taken out; commas, question marks and apostrophes stay."""

MAX_WORDS = 50
"""Words that are kept."""


def caption_text(text: str) -> str:
    """A caption, where white space takes the place of punctuation."""
    return _cut(text.lower().translate(str.maketrans(PUNCTUATION, " " * len(PUNCTUATION))))


def question_text(text: str) -> str:
    """A question, where nothing does."""
    return _cut(text.lower().translate(str.maketrans("", "", PUNCTUATION)))


def _cut(text: str) -> str:
    return " ".join(text.split()[:MAX_WORDS])
