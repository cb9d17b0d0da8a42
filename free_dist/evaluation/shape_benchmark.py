"""The benchmark without a checkpoint: scripted exits on random weights of true shapes, against the cost model.

All decoders stand ready at once and take turns token by token, so that drift of the machine hits them alike; the pieces that
the cost model is made of are timed in between.  Every answer begins with a token at full depth, which reads the whole prompt, so
what is compared is decoding alone.  Decisions are scripted: there is no quality here, only time.

Does not know how results are printed.

Shape letters: N tokens of an answer, L blocks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from free_dist.backbones import Backbone, Blip2Backbone
from free_dist.decoding.decoder import Decoder, DecoderOptions
from free_dist.evaluation.benchmark import median_with_interval, ratio_with_interval
from free_dist.evaluation.cost_model import DecodeCosts, ExitSetting, at_positions, predict, typical_script, visit_cost
from free_dist.evaluation.measure_costs import CostMeter
from free_dist.evaluation.shape import Script, ScriptedChecks, random_checks
from free_dist.exits import ExitBank

NEVER = -1
"""End-of-sequence id that no token has: all answers have the same length."""


@dataclass(frozen=True, kw_only=True)
class ShapePlan:
    """How much is measured."""

    distributions: Mapping[str, Mapping[int, float]]
    """Name -> share of tokens per exit layer; the rest goes to full depth."""
    tokens: int = 16
    """Timed tokens per answer; one more, at full depth, opens it."""
    prompt: int = 40
    """Prompt positions, visual ones included."""
    rounds: int = 3
    """Answers per decoder, each with a new script."""
    cost_samples: int = 3
    """Samples of every cost before the first answer; one more is taken at every second token."""
    pruned_size: int = 4096
    """Rows of the pruned exit head."""
    rank: int = 128
    """Rank of the low-rank exit head."""
    false_open: float = 0.2
    """Share of visits without emission at which a gate opens."""
    plain: bool = True
    """Also without gate and with the full head."""
    positions: tuple[int, ...] = (1, 2, 4, 8, 16)
    """New positions at which blocks are timed; those above ``tokens`` are left out."""
    blocks_per_sample: int = 4
    seconds: float | None = None
    """About how long one round may take; answers get as many tokens as fit, ``tokens`` to three times as many."""


@dataclass(frozen=True, kw_only=True)
class ShapeArm:
    """One decoder: how exits are asked and where tokens leave."""

    name: str
    setting: ExitSetting | None
    """None: full depth."""
    shares: Mapping[int, float] = field(default_factory=dict)
    backbone: Backbone
    checks: ScriptedChecks | None = None


class TokenStepper:
    """A decoder that emits one token per call."""

    def __init__(self, arm: ShapeArm, bank: ExitBank, prefix: Tensor, prompt: list[int], script: list[int]) -> None:
        options = DecoderOptions(max_new_tokens=len(script), eos=NEVER, on_token=self._count)
        self._emitted = 0
        policy = None
        if arm.setting is not None:
            policy = Script(script, bank.exit_layers, false_open=arm.setting.false_open, checked=arm.setting.checked)
            assert arm.checks is not None
            arm.checks.script = policy
        self._decoder = Decoder(
            arm.backbone,
            None if policy is None else bank,
            policy,
            arm.checks,
            arm.backbone.start([prompt], prefix),
            options,
        )

    @torch.inference_mode()
    def step(self) -> float:
        """Decode the next token; its seconds."""
        before = self._emitted
        start = time.perf_counter()
        while self._emitted == before:
            self._decoder.step()
        return time.perf_counter() - start

    def _count(self, _row: int, _token: int) -> None:
        self._emitted += 1


@dataclass(frozen=True, kw_only=True)
class ShapeResult:
    """What was measured."""

    costs: DecodeCosts
    arms: list[dict[str, Any]]
    """Per decoder: times, and for exits the measured and the predicted speed-up."""
    cost_model_error: float
    """Largest distance of a predicted from a measured speed-up, as a share of the measured one."""
    check_blocks: float
    """A visit that does not emit, gate first and pruned head, in blocks."""
    check_blocks_plain: float
    """The same without gate and with the full head."""
    mechanism_overhead: float | None
    """Time of a stack that is cut at exits nobody asks over that of an uncut one, less 1."""


def run_shape(
    backbone: Blip2Backbone,
    bank: ExitBank,
    plan: ShapePlan,
    *,
    int8: Backbone | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ShapeResult:
    """Measure all decoders of ``plan``; ``int8``: a quantised copy as one more decoder at full depth.

    ``progress`` is told what begins.
    """
    heads = {"full": 0, "pruned": plan.pruned_size, "low_rank": plan.rank}
    checks = {name: random_checks(backbone, bank, name, gate=False, size=size) for name, size in heads.items()}
    gated = random_checks(backbone, bank, "pruned", gate=True, size=plan.pruned_size)
    positions = [n for n in plan.positions if n <= plan.tokens]
    meter = CostMeter(
        backbone,
        bank,
        checks,
        gated=gated,
        positions=positions,
        past=plan.prompt,
        blocks_per_sample=plan.blocks_per_sample,
    )
    progress("costs")
    meter.sample()  # the first one warms up
    meter.forget()
    for _ in range(plan.cost_samples):
        meter.sample()
    arms = shape_arms(backbone, bank, plan, int8=int8)
    if plan.seconds is not None:
        plan = replace(plan, tokens=_affordable_tokens(plan, meter.costs(), len(arms)))
    prefills: dict[str, list[float]] = {arm.name: [] for arm in arms}
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    layout = backbone.layout
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(1, layout.num_query_tokens, backbone.hidden_size, generator=generator)
    prefix = prefix.to(next(bank.transformers.parameters())) / 50
    words = torch.randint(5, backbone.vocab_size - 5, (plan.prompt - layout.num_query_tokens,), generator=generator)
    prompt = [layout.image_token_id] * layout.num_query_tokens + words.tolist()
    for number in range(plan.rounds):
        progress(f"round {number + 1} of {plan.rounds}")
        costs = meter.costs()
        steppers = {}
        for arm in arms:
            script = _script(arm, costs, plan, seed=number)
            steppers[arm.name] = TokenStepper(arm, bank, prefix, prompt, script)
            prefills[arm.name].append(steppers[arm.name].step())
        order = random.Random(number)
        for place in range(plan.tokens):
            for arm in order.sample(arms, len(arms)):
                times[arm.name].append(steppers[arm.name].step())
            if place % 2:
                meter.sample()
    costs = meter.costs(f"{torch.get_num_threads()} threads, {next(bank.transformers.parameters()).dtype}")
    rows = [_row(arm, costs, plan, times, prefills[arm.name]) for arm in arms]
    errors = [abs(row["error"]) for row in rows if row["error"] is not None]
    mechanism = next((row for row in rows if row["name"] == "mechanism"), None)
    return ShapeResult(
        costs=costs,
        arms=rows,
        cost_model_error=max(errors),
        check_blocks=visit_cost(costs, _cheap(plan, bank)),
        check_blocks_plain=visit_cost(costs, ExitSetting(layers=bank.exit_layers)),
        mechanism_overhead=None if mechanism is None else 1 / mechanism["speedup"] - 1,
    )


def shape_arms(
    backbone: Blip2Backbone, bank: ExitBank, plan: ShapePlan, *, int8: Backbone | None = None
) -> list[ShapeArm]:
    """Full depth, the mechanism alone, and every distribution with cheap and, where the plan wants it, plain checks."""
    full_head = random_checks(backbone, bank, "full", gate=False, size=0)
    unchecked = ExitSetting(layers=bank.exit_layers, checked=False)
    arms = [
        ShapeArm(name="full", setting=None, backbone=backbone),
        ShapeArm(name="mechanism", setting=unchecked, backbone=backbone, checks=full_head),
    ]
    if int8 is not None:
        arms.append(ShapeArm(name="int8", setting=None, backbone=int8))
    for name, shares in plan.distributions.items():
        gated = random_checks(backbone, bank, "pruned", gate=True, size=plan.pruned_size)
        arms.append(ShapeArm(name=name, setting=_cheap(plan, bank), shares=shares, backbone=backbone, checks=gated))
        if plan.plain:
            plain = ExitSetting(layers=bank.exit_layers)
            checks = random_checks(backbone, bank, "full", gate=False, size=0)
            arms.append(
                ShapeArm(name=f"{name}, plain checks", setting=plain, shares=shares, backbone=backbone, checks=checks)
            )
    return arms


@torch.inference_mode()
def vision_seconds(backbone: Blip2Backbone, repeats: int = 1) -> tuple[float, tuple[float, float]]:
    """Median and interval of encoding one image."""
    size = backbone.model.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size).to(next(backbone.parameters()))
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        backbone.encode_prefix(pixels)
        found.append(time.perf_counter() - start)
    return median_with_interval(found)


def _cheap(plan: ShapePlan, bank: ExitBank) -> ExitSetting:
    return ExitSetting(layers=bank.exit_layers, head="pruned", gate=True, false_open=plan.false_open)


def _affordable_tokens(plan: ShapePlan, costs: DecodeCosts, n_arms: int) -> int:
    """Tokens per answer for a round of ``plan.seconds``: no decoder is much slower than full depth, costs take about as long."""
    assert plan.seconds is not None
    prefill = costs.n_blocks * at_positions(costs.block, plan.prompt)
    token = costs.n_blocks * costs.block[1] + costs.head
    affordable = int((plan.seconds - n_arms * prefill) / ((n_arms + 1) * token))
    return min(max(affordable, plan.tokens), 3 * plan.tokens)


def _script(arm: ShapeArm, costs: DecodeCosts, plan: ShapePlan, seed: int) -> list[int]:
    if arm.setting is None or not arm.setting.checked:
        return [costs.n_blocks] * (plan.tokens + 1)
    return typical_script(
        costs, arm.setting, arm.shares, tokens=plan.tokens, prompt=plan.prompt, full_first=True, seed=seed
    )


def _row(
    arm: ShapeArm, costs: DecodeCosts, plan: ShapePlan, times: Mapping[str, list[float]], prefills: list[float]
) -> dict[str, Any]:
    own = times[arm.name]
    speedup, interval = ratio_with_interval(times["full"], own)
    row: dict[str, Any] = {
        "name": arm.name,
        "speedup": speedup,
        "speedup_interval": interval,
        "seconds_per_token": sum(own) / len(own),
        "prefill_seconds": median_with_interval(prefills),
        "tokens": len(own),
        "predicted_speedup": None,
        "error": None,
    }
    if arm.setting is not None and arm.setting.checked:
        expected = predict(costs, arm.setting, arm.shares, tokens=plan.tokens, prompt=plan.prompt, full_first=True)
        row["exit_shares"] = {str(layer): share for layer, share in arm.shares.items()}
        row["predicted_speedup"] = expected.speedup
        row["predicted_parts"] = expected.parts
        row["error"] = expected.speedup / speedup - 1
    return row
