"""Rows of results: what each column means, ``results.json``, and the choice of the best operating point.

``results.json`` is one object: ``format``, ``command`` (what to type to make it again), ``provenance`` (git commit and
versions), ``recipe``, ``samples`` (task -> how many), ``rows`` and ``ranking``.

Knows nothing of models, data, tables or plots.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from free_dist.atomic import write_atomically
from free_dist.config import UserError

BASELINES = ("full", "hf")
"""Methods without early exits."""
SCHEMA = (
    "task",
    "method",
    "threshold",
    "quality",
    "quality_full",
    "agreement",
    "mean_blocks",
    "layer_ratio",
    "wall_ratio",
    "wall_ratio_hf",
    "n",
)
"""Keys every row of ``results.json`` has, in this order; further keys are extras."""


_MAY_BE_UNKNOWN = ("quality", "quality_full")
"""Columns that are nan where answers are withheld."""
FORMAT = 1
"""Of ``results.json``."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operating point of one method on one task."""

    task: str
    method: str
    """``full`` (our decoder at full depth), ``hf`` (Hugging Face generate), ``exits``, or another bank's name."""
    threshold: float | None
    """Confidence threshold; None for the baselines."""
    quality: float
    """The task's metric on this row's samples: accuracy, or CIDEr-D for captions; nan (null in JSON) where answers are
    withheld."""
    quality_full: float
    """The full model's, on the same samples."""
    agreement: float
    """Share of samples with exactly the full model's tokens."""
    mean_blocks: float
    """Block calls per generated token, exit transformers included as one block each."""
    layer_ratio: float
    """L / mean_blocks; a count, not a speed."""
    wall_ratio: float
    """Time of our full-depth decoder over this one's; > 1 is faster."""
    wall_ratio_hf: float | None
    """Time of Hugging Face ``generate`` over this one's; None where it was not run."""
    n: int
    """Samples."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Further columns, JSON-serialisable: intervals, bleu4, exit_shares, seed, ..."""

    @property
    def quality_ratio(self) -> float:
        """Quality relative to the full model's; nan where that is 0."""
        return self.quality / self.quality_full if self.quality_full else float("nan")

    @property
    def speed(self) -> float:
        """Wall-clock ratio against the *faster* of the two baselines."""
        return self.wall_ratio if self.wall_ratio_hf is None else min(self.wall_ratio, self.wall_ratio_hf)

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in ``results.json``."""
        overlap = self.extras.keys() & set(SCHEMA)
        if overlap:
            raise ValueError(f"extras may not replace the column {min(overlap)!r}")
        return {
            name: _finite(value)
            for name, value in ({name: self.__dict__[name] for name in SCHEMA} | self.extras).items()
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Row:
        """Inverse of :meth:`to_json`; raises ValueError naming a missing column."""
        missing = [name for name in SCHEMA if name not in raw]
        if missing:
            raise ValueError(f"results row lacks the column {missing[0]!r}")
        unknown = {name: float("nan") for name in _MAY_BE_UNKNOWN if raw[name] is None}
        return cls(
            **{name: raw[name] for name in SCHEMA} | unknown,
            extras={name: value for name, value in raw.items() if name not in SCHEMA},
        )


@dataclass(frozen=True, kw_only=True)
class RankingRow:
    """Candidate answers of one task ranked in one way (:mod:`free_dist.evaluation.ranking`)."""

    task: str
    method: str
    """``full``, ``exits``, or another bank's name."""
    exit_layer: int | None
    """The exit whose head scored every token."""
    threshold: float | None
    """The confidence threshold that chose an exit for each token; with neither, full depth."""
    normalized: bool
    """Whether likelihoods were divided by the number of tokens."""
    metrics: dict[str, float | int | None]
    """ndcg, mrr, r@1, r@5, r@10 (0..1), mean_rank, and n, n_ndcg: how many samples had what these ask for."""
    mrr_interval: tuple[float, float] | None
    """95% bootstrap interval over images, as the next."""
    ndcg_interval: tuple[float, float] | None
    best_agreement: float
    """Share of samples whose best candidate is the full model's."""
    mean_layer: float
    """Mean block after which tokens were scored; a depth, not a speed."""
    n: int
    """Samples."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What made a file of results."""

    command: str = ""
    """What to type to make it again."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Git commit and versions."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of a ``results.json``."""

    about: About
    rows: tuple[Row, ...]
    ranking: tuple[RankingRow, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "format": FORMAT,
            **asdict(self.about),
            "samples": {task: max(row.n for row in self.rows if row.task == task) for task in tasks_of(self.rows)},
            "rows": [row.to_json() for row in self.rows],
            "ranking": [asdict(row) for row in self.ranking],
        }

    @classmethod
    def from_json(cls, raw: Any) -> Results:
        """Inverse of :meth:`to_json`; raises ValueError, KeyError or TypeError for anything else."""
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(
                f"want an object of format {FORMAT}, as launch/evaluate.py writes it now: remove it and evaluate again"
            )
        ranking = []
        for row in raw["ranking"]:
            pairs = {name: row[name] and tuple(row[name]) for name in ("mrr_interval", "ndcg_interval")}
            ranking.append(RankingRow(**row | pairs))
        return cls(
            about=About(command=raw["command"], provenance=raw["provenance"], recipe=raw["recipe"]),
            rows=tuple(Row.from_json(row) for row in raw["rows"]),
            ranking=tuple(ranking),
        )


def best_row(rows: Iterable[Row], task: str, min_quality_ratio: float = 0.99, method: str | None = None) -> Row | None:
    """The early-exit row of a task that is fastest, against the faster baseline, and keeps ``min_quality_ratio``.

    ``method`` restricts it to one bank; thresholds from 1 up, which never exit, are not in the choice.  None when no
    row keeps enough.
    """
    kept = [
        row
        for row in rows
        if row.task == task
        and row.threshold is not None
        and row.threshold < 1
        and (method is None or row.method == method)
        and row.quality_ratio >= min_quality_ratio
    ]
    return max(kept, key=lambda row: row.speed, default=None)


def write_results(
    rows: Sequence[Row], run_dir: Path, *, ranking: Sequence[RankingRow] = (), about: About | None = None
) -> Path:
    """Write ``results.json`` atomically."""
    path = run_dir / "results.json"
    run_dir.mkdir(parents=True, exist_ok=True)
    results = Results(about=about or About(), rows=tuple(rows), ranking=tuple(ranking))
    write_atomically(path, (json.dumps(results.to_json(), indent=1, allow_nan=False) + "\n").encode())
    return path


def read_all_results(path: Path) -> Results:
    """A ``results.json``; raises UserError for a file that is none."""
    try:
        return Results.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a results.json of launch/evaluate.py ({error})") from error


def read_results(path: Path) -> list[Row]:
    """The rows of a ``results.json``; raises what :func:`read_all_results` raises."""
    return list(read_all_results(path).rows)


def _finite(value: Any) -> Any:
    """The same with None for nan and infinities, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def tasks_of(rows: Iterable[Row]) -> list[str]:
    """The tasks among the rows, in order of appearance."""
    return list(dict.fromkeys(row.task for row in rows))
