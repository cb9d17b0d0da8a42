"""How large one micro-batch is: rows, images, positions and answer tokens, from a recipe, a distribution file and a backbone.

Lengths of texts are those of the published data sets, in tokens; flags of the planner replace them.  Does not know memory.

Shape letters: B rows, I images, T positions, N answer tokens of a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from free_dist.backbones import TokenLayout
from free_dist.config import DataConfig
from free_dist.ds_config import gradient_accumulation_steps, micro_batch_size

PADDING = 1.5
"""Longest over mean text of a micro-batch; every row is padded to the longest."""


@dataclass(frozen=True, kw_only=True)
class TaskText:
    """Mean tokens of one turn, with what templates and the end of an answer add."""

    prompt: int
    answer: int


TASK_TEXT = {
    "caption": TaskText(prompt=4, answer=13),
    "vqa": TaskText(prompt=13, answer=3),
    "dialogue": TaskText(prompt=12, answer=5),
}
"""COCO captions have 10.5 words (arXiv 1504.00325), VQAv2 questions 6.2 and answers 1.1 (arXiv 1612.00837), VisDial questions
5.1 and answers 2.9 (arXiv 1611.08669)."""

TRAINING_SAMPLES = {"coco": 566_747, "vqav2": 443_757, "vqav2_vg": 984_142, "visdial": 1_232_870, "easyvqa": 34_700}
"""Last part of ``data.root`` -> rows of one epoch: captions of Karpathy's 113,287 images, then questions; of Visual Genome's
108,077 images five each, as the recipe draws."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One micro-batch of one rank, and how many make a step."""

    task: str
    rows: int
    """B."""
    images: int
    """I."""
    text_tokens: int
    """Positions of the longest row that hold text."""
    answer_tokens: int
    """Answer tokens of an average row; B times as many are N."""
    accumulation: int
    world_size: int

    @property
    def answers(self) -> int:
        """N."""
        return self.rows * self.answer_tokens

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all ranks."""
        return self.rows * self.accumulation * self.world_size


def positions(layout: TokenLayout, work: Workload) -> int:
    """T of a decoder-only model or an encoder: what opens a row, and the longest text."""
    return len(layout.opening) + work.text_tokens + len(layout.prompt_end)


def heaviest_task(data: DataConfig) -> str:
    """The task of the recipe whose rows are longest."""
    wanted = [task for task, weight in data.tasks.items() if weight > 0]
    return max(wanted, key=lambda task: sum(_row_tokens(data, task)))


def workload(
    data: DataConfig,
    ds_config: dict[str, dict[str, Any]],
    *,
    world_size: int,
    text_tokens: int | None = None,
    answer_tokens: int | None = None,
) -> Workload:
    """The micro-batch of the heaviest task; the two lengths replace what is known of the data sets."""
    task = heaviest_task(data)
    prompt, answer = _row_tokens(data, task)
    rows = micro_batch_size(ds_config)
    shared = data.questions_per_image if task == "vqa" else 1
    return Workload(
        task=task,
        rows=rows,
        images=math.ceil(rows / shared),
        text_tokens=math.ceil(PADDING * (prompt + answer)) if text_tokens is None else text_tokens,
        answer_tokens=answer if answer_tokens is None else answer_tokens,
        accumulation=gradient_accumulation_steps(ds_config),
        world_size=world_size,
    )


def _row_tokens(data: DataConfig, task: str) -> tuple[int, int]:
    """(prompt, answer) tokens of a whole row."""
    text, turns = TASK_TEXT[task], data.max_turns if task == "dialogue" else 1
    return turns * text.prompt, turns * text.answer
