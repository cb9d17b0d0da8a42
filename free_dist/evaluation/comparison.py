"""What a comparison of exit methods consists of: the methods a reviewer expects, and how each may be set.

All methods share one frozen backbone and one decoder; only exits, policy and the treatment of skipped blocks differ:

* exit transformers (FREE, arXiv 2506.06884) by what they were trained with: CE+GAN, CE alone, KL alone;
* independent exit classifiers, a vocabulary head each; left by confidence, by entropy (DeeBERT, arXiv 2004.12993) or by patience
  (PABEE, arXiv 2006.04152);
* a depth that is fixed, read by the logit lens or by an exit transformer;
* CALM (arXiv 2207.07061): the shared head on the raw hidden state, the lead of the best token, propagated states; and our own
  exits with propagated states, which differs from ours in nothing else;
* self-speculation (LayerSkip, arXiv 2404.16710): drafts from the logit lens at one block, verified by the full model; and our own
  exits as drafts.

The baselines are the ideas of these papers on a backbone that stays frozen, not those papers' models: CALM, LayerSkip and DeeBERT
train their backbones for early exits.  Does not know how settings are chosen, measured or printed.

Shape letters: K exits of a bank, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from free_dist.backbones import Backbone, Instruction
from free_dist.decoding.generate import generate
from free_dist.decoding.policy import ExitPolicy, FixedDepthPolicy, make_policy
from free_dist.evaluation.benchmark import Arm, Decoded, Prompt, decoded
from free_dist.evaluation.calibration import OFF
from free_dist.exits import ExitBank, trained_parameters
from free_dist.exits.variants import LENS

FIXED = "fixed depth"
"""Policy that always leaves at one exit, beside those of ``POLICY_NAMES``."""
TRAINED = ("ce_gan", "ce", "kl", "classifier")
"""The trainings that a comparison needs, by the name of their exits."""
OURS = "ce_gan"
"""The method that the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One operating point of a method."""

    used: tuple[int, ...]
    """Indices into the bank of the exits in use."""
    threshold: float | None = None
    """Confidence that is needed; None where the policy needs none."""
    patience: int | None = None
    """Exits in a row that must agree, for the policy ``patience``."""

    def text(self, bank: ExitBank) -> str:
        """For people: exits, threshold, patience."""
        parts = ["block " + "+".join(str(bank.exit_layers[i]) for i in self.used)]
        if self.threshold is not None:
            parts.append(f"> {self.threshold:g}")
        if self.patience is not None:
            parts.append(f"{self.patience} agree")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of leaving early, and the settings among which its operating point is chosen."""

    name: str
    """Key in ``comparison.json``."""
    label: str
    """What it is called in tables."""
    bank: ExitBank
    policy: str
    """One of ``POLICY_NAMES``, or ``fixed depth``."""
    settings: tuple[Setting, ...]
    trained: str | None = None
    """Which of ``TRAINED`` its exits come from; None: nothing was trained."""
    lossless: bool = False
    """Exits draft, the full model verifies."""
    state_propagation: bool = False
    """Skipped blocks see the state that exited."""
    like: str | None = None
    """It takes the operating point of the method of that name, so that nothing else differs; then it has no settings."""
    shown: tuple[Setting, ...] = ()
    """Settings that are rows of the table by themselves, chosen or not."""
    sweep: tuple[Setting, ...] = ()
    """Settings of the sweep."""
    note: str = ""

    def decision(self, setting: Setting) -> ExitPolicy:
        """The policy of a setting."""
        n_exits = len(self.bank.exit_layers)
        if self.policy == FIXED:
            return FixedDepthPolicy(setting.used[0], n_exits)
        threshold = 0.0 if setting.threshold is None else setting.threshold
        thresholds = [threshold if i in setting.used else OFF for i in range(n_exits)]
        return make_policy(self.policy, thresholds, n_exits, patience=setting.patience or 1)

    def options(self, setting: Setting) -> dict[str, Any]:
        """Arguments of ``generate`` besides what all methods share."""
        return {
            "thresholds": self.decision(setting),
            "lossless": self.lossless,
            "state_propagation": self.state_propagation,
        }

    @property
    def trainable_parameters(self) -> int:
        """Numbers that training the exits changes; of all exits of the bank, used or not."""
        return trained_parameters(self.bank)


