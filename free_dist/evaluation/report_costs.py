"""Where an answer's time goes: vision, prompt, blocks, checks, heads, bookkeeping.

Vision is read off a clock inside the answer.  The rest is counted by the cost model
(``free_dist.evaluation.cost_model``) from the exits that the tokens really took and from pieces measured one by one on
the same machine between the answers; the sum is set against the time measured without any clock inside.  ``prompt`` is
what the blocks cost at the first token, with all the prompt's positions; blocks that read the prompt later, when a
token first goes so deep, count as ``blocks``.

Does not know files or tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from free_dist.backbones import Backbone
from free_dist.data.samples import SampleEncoder
from free_dist.evaluation.arms import ours
from free_dist.evaluation.cost_model import DecodeCosts, ExitSetting, token_costs
from free_dist.evaluation.measure_costs import CostMeter
from free_dist.evaluation.robustness import TaskAnswers
from free_dist.exits import ExitBank
from free_dist.exits.gate import ExitChecks, FullHead

PARTS = ("vision", "prompt", "blocks", "checks", "heads", "bookkeeping")
VISION_SAMPLES = 20
"""Answers whose vision part is timed."""
METER_SAMPLES = 8
"""Times that the pieces are measured per task."""


@dataclass(frozen=True, kw_only=True)
class CostMeasure:
    """Measures pieces of decoding task by task, so that they are spread over the run."""

    backbone: Backbone
    encoder: SampleEncoder
    bank: ExitBank
    method: str
    """Name of the bank among the arms."""
    max_new_tokens: int

    def rows(self, clean: Sequence[TaskAnswers]) -> list[dict[str, Any]]:
        """Rows of ``costs`` in robustness.json: seconds per answer by part, full depth and the bank at each
        threshold."""
        meter = CostMeter(
            self.backbone,
            self.bank,
            {"full": ExitChecks(FullHead(self.bank.lm_head))},
            positions=(1, 2, 4, 8, 16, 32),
            blocks_per_sample=self.backbone.n_blocks,
        )
        meter.sample()
        meter.forget()  # the first calls of anything are slow
        vision: dict[str, float] = {}
        for task in clean:
            vision[task.task] = self._vision(task)
            for _ in range(METER_SAMPLES):
                meter.sample()
        costs = meter.costs()
        return [row for task in clean for row in self._task_rows(task, costs, vision[task.task])]

    def _vision(self, task: TaskAnswers) -> float:
        """Mean seconds from pixels to visual prefix."""
        contestant = ours(self.backbone, method="full", max_new_tokens=self.max_new_tokens)
        device = next(self.backbone.parameters()).device
        found = []
        for number, sample in enumerate(task.samples[: VISION_SAMPLES + 1]):
            pixels = self.encoder.encode_image(sample.image)[None].to(device)
            prompt = self.encoder.encode_prompt(sample.turns)
            split = contestant.split(pixels, prompt, self.encoder.encode_instruction(sample.turns, device))
            if number or len(task.samples) == 1:
                found.append(split.vision)
        return sum(found) / len(found)

    def _task_rows(self, task: TaskAnswers, costs: DecodeCosts, vision: float) -> list[dict[str, Any]]:
        layout = self.backbone.layout
        prompts = [layout.decoder_positions(self.encoder.encode_prompt(sample.turns)) for sample in task.samples]
        rows = []
        for i, arm in enumerate(task.arms):
            if arm.method not in ("full", self.method):
                continue
            setting = None if arm.method == "full" else ExitSetting(layers=self.bank.exit_layers)
            parts = dict.fromkeys(PARTS, 0.0) | {"vision": vision}
            answers = task.answers(i)
            for answer, prompt in zip(answers, prompts, strict=True):
                tokens = token_costs(costs, setting, answer.exits, prompt=prompt)
                for place, token in enumerate(tokens):
                    for name, seconds in token.items():
                        part = "prompt" if name == "blocks" and place == 0 else name
                        parts[part] += seconds / len(answers)
            rows.append(
                {
                    "task": task.task,
                    "method": arm.method,
                    "threshold": arm.threshold,
                    "parts": parts,
                    "measured": sum(answer.seconds for answer in answers) / len(answers),
                    "n": len(answers),
                }
            )
        return rows
