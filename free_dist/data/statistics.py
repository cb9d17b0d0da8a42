"""What a split holds, in numbers: counts, lengths in words and tokens, answers, images.

Knows records and samples; does not know shards or how numbers are shown.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from free_dist.config import TASKS, DataConfig, UserError
from free_dist.data.images import image_header
from free_dist.data.quarantine import BadSample
from free_dist.data.records import Record
from free_dist.data.samples import SampleEncoder, evaluation_samples

LISTED_ANSWERS = 20
"""Most frequent answers that are named."""

COUNTED = ("questions", "captions", "synthetic_captions", "dialogue")
"""Fields of a record that hold several things."""


def split_statistics(
    records: Iterable[Record], config: DataConfig, encoder: SampleEncoder | None = None
) -> dict[str, Any]:
    """Everything that is counted of a split's records, as JSON can hold it.

    ``records``, ``images`` (distinct, unreadable, formats, and the spread of width, height and bytes), ``per_record`` (spread of
    how many things of a kind a record has), ``texts`` (kind -> count, distinct, spread of words and tokens), ``answers`` (kind ->
    count, distinct, the most frequent with their shares), ``rows`` (task -> count, spread of tokens of a whole row, rows that are
    too long).  Tokens are an ``encoder``'s; without one there are none.  A spread has min, mean, median, p95 and max.
    """
    texts: dict[str, Counter[str]] = defaultdict(Counter)
    per_record: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, list[int]] = {"width": [], "height": [], "bytes": []}
    formats: Counter[str] = Counter()
    digests: set[bytes] = set()
    rows: dict[str, list[int]] = defaultdict(list)
    too_long: Counter[str] = Counter()
    count = 0
    for record in records:
        count += 1
        for name in COUNTED:
            per_record[name].append(len(vars(record)[name]))
        for kind, text in _texts(record):
            texts[kind][text] += 1
        digests.add(hashlib.sha256(record.image).digest())
        form, width, height = _image_facts(record.image)
        formats[form] += 1
        if width:
            for name, value in (("width", width), ("height", height), ("bytes", len(record.image))):
                sizes[name].append(value)
        if encoder is not None:
            for task in TASKS:
                for sample in evaluation_samples(record, task, config):
                    try:
                        ids, targets = encoder.encode_text(sample.turns)
                    except UserError:
                        too_long[task] += 1
                    else:
                        rows[task].append(max(len(ids), len(targets)))
    return {
        "records": count,
        "images": {"distinct": len(digests), "formats": dict(formats)} | {n: spread(v) for n, v in sizes.items()},
        "per_record": {name: spread(values) for name, values in per_record.items() if any(values)},
        "texts": {kind: _text_statistics(found, encoder) for kind, found in sorted(texts.items())},
        "answers": {kind: _answer_statistics(texts[kind]) for kind in ("answer", "dialogue answer") if texts[kind]},
        "rows": {
            task: {"count": len(rows[task]) + too_long[task], "too_long": too_long[task], "tokens": spread(rows[task])}
            for task in TASKS
            if rows[task] or too_long[task]
        },
    }


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Smallest, mean, median, 95th percentile and largest; None of nothing."""
    return weighted_spread(Counter(values))


def weighted_spread(counts: Counter[float]) -> dict[str, float] | None:
    """The same of values that occur several times: value -> how often."""
    total = sum(counts.values())
    if not total:
        return None
    ordered = sorted(counts)

    def quantile(share: float) -> float:
        # The smallest value that at least this share of all values does not exceed.
        seen = 0
        for value in ordered:
            seen += counts[value]
            if seen >= share * total:
                return value
        return ordered[-1]

    mean = sum(value * times for value, times in counts.items()) / total
    return {"min": ordered[0], "mean": mean, "median": quantile(0.5), "p95": quantile(0.95), "max": ordered[-1]}


def _texts(record: Record) -> Iterable[tuple[str, str]]:
    for question in record.questions:
        yield "question", question.question
        yield from (("answer", answer) for answer in question.answers)
    yield from (("caption", caption) for caption in record.captions)
    yield from (("synthetic caption", synthetic.text) for synthetic in record.synthetic_captions)
    for turn in record.dialogue:
        yield "dialogue question", turn.question
        if turn.answer is not None:
            yield "dialogue answer", turn.answer


def _image_facts(image: bytes) -> tuple[str, int, int]:
    """(format, width, height), from the header alone; ("unreadable", 0, 0) for what is no image."""
    try:
        return image_header(image)
    except BadSample:
        return "unreadable", 0, 0


def _text_statistics(found: Counter[str], encoder: SampleEncoder | None) -> dict[str, Any]:
    lengths: list[tuple[str, Callable[[str], int]]] = [("words", lambda text: len(text.split()))]
    if encoder is not None:
        tokenizer = encoder.tokenizer
        lengths.append(("tokens", lambda text: len(tokenizer.encode(text, add_special_tokens=False))))
    result: dict[str, Any] = {"count": sum(found.values()), "distinct": len(found)}
    for name, length in lengths:
        counts: Counter[float] = Counter()
        for text, times in found.items():  # every distinct text is measured once
            counts[length(text)] += times
        result[name] = weighted_spread(counts)
    return result


def _answer_statistics(found: Counter[str]) -> dict[str, Any]:
    total = sum(found.values())
    ordered = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
    return {
        "count": total,
        "distinct": len(found),
        "most_frequent": [
            {"answer": answer, "count": times, "share": times / total} for answer, times in ordered[:LISTED_ANSWERS]
        ],
    }
