"""Metrics beyond the headline quality as tables: lines of cells, for terminal and Markdown alike.

Knows the columns of results and nothing of models or data.  Prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from free_dist.evaluation.metrics_ranking import SPARSE
from free_dist.evaluation.rows import RankingRow, Row, tasks_of

Table = list[list[str]]
"""Headings, then lines of as many cells."""


def metric_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Title -> every metric of every decoder, one table per task that has some; breakdowns of the full model below it."""
    tables: dict[str, Table] = {}
    for task in tasks_of(rows):
        own = [row for row in rows if row.task == task and row.extras.get("metrics")]
        if not own:
            continue
        names = list(own[0].extras["metrics"])
        tokenizer = own[0].extras.get("tokenizer")
        title = f"{task}: metrics" + (f" (tokens: {tokenizer})" if tokenizer else "")
        tables[title] = [["method", "threshold", *names, "n"]] + [
            [
                row.method,
                _number(row.threshold, "g"),
                *(_number(row.extras["metrics"].get(name)) for name in names),
                str(row.n),
            ]
            for row in own
        ]
        for facet in own[0].extras.get("breakdown", {}):
            tables[f"{task}: {own[0].extras['quality_name']} by {facet}"] = _breakdown(own, facet)
    return tables


def ranking_table(ranking: Sequence[RankingRow]) -> Table:
    """One line per way of ranking; empty without any."""
    if not ranking:
        return []
    names = ("ndcg", *SPARSE)
    table = [["task", "scored by", "threshold", "per token", *names, "mean layer", "same best", "n", "n ndcg"]]
    for row in ranking:
        where = row.method if row.exit_layer is None else f"{row.method}, exit {row.exit_layer}"
        cells = [row.task, where, _number(row.threshold, "g"), "yes" if row.normalized else "no"]
        cells += [_number(row.metrics[name], ".2f" if name == "mean_rank" else ".4f") for name in names]
        cells += [f"{row.mean_layer:.2f}", f"{row.best_agreement:.1%}", str(row.n), str(row.metrics["n_ndcg"])]
        table.append(cells)
    return table


def unavailable(rows: Sequence[Row]) -> dict[str, str]:
    """Metric that was asked for and could not run -> why."""
    return {name: why for row in rows for name, why in row.extras.get("unavailable", {}).items()}


def markdown(table: Table) -> list[str]:
    """A table as lines of Markdown."""
    headings, *lines = table
    return ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)] + [
        "| " + " | ".join(cells) + " |" for cells in lines
    ]


def _breakdown(rows: Sequence[Row], facet: str) -> Table:
    """Values of a facet down, decoders across."""
    values = list(rows[0].extras["breakdown"][facet])
    names = [row.method if row.threshold is None else f"{row.method} {row.threshold:g}" for row in rows]
    table = [[facet, "n", *names]]
    for value in values:
        entries = [row.extras["breakdown"].get(facet, {}).get(value) for row in rows]
        qualities = [_number(None if entry is None else entry["quality"]) for entry in entries]
        table.append([value, str(rows[0].extras["breakdown"][facet][value]["n"]), *qualities])
    return table


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