def method_arm(backbone: Backbone, method: Method, setting: Setting, *, max_new_tokens: int) -> Arm:
    """A method at one setting as an arm for the paired clock."""
    options = method.options(setting) | {"max_new_tokens": max_new_tokens}

    def decode(pixel_values: Tensor, prompt_ids: Prompt, instruction: Instruction | None = None) -> Decoded:
        answer = generate(backbone, method.bank, pixel_values, prompt_ids, instruction=instruction, **options)
        return decoded(answer, method.bank)

    return Arm(method=method.name, threshold=setting.threshold, decode=decode)


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All methods of a comparison."""

    methods: tuple[Method, ...]

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def named(self, name: str) -> Method:
        """The method of that name; raises KeyError."""
        return {method.name: method for method in self.methods}[name]


def contest(backbone: Backbone, banks: Mapping[str, ExitBank], thresholds: Sequence[float]) -> Contest:
    """All methods from the trained ``banks``, one for each name of ``TRAINED``; ``thresholds`` are tried for every policy.

    Single exits and all together are tried, single ones also at threshold 0, where they always emit.
    """
    n_blocks = backbone.n_blocks
    layers = banks[OURS].exit_layers
    # Untrained exits say little where trained ones stand, so they may also stand deeper.
    deep = sorted({round(n_blocks * part) for part in (0.5, 0.625, 0.75, 0.875)} - {n_blocks, 0})
    lens = ExitBank(backbone, sorted({*layers, *deep}), variant=LENS).eval()
    below = [value for value in thresholds if value < 1]

    def exits(name: str, label: str, **more: Any) -> Method:
        everywhere = tuple(range(len(banks[name].exit_layers)))
        policy = more.pop("policy", "max_prob")
        return Method(
            name=more.pop("key", name),
            label=label,
            bank=banks[name],
            policy=policy,
            trained=name,
            settings=more.pop("settings", _thresholded([everywhere, *_single(everywhere)], below)),
            sweep=more.pop("sweep", tuple(Setting(used=everywhere, threshold=value) for value in below)),
            **more,
        )

    k = tuple(range(len(layers)))
    lens_places = tuple(range(len(lens.exit_layers)))
    same_places = tuple(lens.exit_layers.index(layer) for layer in layers)
    deep_places = tuple(lens.exit_layers.index(layer) for layer in deep)
    patient = tuple(Setting(used=k, patience=n) for n in range(2, len(k) + 1))
    patient += tuple(Setting(used=pair, patience=2) for pair in _pairs(k) if len(pair) < len(k))
    cuts = tuple(Setting(used=(i,)) for i in lens_places)
    ours_cut = tuple(Setting(used=(i,)) for i in k)
    methods = [
        exits("ce_gan", "ours: exit transformers, CE+GAN"),
        exits("ce", "exit transformers, CE only"),
        exits("kl", "exit transformers, KL only"),
        exits("classifier", "independent classifiers, confidence"),
        exits("classifier", "independent classifiers, entropy (DeeBERT)", key="deebert", policy="entropy"),
    ]
    if patient:
        methods.append(
            exits(
                "classifier", "independent classifiers, patience (PABEE)", key="pabee", policy="patience",
                settings=patient, sweep=tuple(setting for setting in patient if setting.used == k),
            )
        )  # fmt: skip
    methods += [
        Method(
            name="calm",
            label="logit lens, margin, propagated states (CALM)",
            bank=lens,
            policy="margin",
            state_propagation=True,
            settings=_thresholded([same_places, deep_places, *_single(lens_places)], below),
            sweep=tuple(Setting(used=deep_places, threshold=value) for value in below),
            note="approximate caches; nothing is trained, the original trains its model",
        ),
        Method(
            name="ours_propagated",
            label="ours with propagated states",
            bank=banks[OURS],
            policy="max_prob",
            trained=OURS,
            state_propagation=True,
            settings=(),
            like=OURS,
            sweep=tuple(Setting(used=k, threshold=value) for value in below),
            note="approximate caches; operating point of ours",
        ),
        Method(
            name="cut_lens",
            label="fixed depth, logit lens",
            bank=lens,
            policy=FIXED,
            settings=cuts,
            shown=tuple(cuts[i] for i in same_places),
            sweep=cuts,
        ),
        Method(
            name="cut_ce",
            label="fixed depth, exit transformer CE",
            bank=banks["ce"],
            policy=FIXED,
            trained="ce",
            settings=ours_cut,
            shown=ours_cut,
            sweep=ours_cut,
        ),
        Method(
            name="self_speculation",
            label="self-speculation, logit lens (LayerSkip)",
            bank=lens,
            policy=FIXED,
            lossless=True,
            settings=cuts,
            sweep=cuts[::2],
            note="lossless; nothing is trained, the original trains its model",
        ),
        Method(
            name="ours_lossless",
            label="ours, lossless",
            bank=banks[OURS],
            policy="max_prob",
            trained=OURS,
            lossless=True,
            settings=tuple(Setting(used=(i,), threshold=value) for i in k for value in (0.0, 0.5, 0.9)),
            note="lossless",
        ),
    ]
    return Contest(methods=tuple(methods))


def _single(places: Sequence[int]) -> list[tuple[int, ...]]:
    return [(i,) for i in places] if len(places) > 1 else []


def _pairs(places: Sequence[int]) -> list[tuple[int, int]]:
    return [(a, b) for i, a in enumerate(places) for b in places[i + 1 :]]


def _thresholded(sets: Sequence[tuple[int, ...]], thresholds: Sequence[float]) -> tuple[Setting, ...]:
    """Every set at every threshold; at 0 the shallowest exit always emits, so only sets of one are tried there."""
    return tuple(
        Setting(used=used, threshold=value)
        for used in dict.fromkeys(sets)
        for value in ((0.0, *thresholds) if len(used) == 1 else thresholds)
    )
