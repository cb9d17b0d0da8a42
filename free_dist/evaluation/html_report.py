"""A report as one HTML page that needs nothing beside it, and as Markdown with its plots beside it.

Both have the same sections, tables and claims.  Whatever text comes from data (captions, file names, notes) is escaped.
Does not know where blocks come from."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from free_dist.atomic import replaced_directory, write_atomically
from free_dist.evaluation.report_blocks import (
    Block,
    Claims,
    Example,
    Examples,
    Missing,
    Pictures,
    Report,
    RunReport,
    ShownToken,
    Table,
    Text,
)
from free_dist.evaluation.report_figures import depth_colour

HTML = "report.html"
MARKDOWN = "report.md"
PLOTS = "report_plots"
"""Directory beside the Markdown with its plots and pictures."""
TEMPLATE = "report.html.j2"
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~])")


def write_pages(report: Report, directory: Path) -> list[Path]:
    """Write ``report.html``, ``report.md`` and the plots of the latter into an existing directory, each whole or not at
    all."""
    page, text, plots = directory / HTML, directory / MARKDOWN, directory / PLOTS
    with replaced_directory(plots) as fresh:
        for name, content in _files(report):
            (fresh / name).write_bytes(content)
    write_atomically(page, html_page(report).encode())
    write_atomically(text, markdown_page(report).encode())
    return [page, text, plots]


def html_page(report: Report) -> str:
    """The page; plots, pictures and style are inside it."""
    assets = Path(__file__).resolve().parents[1] / "assets"
    environment = Environment(loader=FileSystemLoader(assets), autoescape=True, undefined=StrictUndefined)
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    numbers = {id(run): i for i, run in enumerate(report.runs)}
    return environment.get_template(TEMPLATE).render(
        report=report,
        colour=depth_colour,
        anchor=lambda run, section: f"run-{numbers[id(run)]}-{_slug(section.title)}",
    )


def markdown_page(report: Report) -> str:
    """The same in GitHub's Markdown; plots are links into ``PLOTS``."""
    lines = [f"# {escape(report.title)}", "", f"Written by {code(report.command)}", ""]
    for i, run in enumerate(report.runs):
        lines += _run_lines(run, i)
    return "\n".join(lines).rstrip() + "\n"


def _run_lines(run: RunReport, number: int) -> Iterator[str]:
    yield from (f"**{escape(run.name)}**", "")
    for section in run.sections:
        yield from (f"## {escape(section.title)}", "")
        if section.command:
            yield from (f"Measured by {code(section.command)}", "")
        for block in section.blocks:
            yield from _block_lines(block, number)
            yield ""


def _block_lines(block: Block, run: int) -> Iterator[str]:
    match block:
        case Text():
            yield escape(block.text)
        case Missing():
            yield f"> {escape(block.said)}. Make it with {code(block.command)}"
        case Claims():
            yield from (f"- {escape(claim.text)} {code(claim.command)}" for claim in block.claims)
        case Table():
            if block.caption:
                yield from (f"**{escape(block.caption)}**", "")
            yield "| " + " | ".join(map(escape, block.headings)) + " |"
            yield "|" + "---|" * len(block.headings)
            yield from ("| " + " | ".join(map(escape, row)) + " |" for row in block.rows)
        case Pictures():
            for picture in block.pictures:
                yield from (f"![{escape(picture.title)}]({PLOTS}/{_file(run, picture.name)}.svg)", "")
        case Examples():
            yield "Numbers behind tokens: " + ", ".join(escape(token.text) for token in block.legend) + "."
            for example in block.examples:
                yield ""
                yield from _example_lines(example, run)


def _example_lines(example: Example, run: int) -> Iterator[str]:
    yield from (f"![{escape(example.title)}]({PLOTS}/{_file(run, example.name)}.png)", "")
    yield from (f"{escape(example.title)}: {escape(example.question)}", "")
    for answer in example.answers:
        yield f"- {escape(answer.label)}: " + " ".join(map(_marked, answer.tokens))
    if example.references:
        yield "- wanted: " + escape("; ".join(example.references))


def _marked(token: ShownToken) -> str:
    return f"{escape(token.text.strip()) or '(space)'}<sub>{token.exit}</sub>"


def escape(text: str) -> str:
    """Text that Markdown and the HTML in it show as it is, on one line."""
    joined = " ".join(text.split())
    return _SPECIAL.sub(r"\\\1", joined.replace("&", "&amp;")).replace("\\<", "&lt;").replace("\\>", "&gt;")


def code(text: str) -> str:
    """A command as a span of code, whatever backticks it has."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def _files(report: Report) -> Iterator[tuple[str, bytes]]:
    """What lies beside the Markdown: (name, content)."""
    for i, run in enumerate(report.runs):
        for block in (block for section in run.sections for block in section.blocks):
            match block:
                case Pictures():
                    yield from ((f"{_file(i, picture.name)}.svg", picture.svg.encode()) for picture in block.pictures)
                case Examples():
                    for example in block.examples:
                        yield f"{_file(i, example.name)}.png", base64.b64decode(example.picture)


def _file(run: int, name: str) -> str:
    """Unlike any other run's."""
    return name if run == 0 else f"{run}_{name}"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
