"""The failures of adversarial exit training, recognised in the numbers that a run logs.

Every rule reads logged values over a window of logged steps, so a single odd step raises nothing, and the alarms of a run can
be found again from its ``log.jsonl``.  Rules look alike at every rank, because the values are those of all ranks.  Does not
know engines, batches or what is done about an alarm (``free_dist.training.run_watch``).
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log
from statistics import median

from free_dist.config import AlarmsConfig

KL_FLOOR = 0.5
"""Nats by which a KL must also have risen: near zero every ratio is large."""

GAP = 0.1
"""Distance between confidence and agreement that makes exits piled in one place a failure of the threshold."""

CHANCE = 2 * log(2)
"""Loss of a discriminator that tosses a coin."""

BLIND = 0.95
"""Share of real, and of fake, features that get the same verdict from a discriminator that tells nothing apart."""

SHORT = 0.7
"""Length of sample texts with exits over that without, below which exits cut texts short."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One failure, seen at one logged step."""

    step: int
    name: str
    """What fails: ``mode_collapse``, ``discriminator_wins``, ..."""
    message: str
    """Where and by how much, in one line, and what helps."""


class AlarmRules:
    """Judges a run's logged values, step by step; an alarm is raised when a failure begins, and again after it had ended."""

    def __init__(self, config: AlarmsConfig, *, exit_layers: Sequence[int] = (), total_steps: int) -> None:
        self._config = config
        self._exits = tuple(exit_layers)
        self._half = total_steps / 2
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=config.window))
        self._unmoved: deque[frozenset[str]] = deque(maxlen=config.window)
        self._least_kl: dict[str, float] = {}
        self._first_norm: float | None = None
        self._left_half: set[int] = set()
        self._judged: Counter[int] = Counter()
        self._failing: set[tuple[str, str]] = set()

    def look(
        self, step: int, values: Mapping[str, float], *, unmoved: Sequence[str] = (), changed: Sequence[str] = ()
    ) -> list[Alarm]:
        """Alarms that begin at this logged step.

        ``values``: what is logged; ``unmoved``: trained parameters whose gradient was zero or none on every rank;
        ``changed``: frozen weights that are not what they were, whose alarm waits for no window.
        """
        for name, value in values.items():
            if isfinite(value):
                self._recent[name].append(value)
            else:
                self._recent[name].clear()
        self._unmoved.append(frozenset(unmoved))
        rules: tuple[Callable[[], Iterator[tuple[str, str, str]]], ...] = (
            self._mode_collapse,
            self._discriminator,
            self._vanished_gradient,
            self._untrained,
            self._rising_kl,
            self._calibration,
            self._length_bias,
            self._slow_rank,
            self._decoding,
        )
        found = {(name, subject): message for rule in rules for name, subject, message in rule()}
        found |= {
            ("frozen_weight_changed", name): f"{name} is frozen and no longer what it was at the start: something "
            "writes to the backbone, and exits are trained on another model than the one they will be used with"
            for name in changed
        }
        if step < self._half:
            found = {key: message for key, message in found.items() if key[0] not in ("piled_exits", "miscalibration")}
        new = [Alarm(step=step, name=key[0], message=found[key]) for key in found if key not in self._failing]
        self._failing = set(found)
        return new

    def _window(self, name: str) -> Sequence[float]:
        """The last values of a name, or none while there are too few."""
        recent = self._recent.get(name, ())
        return tuple(recent) if len(recent) == self._config.window else ()

    def _remedy(self) -> str:
        """What helps exits that are driven too hard; the adversarial loss is only blamed where there is one."""
        is_adversarial = any(name.startswith("discriminator_accuracy") for name in self._recent)
        return f"lower {'loss.adversarial_weight or ' if is_adversarial else ''}the learning rates"

    def _mode_collapse(self) -> Iterator[tuple[str, str, str]]:
        remedy = self._remedy()
        for k in self._exits:
            near, full = self._window(f"cosine_to_nearest_exit/exit_{k}"), self._window(f"cosine_to_full/exit_{k}")
            if near and full and min(near) > self._config.collapse_cosine and max(full) < min(near) - GAP:
                yield (
                    "mode_collapse",
                    f"cosine {k}",
                    f"exit {k} gives the features of another exit (cosine {min(near):.3f}) and not the full model's "
                    f"({max(full):.3f}): {remedy}",
                )
            for name, what in (("feature_rank_ratio", "directions"), ("token_entropy_ratio", "variety of tokens")):
                ratio = self._window(f"{name}/exit_{k}")
                if ratio and max(ratio) < self._config.collapse_ratio:
                    yield (
                        "mode_collapse",
                        f"{name} {k}",
                        f"exit {k} has {max(ratio):.3f} of the full model's {what}: it says the same of every input; "
                        f"{remedy}",
                    )

    def _discriminator(self) -> Iterator[tuple[str, str, str]]:
        for k in self._exits:
            real = self._window(f"discriminator_accuracy_real/exit_{k}")
            fake = self._window(f"discriminator_accuracy_fake/exit_{k}")
            both = [(a + b) / 2 for a, b in zip(real, fake, strict=True)]
            if any(abs(accuracy - 0.5) > self._config.discriminator_stuck for accuracy in both):
                self._left_half.add(k)
            if both and min(both) >= self._config.discriminator_wins:
                yield (
                    "discriminator_wins",
                    str(k),
                    f"the discriminator of exit {k} is right in {min(both):.3f} and teaches it nothing: lower its learning "
                    "rate in --ds_config, or loss.adversarial_weight",
                )
            self._judged[k] += bool(both)
            never = k not in self._left_half and self._judged[k] > self._config.window
            if both and (never or all(_blind(a, b) for a, b in zip(real, fake, strict=True))):
                yield (
                    "discriminator_loses",
                    str(k),
                    f"the discriminator of exit {k} does not tell exit features from final ones (accuracy "
                    f"{median(both):.3f}, real {real[-1]:.2f}, fake {fake[-1]:.2f}): it does not learn; change its learning "
                    "rate in --ds_config",
                )
            loss = self._window(f"loss_discriminator/exit_{k}")
            if loss and min(loss) > 3 * CHANCE:
                yield (
                    "discriminator_loses",
                    f"loss {k}",
                    f"the discriminator of exit {k} is worse than a coin (loss {min(loss):.3g}, chance {CHANCE:.2f}): it "
                    "diverges; lower its learning rate in --ds_config",
                )

    def _vanished_gradient(self) -> Iterator[tuple[str, str, str]]:
        for name in ("grad_norm/exits", "grad_norm"):
            norms = self._window(name)
            if norms and self._first_norm is None:
                self._first_norm = median(norms)
            if norms and max(norms) <= self._config.vanished_gradient * (self._first_norm or 0.0):
                yield (
                    "vanished_gradient",
                    name,
                    f"{name} fell from {self._first_norm:.2g} to {max(norms):.2g}: nothing is learnt",
                )

    def _untrained(self) -> Iterator[tuple[str, str, str]]:
        if len(self._unmoved) == self._config.window:
            groups: dict[str, list[str]] = {}
            for name in sorted(frozenset.intersection(*self._unmoved)):
                groups.setdefault(owner(name, self._exits), []).append(name.partition(": ")[2])
            for where, names in groups.items():
                yield (
                    "no_training",
                    f"{where} {len(names)}",
                    f"{where}: no gradient, or one of zeros, for {', '.join(names)}: trained, but nothing that is minimised "
                    "depends on it",
                )

    def _rising_kl(self) -> Iterator[tuple[str, str, str]]:
        for name in self._recent:
            kl = self._window(name) if name.startswith("kl_to_full") else ()
            if not kl:
                continue
            least = self._least_kl[name] = min(median(kl), self._least_kl.get(name, median(kl)))
            if min(kl) > self._config.rising_kl * least + KL_FLOOR:
                yield (
                    "forgetting",
                    name,
                    f"{name} rose to {median(kl):.2f} from {least:.2f}: the exit moves away from the full model; "
                    f"{self._remedy()}",
                )

    def _calibration(self) -> Iterator[tuple[str, str, str]]:
        for k in self._exits:
            error, gap = self._window(f"calibration_error/exit_{k}"), self._window(f"confidence_gap/exit_{k}")
            if error and gap and min(error) > self._config.calibration_error:
                trust = "more" if median(gap) > 0 else "less"
                yield (
                    "miscalibration",
                    str(k),
                    f"exit {k} is {trust} sure than it is right (expected calibration error {median(error):.2f}): calibrate "
                    "the threshold before use, or train with loss.temperature",
                )
        if not self._exits:
            return
        first = self._window(f"exit_share/exit_{self._exits[0]}")
        gap = self._window(f"confidence_gap/exit_{self._exits[0]}")
        if first and gap and min(first) >= self._config.piled_share and min(gap) > GAP:
            yield (
                "piled_exits",
                "first",
                f"at decoding.confidence_threshold {min(first):.2f} of the tokens leave at exit {self._exits[0]}, which is "
                f"surer than right by {median(gap):.2f}: raise it",
            )
        none = self._window("step/exit_share_full")
        if none and min(none) >= self._config.piled_share:
            yield (
                "piled_exits",
                "last",
                f"at decoding.confidence_threshold {min(none):.2f} of the tokens leave at no exit: nothing gets faster; "
                "lower it, or train longer",
            )

    def _length_bias(self) -> Iterator[tuple[str, str, str]]:
        for k in self._exits:
            excess = self._window(f"eos_excess/exit_{k}")
            if excess and min(excess) > self._config.eos_excess:
                yield (
                    "length_bias",
                    str(k),
                    f"exit {k} ends texts that the full model goes on with, at {median(excess):.2f} of the tokens",
                )

    def _slow_rank(self) -> Iterator[tuple[str, str, str]]:
        ratio, which = self._window("ranks/slowest_over_median"), self._window("ranks/slowest")
        if ratio and which and len(set(which)) == 1 and min(ratio) > self._config.slow_rank:
            yield (
                "slow_rank",
                str(int(which[0])),
                f"rank {int(which[0])} takes {median(ratio):.1f} times as long as the median rank for its own work: all "
                "others wait for it; look at its machine and its storage",
            )

    def _decoding(self) -> Iterator[tuple[str, str, str]]:
        # Sample texts are few and seldom: they need no window.
        def last(name: str, otherwise: float) -> float:
            return (self._recent.get(name) or (otherwise,))[-1]

        blocks, length = last("samples/blocks_over_claimed", 1.0), last("samples/length_ratio", 1.0)
        if blocks > 1 + 1e-6:
            yield (
                "fake_speed_up",
                "blocks",
                f"{blocks:.2f} blocks are executed for every one that sample texts claim: no speed-up",
            )
        if length < SHORT - 1e-6:
            yield (
                "length_bias",
                "length",
                f"{length:.2f} is the length of sample texts with exits over that without: cut short",
            )
        drift = last("samples/kv_drift", 0.0)
        if drift > self._config.kv_drift:
            yield (
                "kv_drift",
                "samples",
                f"sample texts are decoded with confidences up to {drift:.2f} from those without caches (second halves of "
                f"answers {last('samples/kv_drift_growth', 0.0):+.2f} to the first): cached keys and values are wrong",
            )


def _blind(real: float, fake: float) -> bool:
    return min(real, 1 - fake) > BLIND or min(1 - real, fake) > BLIND


def owner(name: str, exit_layers: Sequence[int]) -> str:
    """Engine and exit of a watched parameter: ``exits: transformers.1.fc1.weight`` -> ``engine exits, exit 4``."""
    engine, _, parameter = name.partition(": ")
    parts = parameter.split(".")
    return f"engine {engine}" + (f", exit {exit_layers[int(parts[1])]}" if parts[0] == "transformers" else "")
