"""What a report is made of, whatever it is written as: sections of tables, pictures, claims, examples and gaps.

Every block is plain data.  Does not know where numbers come from, nor HTML or Markdown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as they are read; each row is as long as the headings."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.headings) for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One plot."""

    name: str
    """File name without suffix; unlike any other of the report."""
    title: str
    """What it shows; read aloud in its place."""
    svg: str


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Plots that belong beside each other."""

    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence with a number, and the command that prints or writes that number."""

    text: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Claims as a list."""

    claims: tuple[Claim, ...]


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Something that was not measured, and what measures it."""

    what: str
    command: str
    why: str = ""
    """What is wrong with the file that holds it, if there is one."""

    @property
    def said(self) -> str:
        """In words, without the command."""
        return f"Not shown: {self.what}: {self.why}" if self.why else f"Not measured: {self.what}"


@dataclass(frozen=True, kw_only=True)
class ShownToken:
    """One token of an example."""

    text: str
    exit: int
    depth: float
    """0 for the shallowest exit of the run, 1 for full depth: its colour."""


@dataclass(frozen=True, kw_only=True)
class ShownAnswer:
    """One decoder's answer to an example."""

    label: str
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture, what was asked, and the answers."""

    name: str
    """File name without suffix."""
    picture: str
    """PNG in base64."""
    title: str
    question: str
    references: tuple[str, ...]
    answers: tuple[ShownAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples, and the legend of their colours."""

    examples: tuple[Example, ...]
    legend: tuple[ShownToken, ...]


Block = Table | Pictures | Text | Claims | Missing | Examples


@dataclass(frozen=True, kw_only=True)
class Section:
    """One subject of one run."""

    title: str
    blocks: tuple[Block, ...]
    command: str = ""
    """What measured it."""

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What it lacks."""
        return tuple(block for block in self.blocks if isinstance(block, Missing))


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything about one run."""

    name: str
    sections: tuple[Section, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole of it."""

    title: str
    command: str
    """What to type to write it again."""
    runs: tuple[RunReport, ...]


def number(value: object, digits: int = 3) -> str:
    """A number with so many decimals; a dash for None and for what is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def interval(value: object, bounds: Sequence[object] | None, digits: int = 3) -> str:
    """``1.51 [1.42, 1.60]``; the number alone without bounds."""
    if value is None or bounds is None:
        return number(value, digits)
    low, high = bounds
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def percent(value: object, digits: int = 1) -> str:
    """A share as a percentage; a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}%}"


def threshold_text(value: object) -> str:
    """``0.8``; a dash for None, ``off`` from 1 up, where no exit emits; one after the other for a list or for tasks."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {threshold_text(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return " / ".join(threshold_text(one) for one in value)
    if not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return "off" if value >= 1 else f"{value:.5g}"
