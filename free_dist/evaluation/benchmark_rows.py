"""Rows of the benchmark: from answers and times to speed-ups, quality and the cost model's error.

A layer ratio is reported beside the speed and named for what it is: a count of blocks.  Does not know decoders or files.

Shape letters: N samples, A arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from free_dist.evaluation.arms import Contestant
from free_dist.evaluation.benchmark import Answer, median_with_interval, ratio_with_interval
from free_dist.evaluation.cost_model import DecodeCosts, ExitSetting, token_costs
from free_dist.evaluation.tasks import TaskScorer

EXACT = ("full", "full, runner", "hf", "hf_compiled")
"""Exact decoders without exits; the fastest of them is the baseline."""


def time_rows(
    arms: Sequence[Contestant],
    times: Sequence[Sequence[float]],
    *,
    task: str,
    length: str,
    images: Sequence[int] | None = None,
    batch_size: int = 1,
) -> list[dict[str, Any]]:
    """One row per arm from its seconds per sample, ``times`` [A][N]; ``length`` says in words how long answers are.

    ``images``: of N or more samples, which image each is about; intervals are over images, or without them over samples.
    """
    exact = [i for i, arm in enumerate(arms) if arm.arm.method in EXACT]
    fastest = min(exact, key=lambda i: sum(times[i]))
    rows = []
    for arm, own in zip(arms, times, strict=True):
        speedup, interval = ratio_with_interval(times[fastest], own, images and images[: len(own)])
        rows.append(
            {
                "task": task,
                "method": arm.arm.method,
                "threshold": arm.arm.threshold,
                "length": length,
                "batch_size": batch_size,
                "samples": len(own),
                "seconds": median_with_interval(own),
                "speedup": speedup,
                "speedup_interval": interval,
                "speedup_over": arms[fastest].arm.method,
                "speedup_over_full": ratio_with_interval(times[0], own)[0],
            }
        )
    return rows


def quality_columns(
    answers: Sequence[Sequence[Answer]],
    texts: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    *,
    scorer: TaskScorer,
    n_blocks: int,
) -> list[dict[str, Any]]:
    """Per arm what its answers are worth: ``answers`` and their ``texts`` [N][A]; arm 0 is the full model."""
    columns = list(zip(*answers, strict=True))
    scores = [scorer.score(own, references) for own in zip(*texts, strict=True)]
    found = []
    for own, score in zip(columns, scores, strict=True):
        tokens = sum(len(answer.tokens) for answer in own)
        found.append(
            {
                "quality": score.quality,
                "quality_ratio": score.quality / scores[0].quality if scores[0].quality else None,
                "identical": sum(a.tokens == b.tokens for a, b in zip(own, columns[0], strict=True)),
                "tokens": tokens,
                "layer_ratio (a count of blocks, not a speed)": n_blocks * tokens / sum(a.blocks for a in own),
            }
            | score.tokenizer
        )
    return found


def predicted_speedup(
    costs: DecodeCosts, layers: Sequence[int], answers: Sequence[Answer], prompts: Sequence[int], *, vision: float
) -> float:
    """Speed-up over full depth that the cost model expects of answers whose exits are known, exits asked without gates.

    ``layers``: exits that are asked; ``prompts``: prompt positions of each answer; ``vision``: seconds before each prompt.
    """
    setting = ExitSetting(layers=tuple(layers))
    own = full = 0.0
    for answer, prompt in zip(answers, prompts, strict=True):
        whole = [costs.n_blocks] * len(answer.exits)
        own += vision + sum(sum(t.values()) for t in token_costs(costs, setting, answer.exits, prompt=prompt))
        full += vision + sum(sum(t.values()) for t in token_costs(costs, None, whole, prompt=prompt))
    return full / own
