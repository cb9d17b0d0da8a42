"""CapFilt (BLIP, arXiv 2201.12086): a captioner writes captions of every image, a filter keeps those that match it.

    records -> captions of the captioner -> scores of the filter -> records with what was kept

Here is what becomes of records, whatever the models are; does not know which (``capfilt_models``, ``capfilt_lavis``), nor
shards and processes (``capfilt_shards``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from PIL import Image

from free_dist.config import UserError
from free_dist.data.images import decode_image
from free_dist.data.quarantine import BadSample
from free_dist.data.records import Record, SyntheticCaption

BINS = 10
"""Bars of the histogram of scores."""


@dataclass(frozen=True, kw_only=True)
class CapFiltSettings:
    """What the output depends on besides images and models; the defaults are BLIP's."""

    captions: int = 1
    """Captions written per image; equal ones count once."""
    prompt: str = "a picture of "
    """Begins every caption, and is no part of it."""
    top_p: float = 0.9
    """Nucleus sampling draws from the likeliest tokens that have this probability together."""
    top_k: int = 50
    """At most so many of them; 0 for no limit."""
    repetition_penalty: float = 1.1
    """Divides the logits of tokens that stand in the caption or its prompt already."""
    min_length: int = 10
    """Shortest caption, in tokens, its prompt and the token that begins it included, as BLIP counts."""
    max_length: int = 30
    """Longest, counted likewise."""
    threshold: float = 0.5
    """Captions whose matching probability is below it are thrown away."""
    filter_human: bool = False
    """Whether human captions are held to it as well."""
    seed: int = 0
    """With an image's key it decides what is drawn."""

    def check(self) -> None:
        """Raise UserError, naming the flag, for values that cannot be run."""
        lengths = 1 <= self.min_length <= self.max_length
        for flag, is_right, wanted in (
            ("--captions", self.captions >= 1, "want at least 1"),
            ("--top-p", 0 < self.top_p <= 1, "want above 0 and at most 1"),
            ("--top-k", self.top_k >= 0, "want 0 for no limit, or more"),
            ("--repetition-penalty", self.repetition_penalty > 0, "want above 0; 1 for none"),
            ("--min-length", lengths, f"want 1 to --max-length {self.max_length}"),
            ("--threshold", 0 <= self.threshold <= 1, "want a probability; 0 keeps everything"),
        ):
            if not is_right:
                name = flag.removeprefix("--").replace("-", "_")
                raise UserError(f"{flag} {asdict(self)[name]}: {wanted}")


class Captioner(Protocol):
    """What writes captions."""

    name: str
    """A checkpoint's hash or name."""

    def write(self, images: Sequence[Image.Image], keys: Sequence[str], settings: CapFiltSettings) -> list[list[str]]:
        """``settings.captions`` texts for every image, which depend on its key and ``settings.seed``, not on other images."""


class Matcher(Protocol):
    """What judges captions."""

    name: str
    """A checkpoint's hash or name."""

    def score(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """For every image the probability, 0 to 1, that each of its texts belongs to it."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the captions; sums over shards."""

    images: int = 0
    unreadable: int = 0
    """Images that could not be decoded; their records are passed on as they are."""
    written: int = 0
    """Captions of the captioner."""
    distinct: int = 0
    """Of these, after dropping empty ones and repetitions within an image."""
    kept: int = 0
    human: int = 0
    """Human captions that were scored."""
    human_kept: int = 0
    without_captions: int = 0
    """Images left without any caption."""
    score_sum: float = 0.0
    """Over the distinct captions."""
    histogram: tuple[int, ...] = field(default=(0,) * BINS)
    """Distinct captions by score, in equal steps from 0 to 1."""

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        bars = tuple(a + b for a, b in zip(mine.pop("histogram"), theirs.pop("histogram"), strict=True))
        return Counts(histogram=bars, **{name: value + theirs[name] for name, value in mine.items()})

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Counts:
        """The inverse of ``asdict`` by way of JSON."""
        known = {one.name for one in fields(cls)} & stored.keys()
        return cls(**{name: stored[name] for name in known - {"histogram"}}, histogram=tuple(stored["histogram"]))

    @property
    def kept_share(self) -> float:
        """Of the distinct captions, those that were kept; 0 where none was written."""
        return self.kept / max(1, self.distinct)


def bootstrap(
    records: Sequence[Record], captioner: Captioner, matcher: Matcher, settings: CapFiltSettings
) -> tuple[list[Record], Counts]:
    """Records with the synthetic captions that were kept, after those that other models wrote; and what became of all."""
    opened = [_opened(record.image) for record in records]
    read = [(record, image) for record, image in zip(records, opened, strict=True) if image is not None]
    images = [image for _, image in read]
    written = captioner.write(images, [record.key for record, _ in read], settings)
    distinct = [list(dict.fromkeys(text for text in texts if text)) for texts in written]
    human = [list(record.captions) if settings.filter_human else [] for record, _ in read]
    found_scores = matcher.score(images, [[*new, *old] for new, old in zip(distinct, human, strict=True)])
    scores = [[round(score, 6) for score in of_image] for of_image in found_scores]  # as stored
    done = []
    total = Counts(
        images=len(records), unreadable=len(records) - len(read), written=sum(map(len, written)),
        distinct=sum(map(len, distinct)), human=sum(map(len, human)),
    )  # fmt: skip
    for (record, _), new, old, found in zip(read, distinct, human, scores, strict=True):
        kept = tuple(
            SyntheticCaption(text=text, model=captioner.name, score=score, threshold=settings.threshold)
            for text, score in zip(new, found, strict=False)
            if score >= settings.threshold
        )
        matching = tuple(
            text for text, score in zip(old, found[len(new) :], strict=True) if score >= settings.threshold
        )
        others = tuple(caption for caption in record.synthetic_captions if caption.model != captioner.name)
        captions = matching if settings.filter_human else record.captions
        done.append(replace(record, captions=captions, synthetic_captions=others + kept))
        total += Counts(
            kept=len(kept), human_kept=len(matching), score_sum=sum(found[: len(new)]),
            histogram=_histogram(found[: len(new)]),
        )  # fmt: skip
    following = iter(done)
    result = [record if image is None else next(following) for record, image in zip(records, opened, strict=True)]
    bare = sum(not record.captions and not record.synthetic_captions for record in result)
    return result, total + Counts(without_captions=bare)


def _opened(image: bytes) -> Image.Image | None:
    try:
        return decode_image(image)
    except BadSample:
        return None


def _histogram(scores: Sequence[float]) -> tuple[int, ...]:
    bars = [0] * BINS
    for score in scores:
        bars[min(BINS - 1, int(score * BINS))] += 1
    return tuple(bars)
