"""Text metrics: VQA soft accuracy (own code, both normalisation modes); CIDEr-D, BLEU, ROUGE-L (pycocoevalcap's scorers).

Works on strings alone: knows no model, task, data set or Java.  Captions are tokenised by whatever function is given; the
default is :func:`ptb_like_tokens`, a pure-Python stand-in for the Java PTB tokenizer of the COCO caption code, which agrees
with it on plain English captions only.  So a tokenisation's name belongs beside every caption score.

The package's ``Cider`` computes CIDEr-D (clipped counts, a Gaussian penalty on lengths, times ten), which the COCO caption
code and most papers print as "CIDEr".  It is called CIDEr-D here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

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
# The forms of the published table; one that lacks exactly one of its apostrophes is given it back.
_CONTRACTED = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've
"""
_CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form for form in _CONTRACTED.split() for i, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the table's one entry that takes an apostrophe away
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
    text = _one_line(text)
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
    prediction, *wanted = (_one_line(text) for text in (prediction, *answers))
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


Tokenize = Callable[[Sequence[str]], list[str]]
"""Captions -> their tokens, space-joined, in the same order."""


def ptb_like(captions: Sequence[str]) -> list[str]:
    """:func:`ptb_like_tokens` of each caption."""
    return [ptb_like_tokens(caption) for caption in captions]


def cider_d(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize = ptb_like
) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al. 2015); the corpus score is their mean, 1.0 being "100".

    Document frequencies come from ``references``, so a score holds for one set of images only; a single image scores 0.
    Raises MissingPackageError naming the extra when pycocoevalcap is missing.
    """
    _check_pairs(captions, references)
    try:
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise _missing_package() from error
    _, scores = Cider().compute_score(*tokenized(captions, references, tokenize))
    return [float(score) for score in scores]


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize = ptb_like) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 (Papineni et al. 2002, closest reference length), each in 0..1.

    Raises MissingPackageError naming the extra when pycocoevalcap is missing.
    """
    _check_pairs(captions, references)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
    except ModuleNotFoundError as error:
        raise _missing_package() from error
    scores, _ = Bleu(4).compute_score(*tokenized(captions, references, tokenize), verbose=0)
    return [float(score) for score in scores]


def rouge_l(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize = ptb_like
) -> list[float]:
    """ROUGE-L of each caption (Lin 2004; F-measure with beta 1.2, best precision and best recall over references), in 0..1.

    Raises MissingPackageError naming the extra when pycocoevalcap is missing.
    """
    _check_pairs(captions, references)
    try:
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError as error:
        raise _missing_package() from error
    _, scores = Rouge().compute_score(*tokenized(captions, references, tokenize))
    return [float(score) for score in scores]


def tokenized(
    captions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """(references, captions), both by number, as the package's scorers take them."""
    tokens = iter(tokenize([*captions, *(text for texts in references for text in texts)]))
    answered = {i: [next(tokens)] for i in range(len(captions))}
    return {i: [next(tokens) for _ in texts] for i, texts in enumerate(references)}, answered


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


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
