"""Operating points of all methods of a comparison, chosen in the same way on the calibration split, so that the test split can
judge them.

Every setting answers a few samples; of each method the cheapest by weights read that are near the wanted quality answer more; of
those that keep it, the cheapest are timed side by side, and the fastest is taken.  A method that keeps it nowhere stands with its
setting of highest quality.  Does not know the test split.

Shape letters: S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from free_dist.backbones import Backbone
from free_dist.config import Recipe
from free_dist.data.samples import Sample, SampleEncoder
from free_dist.data.stream import required_samples
from free_dist.decoding.generate import generate
from free_dist.evaluation.benchmark import Prompted, run_interleaved
from free_dist.evaluation.comparison import Contest, Method, Setting, method_arm
from free_dist.evaluation.operating_points import SLACK, wanted
from free_dist.evaluation.tasks import TaskScorer

Place = tuple[str, Setting]
"""Name of a method, and one of its settings."""


@dataclass(frozen=True, kw_only=True)
class ChoiceAmounts:
    """How much is run per task to choose."""

    first_samples: int = 8
    """Calibration samples that every setting answers."""
    samples: int = 40
    """Calibration samples on which settings that look good are judged."""
    kept: int = 5
    """Settings of a method that are judged on these."""
    finalists: int = 3
    """Settings of a method that are timed."""
    timed_samples: int = 16
    """Calibration samples on which they are."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The operating point of a method."""

    setting: Setting
    quality_ratio: float | None
    """Of the full model's quality, on the calibration samples; None for a method that never ran on them."""
    keeps: bool | None
    """Whether that is what was wanted, without the margin; otherwise it is the best the method has.  None: it never ran."""


class _Decoded(NamedTuple):
    text: str
    n_tokens: int
    cost: float
    """Weights read, in blocks."""


class SettingJudge:
    """Answers of settings to the calibration samples of a task; each is decoded once."""

    def __init__(self, backbone: Backbone, encoder: SampleEncoder, recipe: Recipe, task: str, count: int) -> None:
        """Takes ``count`` samples; raises ConfigError where there is none."""
        self.samples = required_samples(recipe.data, "calibration", task, max_samples=count)
        self._backbone, self._encoder, self._limit = backbone, encoder, recipe.decoding.max_new_tokens
        self._score = TaskScorer(task, recipe.evaluation, only_quality=True).score
        self._known: dict[tuple[str, Setting | None, int], _Decoded] = {}
        self._prefixes: dict[int, torch.Tensor] = {}
        head, block = backbone.shared_modules()[1], backbone.block(1)
        self._head_cost = sum(p.numel() for p in head.parameters()) / sum(p.numel() for p in block.parameters())

    def judge(self, method: Method | None, setting: Setting | None, count: int) -> tuple[float, float]:
        """(quality, weights read per token in blocks) on the first ``count`` samples; None, None: the full model."""
        found = [self._decode(method, setting, s) for s in range(min(count, len(self.samples)))]
        references = [self.samples[s].references for s in range(len(found))]
        quality = self._score([one.text for one in found], references).quality
        return quality, sum(one.cost for one in found) / sum(one.n_tokens for one in found)

    def _decode(self, method: Method | None, setting: Setting | None, s: int) -> _Decoded:
        key = ("" if method is None else method.name, setting, s)
        if key not in self._known:
            sample = self.samples[s]
            if s not in self._prefixes:
                self._prefixes[s] = self._prefix(sample)
            options = {} if method is None or setting is None else method.options(setting)
            generation = generate(
                self._backbone,
                None if method is None else method.bank,
                None,
                self._encoder.encode_prompt(sample.turns),
                prefix=self._prefixes[s],
                max_new_tokens=self._limit,
                **options,
            )
            calls, per_exit = generation.calls, 0 if method is None else method.bank.blocks_per_exit
            self._known[key] = _Decoded(
                self._encoder.decode(generation[0].tokens),
                len(generation[0].records),
                calls.block_calls + per_exit * calls.exit_calls + self._head_cost * calls.head_calls,
            )
        return self._known[key]

    @torch.inference_mode()
    def _prefix(self, sample: Sample) -> torch.Tensor:
        device = next(self._backbone.parameters()).device
        pixels = self._encoder.encode_image(sample.image)[None].to(device)
        return self._backbone.encode_prefix(pixels, None, self._encoder.encode_instruction(sample.turns, device))


