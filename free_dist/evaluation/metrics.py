"""Text metrics: VQA soft accuracy (own code, both normalisation modes), CIDEr-D and BLEU (pycocoevalcap's scorers).

Works on strings alone: knows no model, task or data set.  Captions are tokenised by :func:`ptb_like_tokens`, a
pure-Python stand-in for the Java PTB tokenizer of the COCO caption code; scores are therefore labelled ``ptb-like`` and
agree with the Java ones on plain English captions only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from free_dist.config import UserError

CAPTION_TOKENIZER = "ptb-like"
"""Label of the tokenisation behind caption scores, stored with them."""

_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
# Only forms that lose their apostrophe without becoming another word: "its", "were" or "well" are not among them.
_CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's i'm i've isn't
    it'd it'll ma'am might've mightn't must've mustn't needn't oughtn't shan't she's should've shouldn't somebody's
    someone's something's that'll that's there'd there's they'd they'll they're they've wasn't we've weren't what'll
    what's when's where'd where's who'd who'll who's who've why's won't would've wouldn't y'all you'd you'll you're
    you've
"""
_CONTRACTIONS = {form.replace("'", ""): form for form in _CONTRACTED.split()}
_PUNCTUATION = tuple(';/[]"{}()=+\\_-<>@`,?!')
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD_NOT_DECIMAL = re.compile(r"\.(?!\d)")

_PTB_DROPPED = frozenset(
    ["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";", "(", ")", "[", "]", "{", "}"]
)
_PTB_TOKEN = re.compile(r"\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-./]\w+)*|\.\.\.|--|[^\w\s]")


class MissingPackageError(UserError, ModuleNotFoundError):
    """A package of an optional extra is not installed; the message says what to install."""


def normalise_answer(text: str) -> str:
    """An answer as the VQA evaluation compares it: lower case, without articles and punctuation, numbers as digits.

    A punctuation mark beside a space (or anywhere in a text with a thousands separator) vanishes, any other becomes a
    space; periods vanish unless a digit follows.  Written after the rules published with VQA v2.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # Judged on the text as it came, so that removing one mark does not change the fate of the next.
    original = text
    has_number_comma = _COMMA_IN_NUMBER.search(original) is not None
    for mark in _PUNCTUATION:
        vanishes = f"{mark} " in original or f" {mark}" in original or has_number_comma
        text = text.replace(mark, "" if vanishes else " ")
    text = _PERIOD_NOT_DECIMAL.sub("", text)
    words = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str], *, normalise: str = "official") -> float:
    """Soft accuracy in 0..1 of one prediction against its human answers (VQA v2, eq. of the evaluation page).

    With several answers: the mean, over every set that leaves one answer out, of ``min(1, matches / 3)``.  With a
    single answer: 1 if equal, else 0.  ``normalise``: ``official`` normalises both sides only where the answers disagree, as
    the published evaluation code does; ``always`` normalises every time.  Raises ValueError on another mode or without
    answers.
    """
    if normalise not in ("official", "always"):
        raise ValueError(f"normalise={normalise!r}: want official or always")
    if not answers:
        raise ValueError("VQA accuracy needs at least one answer")
    prediction, wanted = prediction.strip(), [answer.strip() for answer in answers]
    if normalise == "always" or len(set(wanted)) > 1:
        prediction, wanted = normalise_answer(prediction), [normalise_answer(answer) for answer in wanted]
    if len(wanted) == 1:
        return float(prediction == wanted[0])
    matches = [answer == prediction for answer in wanted]
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3) for own in matches) / len(wanted)


def ptb_like_tokens(caption: str) -> str:
    """A caption in lower case, split in Penn-Treebank manner ("don't" -> "do n't"), without punctuation, space-joined."""
    tokens = _PTB_TOKEN.findall(caption.lower())
    return " ".join(token for token in tokens if token not in _PTB_DROPPED)


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al. 2015); the corpus score is their mean, 1.0 being "100".

    Document frequencies come from ``references``, so a score holds for one set of images only; a single image scores 0.
    Raises MissingPackageError naming the extra when pycocoevalcap is missing.
    """
    _check_pairs(captions, references)
    try:
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise _missing_package() from error
    _, scores = Cider().compute_score(*_tokenised(captions, references))
    return [float(score) for score in scores]


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 (Papineni et al. 2002, closest reference length), each in 0..1.

    Raises MissingPackageError naming the extra when pycocoevalcap is missing.
    """
    _check_pairs(captions, references)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
    except ModuleNotFoundError as error:
        raise _missing_package() from error
    scores, _ = Bleu(4).compute_score(*_tokenised(captions, references), verbose=0)
    return [float(score) for score in scores]


def _tokenised(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    wanted = {i: [ptb_like_tokens(text) for text in texts] for i, texts in enumerate(references)}
    return wanted, {i: [ptb_like_tokens(caption)] for i, caption in enumerate(captions)}


def _check_pairs(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(captions) != len(references) or not captions:
        raise ValueError(
            f"{len(captions)} captions against {len(references)} lists of references: want equal and above 0"
        )
    empty = [i for i, texts in enumerate(references) if not texts]
    if empty:
        raise ValueError(f"caption {empty[0]} has no reference")


def _missing_package() -> MissingPackageError:
    return MissingPackageError('caption metrics need pycocoevalcap: pip install "free_dist[eval]"')
