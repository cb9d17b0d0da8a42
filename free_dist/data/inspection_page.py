"""Shown records as one HTML page that needs nothing beside it, and as a PNG sheet.

Knows how things look; does not know where records come from.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from free_dist.data.images import decode_image, image_header
from free_dist.data.inspection import ShownRecord, ShownSample, ShownToken
from free_dist.data.quarantine import BadSample

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
article { display: flex; gap: 1.2rem; padding: 1rem 0; border-top: 1px solid #ccc; } figure { margin: 0; flex: 0 0 13rem; }
figure img { max-width: 13rem; max-height: 13rem; min-width: 4rem; } figcaption, .note { color: #666; font-size: 13px; }
.row { margin: 0 0 .9rem; } .tokens { font: 14px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; }
.tokens span { padding: .1rem 0; border-bottom: 2px solid #ddd; white-space: pre-wrap; margin-right: 1px; }
.tokens .target { background: #cdebd0; border-color: #2c8a3d; } .tokens .image { background: #e4e6f6; border-color: #8088c8; }
.problem { color: #a02020; }
"""

PICTURE = 180
"""Pixels of the longest side of an image on a sheet."""

TEXT_COLUMNS, LINE, MARGIN = 96, 17, 12
"""Characters of a line of text, pixels of its height, pixels around everything."""

COLOURS = {"text": (27, 27, 27), "note": (110, 110, 110), "target": (20, 120, 40), "image": (90, 96, 180)}


def html_page(title: str, splits: Sequence[Sequence[str]], shown: Iterable[ShownRecord]) -> str:
    """A page with a table of splits (the first row is its head) and the shown records; images are inside."""
    head, *rows = [[escape(cell) for cell in row] for row in splits]
    table = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    articles = "\n".join(_article(record) for record in shown)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1>
<table><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>{table}</table>
<p class="tokens"><span class="image">image placeholders</span> <span>read</span>
<span class="target">read and a target</span></p>
{articles}
</body></html>
"""


def _article(shown: ShownRecord) -> str:
    record = shown.record
    kind = "png" if record.image.startswith(b"\x89PNG") else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(record.image).decode()}"
    facts = f"{shown.split}/{record.key}" + (f", image {record.image_id}" if record.image_id else "")
    samples = "".join(_sample(sample) for sample in shown.samples) or '<p class="note">nothing for these tasks</p>'
    return (
        f'<article><figure><img src="{source}" alt="{escape(record.key)}"><figcaption>{escape(facts)}<br>'
        f"{escape(image_facts(record.image))}</figcaption></figure><div>{samples}</div></article>"
    )


def _sample(sample: ShownSample) -> str:
    turns = "<br>".join(f"{escape(turn.prompt)} <b>{escape(turn.answer)}</b>" for turn in sample.turns)
    parts = [f'<div class="row"><span class="note">{escape(sample.task)}, {escape(sample.key)}</span><br>{turns}']
    if sample.references:
        parts.append(f'<div class="note">accepted: {escape("; ".join(dict.fromkeys(sample.references)))}</div>')
    for sequence in sample.sequences:
        tokens = "".join(f'<span class="{_kind(token)}">{escape(token.text)}</span>' for token in sequence.tokens)
        parts.append(f'<div class="tokens"><span class="note">{escape(sequence.reader)}:</span> {tokens}</div>')
    if sample.problem:
        parts.append(f'<div class="problem">{escape(sample.problem)}</div>')
    return "".join(parts) + "</div>"


def png_sheet(shown: Iterable[ShownRecord]) -> bytes:
    """An image and its rows beside it, one record below the other; targets are green and underlined."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf"), 12)
    character = font.getlength("m")
    blocks = [(_thumbnail(record.record.image), _lines(record)) for record in shown]
    heights = [max(PICTURE, LINE * len(lines)) + 2 * MARGIN for _, lines in blocks]
    width = int(PICTURE + 3 * MARGIN + TEXT_COLUMNS * character)
    sheet = Image.new("RGB", (width, max(sum(heights), 1)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (picture, lines), height in zip(blocks, heights, strict=True):
        sheet.paste(picture, (MARGIN, top + MARGIN))
        for number, line in enumerate(lines):
            left, y = PICTURE + 2.0 * MARGIN, top + MARGIN + LINE * number
            for kind, text in line:
                draw.text((left, y), text, fill=COLOURS[kind], font=font)
                right = left + font.getlength(text)
                if kind == "target":
                    draw.line((left, y + LINE - 3, right - 1, y + LINE - 3), fill=COLOURS[kind])
                left = right
        top += height
        draw.line((0, top, width, top), fill=(210, 210, 210))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def image_facts(image: bytes) -> str:
    """Size, format and bytes of an encoded image, in words."""
    try:
        form, width, height = image_header(image)
    except BadSample:
        return f"does not decode, {len(image):,} bytes"
    return f"{width} x {height} {form}, {len(image):,} bytes"


def _thumbnail(image: bytes) -> Image.Image:
    try:
        picture = decode_image(image)
    except BadSample:
        return Image.new("RGB", (PICTURE, PICTURE), (230, 200, 200))
    scale = PICTURE / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))


def _lines(shown: ShownRecord) -> list[list[tuple[str, str]]]:
    """Lines of (kind, text) pieces, none longer than ``TEXT_COLUMNS``."""
    lines = [[("note", f"{shown.split}/{shown.record.key}: {image_facts(shown.record.image)}"[:TEXT_COLUMNS])]]
    for sample in shown.samples:
        lines.append([("note", f"{sample.task}, {sample.key}"[:TEXT_COLUMNS])])
        if not sample.sequences:
            for turn in sample.turns:
                lines += _wrapped([("text", f"{turn.prompt} "), ("target", turn.answer)])
        for sequence in sample.sequences:
            pieces = [(_kind(token), token.text) for token in sequence.tokens]
            lines += _wrapped([("note", f"{sequence.reader}: "), *pieces])
        if sample.problem:
            lines += [[("note", line)] for line in textwrap.wrap(sample.problem, TEXT_COLUMNS)]
    return lines


def _wrapped(pieces: Iterable[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    lines: list[list[tuple[str, str]]] = [[]]
    left = TEXT_COLUMNS
    for kind, text in pieces:
        text = text.replace("\n", "\u21b5").replace("\t", " ")
        while text:
            if len(text) > left and (len(text) <= TEXT_COLUMNS or not left):
                lines.append([])
                left = TEXT_COLUMNS
            lines[-1].append((kind, text[:left]))
            text, left = text[left:], left - len(text[:left])
    return lines


def _kind(token: ShownToken) -> str:
    return "target" if token.is_target else "image" if token.is_image else "text"