def choose_settings(
    backbone: Backbone,
    encoder: SampleEncoder,
    methods: Contest,
    recipe: Recipe,
    task: str,
    *,
    min_quality: float,
    amounts: ChoiceAmounts,
    prompted: Callable[[Sequence[Sample]], Sequence[Prompted]],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Chosen]:
    """Method name -> operating point that keeps ``min_quality`` of the full model's quality, with a margin, and is fastest.

    ``prompted`` makes samples ready for the clock.  Raises ConfigError for a task without calibration samples.
    """
    judge = SettingJudge(backbone, encoder, recipe, task, amounts.samples)
    bar = wanted(min_quality)
    finalists: dict[Place, float] = {}
    for method in methods:
        if not method.settings:
            continue
        progress(f"{task}: settings of {method.label}")
        settings = _near(judge, method, list(method.settings), amounts, min_quality)
        full, _ = judge.judge(None, None, amounts.samples)
        judged = {setting: judge.judge(method, setting, amounts.samples) for setting in settings}
        shares = {setting: quality / full if full else 1.0 for setting, (quality, _) in judged.items()}
        good = [setting for setting in settings if shares[setting] >= bar or method.lossless]
        cheap = sorted(good, key=lambda setting: judged[setting][1])[: amounts.finalists]
        for setting in cheap or [max(settings, key=lambda setting: shares[setting])]:
            finalists[method.name, setting] = shares[setting]
    progress(f"{task}: timing {len(finalists)} finalists")
    limit = recipe.decoding.max_new_tokens
    places = list(finalists)
    arms = [method_arm(backbone, methods.named(name), setting, max_new_tokens=limit) for name, setting in places]
    step = -(-len(judge.samples) // amounts.timed_samples)
    seconds = [0.0] * len(arms)
    for answers in run_interleaved(arms, prompted(judge.samples[::step])):
        for i, answer in enumerate(answers):
            seconds[i] += 0.0 if answer is None else answer.seconds
    chosen: dict[str, Chosen] = {}
    for i in sorted(range(len(places)), key=lambda i: seconds[i]):
        name, setting = places[i]
        share = finalists[places[i]]
        keeps = share >= min_quality or methods.named(name).lossless
        chosen.setdefault(name, Chosen(setting=setting, quality_ratio=share, keeps=keeps))
    for method in methods:
        if method.like is not None:
            chosen[method.name] = Chosen(setting=chosen[method.like].setting, quality_ratio=None, keeps=None)
    return {method.name: chosen[method.name] for method in methods}


def _near(
    judge: SettingJudge, method: Method, settings: list[Setting], amounts: ChoiceAmounts, min_quality: float
) -> list[Setting]:
    """The settings worth more samples: the cheapest that are near the quality on a few, and the safest."""
    if len(settings) <= amounts.kept:
        return settings
    full, _ = judge.judge(None, None, amounts.first_samples)
    judged = {setting: judge.judge(method, setting, amounts.first_samples) for setting in settings}
    near = [s for s in settings if method.lossless or judged[s][0] >= (min_quality - SLACK) * full]
    left = sorted(near, key=lambda setting: judged[setting][1])[: amounts.kept]
    # In case that all of these prove too bad: the cheapest that lost nothing, and the one of highest quality.
    whole = [s for s in settings if judged[s][0] >= full]
    safe = [min(whole, key=lambda s: judged[s][1])] if whole else []
    safe.append(max(settings, key=lambda s: (judged[s][0], judged[s][1])))
    return list(dict.fromkeys([*left, *safe]))
