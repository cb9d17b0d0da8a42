"""What an evaluation leaves behind, and the report of a run: the only writer of ``report.html`` and ``report.md``.

Knows which files there are; not what is in a section (``report_sections``), nor how it is written (``html_report``).
Prints nothing."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from free_dist.atomic import write_atomically
from free_dist.config import UserError
from free_dist.evaluation import plots
from free_dist.evaluation.html_report import HTML, MARKDOWN, write_pages
from free_dist.evaluation.metrics_tables import metric_tables, ranking_table, unavailable
from free_dist.evaluation.probe import Probe
from free_dist.evaluation.report_blocks import Missing, Report
from free_dist.evaluation.report_sections import RunSections
from free_dist.evaluation.report_sources import PROBES, RunDirectory
from free_dist.evaluation.report_tables import RESULT_HEADINGS, result_cells
from free_dist.evaluation.rows import About, RankingRow, Row, write_results


@dataclass(frozen=True, kw_only=True)
class ReportPaths:
    """Where an evaluation lies."""

    results: Path
    """``results.json``."""
    page: Path
    """``report.html``."""
    report: Path
    """``report.md``."""
    plots: dict[str, Path]
    """Title -> PNG."""
    submissions: list[Path] = field(default_factory=list)
    """Files for official servers."""


def write_report(
    rows: Sequence[Row],
    probes: Sequence[Probe],
    run_dir: str | Path,
    *,
    labels: Mapping[str, str] | None = None,
    ranking: Sequence[RankingRow] = (),
    about: About | None = None,
) -> ReportPaths:
    """Write ``results.json``, ``probes.json`` and the plots to ``run_dir``, each file when complete, then the run's
    report.

    ``probes`` may be empty; then there is no per-block picture.  ``labels`` maps methods and curves to words for
    legends.  What other launchers left in ``run_dir`` and cannot be read is named in the report and stops nothing."""
    directory = Path(run_dir)
    results = write_results(rows, directory, ranking=ranking, about=about)
    figures = {"Where tokens leave": plots.exit_shares(rows, directory / "exit_shares.png", labels)}
    if known := [row for row in rows if not math.isnan(row.quality)]:  # of withheld answers nobody knows a quality
        picture = plots.speed_quality(known, directory / "speed_quality.png", labels)
        figures = {"Speed and quality": picture} | figures
    if probes:
        figures["Accuracy per block"] = plots.accuracy_per_block(probes, directory / "accuracy_per_block.png", labels)
        text = json.dumps([probe.to_json() for probe in probes], indent=1) + "\n"
        write_atomically(directory / PROBES, text.encode())
    command = shlex.join(["python", "launch/report.py", str(directory)])
    write_run_report([RunDirectory.open(directory)], directory, command=command, lenient=True)
    return ReportPaths(results=results, page=directory / HTML, report=directory / MARKDOWN, plots=figures)


def write_run_report(
    runs: Sequence[RunDirectory], out: str | Path, *, command: str, lenient: bool = False
) -> tuple[list[Path], list[Missing]]:
    """Write the report of one or several runs to ``out`` -> (what was written, what was not measured).

    ``command``: what to type to write it again.  ``lenient``: a measured file that cannot be read is said to be missing.
    Raises UserError naming a measured file that cannot be read otherwise, or an ``out`` that is no directory."""
    directory = Path(out)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory} is a file: give a directory")
    report = run_report(runs, command=command, lenient=lenient)
    directory.mkdir(parents=True, exist_ok=True)
    gaps = [gap for run in report.runs for section in run.sections for gap in section.missing]
    return write_pages(report, directory), list(dict.fromkeys(gaps))


def run_report(runs: Sequence[RunDirectory], *, command: str, lenient: bool = False) -> Report:
    """The report as data; see :func:`write_run_report`."""
    names = ", ".join(run.path.name for run in runs)
    return Report(
        title=f"Early exits: {names}", command=command, runs=tuple(RunSections(run, lenient).report() for run in runs)
    )


def terminal_table(rows: Sequence[Row]) -> str:
    """All rows as aligned text; ``*`` marks the fastest row of a task that keeps 99% of the full model's quality."""
    return aligned([RESULT_HEADINGS, *result_cells(rows)])


def terminal_metrics(rows: Sequence[Row], ranking: Sequence[RankingRow]) -> str:
    """Everything else that was measured, as aligned text: metrics, breakdowns, ranked candidates, what could not run."""
    tables = metric_tables(rows) | ({"ranked candidates": table} if (table := ranking_table(ranking)) else {})
    parts = [f"\n{title}\n{aligned(table)}" for title, table in tables.items()]
    parts += [f"not computed: {name}: {why}" for name, why in unavailable(rows).items()]
    return "\n".join(parts)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, headings first, as text with columns of equal width."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)
