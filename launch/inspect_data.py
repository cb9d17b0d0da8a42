#!/usr/bin/env python
"""Look at a directory of shards: its splits, records as a backbone sees them, faults, numbers.

    python launch/inspect_data.py data/easyvqa                             # splits, and a few records in the terminal
    python launch/inspect_data.py data/easyvqa --lint                      # one line per fault; exits with 1 if there are any
    python launch/inspect_data.py data/easyvqa --stats --json stats.json   # counts, lengths, answers, image sizes
    python launch/inspect_data.py data/easyvqa --html page.html --png sheet.png --count 20
    python launch/inspect_data.py data/coco --config launch/recipes/tasks/coco.yaml --backbone DIR

Prompts are the recipe's, tokens those of --backbone, or of the recipe's backbone.path; of a backbone no weights are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from free_dist.config import TASKS, Recipe, UserError
from free_dist.recipe_io import add_recipe_arguments, fail_clearly, load_recipe, positive_integer

if TYPE_CHECKING:
    from rich.table import Table

    from free_dist.data.inspection import ShownRecord
    from free_dist.data.samples import SampleEncoder

NO_BACKBONE = "none"
"""``--backbone`` for texts without tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="what launch/prepare_data.py wrote, or one split of it"
    )
    parser.add_argument(
        "--lint",
        action="store_true",
        help="read everything; exit with 0 if it is sound, with 1 and a line per fault if not",
    )
    parser.add_argument(
        "--workers", type=positive_integer, default=1, help="processes of --lint (default: %(default)s)"
    )
    parser.add_argument(
        "--stats", action="store_true", help="counts, lengths, frequent answers, image sizes of every split"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what --stats counts to a file")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the records as a page that needs no other file"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the records as a picture")
    parser.add_argument("--split", metavar="NAME", help="look at this split only")
    parser.add_argument(
        "--count",
        type=positive_integer,
        default=3,
        help="records of a split that are shown, evenly spaced (default: 3)",
    )
    parser.add_argument("--task", choices=TASKS, help="show the rows of this task only")
    parser.add_argument(
        "--backbone",
        metavar="DIR",
        help=f"whose tokenizer to see with, in the place of backbone.path; {NO_BACKBONE!r}: no tokens",
    )
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        recipe = load_recipe(arguments.config, arguments.overrides)
        if arguments.json is not None and not arguments.stats:
            raise UserError("--json: give --stats too")
        if arguments.lint and not find_faults(arguments.directory, arguments.workers):
            sys.exit(1)
        if arguments.stats:
            count(recipe, arguments)
        if arguments.html or arguments.png or not (arguments.lint or arguments.stats):
            show(recipe, arguments)
    sys.exit(0)


def find_faults(directory: Path, workers: int) -> bool:
    """Print every fault; whether there is none."""
    from tqdm import tqdm

    from free_dist.data.lint import lint

    report = lint(
        directory,
        workers=workers,
        progress=lambda shards: tqdm(shards, desc="reading", unit="shard", mininterval=0.5, disable=None),
    )
    for fault in report.faults:
        print(fault)
    if not report.faults:
        print(f"{directory}: sound: {report.splits} splits, {report.shards} shards, {report.samples:,} samples")
    return not report.faults


def count(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Print the statistics of every split, and write them if asked to."""
    from rich.console import Console

    from free_dist.atomic import write_atomically
    from free_dist.data.statistics import split_statistics
    from free_dist.data.stream import records

    root, splits = splits_of(arguments)
    encoder, data = encoder_of(recipe, arguments), replace(recipe.data, root=str(root))
    found = {split: split_statistics(records(data, split), recipe.data, encoder) for split in splits}
    console = Console(highlight=False)
    for split, numbers in found.items():
        for table in statistics_tables(split, numbers):
            console.print(table)
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(found, ensure_ascii=False, indent=1).encode())


def show(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Print records, or write them as a page or a picture."""
    from free_dist.atomic import write_atomically

    root, splits = splits_of(arguments)
    shown = list(shown_records(recipe, arguments, root, splits))
    rows = split_rows(root, splits)
    if arguments.html is None and arguments.png is None:
        print_records(rows, shown)
        return
    from free_dist.data.inspection_page import html_page, png_sheet

    if arguments.html is not None:
        write_atomically(arguments.html, html_page(str(arguments.directory), rows, shown).encode())
        print(f"{arguments.html}: {len(shown)} records")
    if arguments.png is not None:
        write_atomically(arguments.png, png_sheet(shown))
        print(f"{arguments.png}: {len(shown)} records")


def splits_of(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """(directory of splits, names of those to look at); raises UserError where there are none."""
    from free_dist.data.shards import MANIFEST

    root = arguments.directory
    if (root / MANIFEST).is_file():
        return root.absolute().parent, [root.absolute().name]
    splits = sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}"))
    if arguments.split is not None:
        splits = [split for split in splits if split == arguments.split]
    if not splits:
        wanted = f"split {arguments.split!r}" if arguments.split else "split"
        raise UserError(f"{root} has no finished {wanted} (a directory with a {MANIFEST}); run launch/prepare_data.py")
    return root, splits


def encoder_of(recipe: Recipe, arguments: argparse.Namespace) -> SampleEncoder | None:
    """What the backbone's tokens are made by; None if no tokens are wanted."""
    if arguments.backbone == NO_BACKBONE:
        return None
    from free_dist.data.pretrained import load_encoder

    return load_encoder(arguments.backbone or recipe.backbone.path)


def shown_records(
    recipe: Recipe, arguments: argparse.Namespace, root: Path, splits: list[str]
) -> Iterator[ShownRecord]:
    """The records that are to be shown."""
    import numpy as np

    from free_dist.data.inspection import show_record
    from free_dist.data.split_index import SplitIndex, usable_records

    encoder = encoder_of(recipe, arguments)
    tasks = [arguments.task] if arguments.task else list(TASKS)
    for split in splits:
        index = SplitIndex.open(replace(recipe.data, root=str(root)), split)
        count = min(arguments.count, len(index.rows))
        for record in usable_records(index, np.arange(count) * len(index.rows) // max(1, count)):
            yield show_record(split, record, tasks, recipe.data, encoder)


def split_rows(root: Path, splits: list[str]) -> list[list[str]]:
    """The table of splits; the first row is its head."""
    from free_dist.data.shards import read_manifest

    rows = [["split", "data set", "records", "shards", "MB", "schema"]]
    for split in splits:
        manifest = read_manifest(root, split)
        size = sum(shard.bytes for shard in manifest.shards) / 1e6
        numbers = (f"{manifest.samples:,}", len(manifest.shards), f"{size:,.1f}", manifest.schema_version)
        rows.append([split, manifest.dataset, *map(str, numbers)])
    return rows


def print_records(rows: list[list[str]], shown: list[ShownRecord]) -> None:
    """The table of splits and the records, in the terminal."""
    from rich.console import Console
    from rich.text import Text

    from free_dist.data.inspection_page import image_facts

    console = Console(highlight=False)
    console.print(table_of("", rows[0], rows[1:]))
    console.print(
        Text.assemble("tokens: ", ("image placeholders", "blue"), ", read, ", ("read and a target", "bold green"))
    )
    for entry in shown:
        console.rule(f"{entry.split}/{entry.record.key}", align="left", style="dim")
        console.print(Text(image_facts(entry.record.image), style="dim"))
        for sample in entry.samples:
            console.print(Text(f"{sample.task}, {sample.key}", style="dim"))
            for turn in sample.turns if not sample.sequences else ():
                console.print(Text.assemble("  ", turn.prompt, " ", (turn.answer, "bold green")))
            for sequence in sample.sequences:
                line = Text.assemble("  ", (f"{sequence.reader}: ", "dim"))
                for token in sequence.tokens:
                    # Targets are bracketed too: not every terminal has colours.
                    style = "bold green" if token.is_target else "blue" if token.is_image else ""
                    line.append(f"[{token.text}]" if token.is_target else token.text, style=style)
                console.print(line)
            if sample.problem:
                console.print(Text(f"  {sample.problem}", style="red"))


def statistics_tables(split: str, numbers: dict[str, Any]) -> Iterator[Table]:
    """What :func:`~free_dist.data.statistics.split_statistics` counted, as tables."""
    names = ("min", "mean", "median", "p95", "max")

    def row(name: str, spread: dict[str, float] | None) -> list[str]:
        return [name, *("" if spread is None else f"{spread[key]:.4g}" for key in names)]

    images = numbers["images"]
    lengths = [row(f"image {name}", images[name]) for name in ("width", "height", "bytes")]
    lengths += [row(f"{name} of a record", spread) for name, spread in numbers["per_record"].items()]
    for kind, text in numbers["texts"].items():
        lengths += [row(f"{unit} of a {kind}", text[unit]) for unit in ("words", "tokens") if unit in text]
    lengths += [row(f"tokens of a row: {task}", found["tokens"]) for task, found in numbers["rows"].items()]
    formats = ", ".join(f"{count:,} {name}" for name, count in images["formats"].items())
    title = f"{split}: {numbers['records']:,} records, {images['distinct']:,} distinct images ({formats})"
    yield table_of(title, ["", *names], lengths)
    counts = [[kind, f"{text['count']:,}", f"{text['distinct']:,}", ""] for kind, text in numbers["texts"].items()]
    counts += [[f"rows: {task}", f"{v['count']:,}", "", f"{v['too_long']:,}"] for task, v in numbers["rows"].items()]
    yield table_of("", ["", "count", "distinct", "too long"], counts)
    for kind, found in numbers["answers"].items():
        entries = [[e["answer"], f"{e['count']:,}", f"{e['share']:.1%}"] for e in found["most_frequent"]]
        yield table_of(f"most frequent of {found['distinct']:,}", [kind, "count", "share"], entries)


def table_of(title: str, head: list[str], rows: list[list[str]]) -> Table:
    """A table whose columns but the first stand on the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # a cell may hold what rich would take for markup
    return table


if __name__ == "__main__":
    main()
