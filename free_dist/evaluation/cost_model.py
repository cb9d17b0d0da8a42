"""A cost model of decoding with early exits: from measured costs of blocks, heads and checks to time per token and speed-up.

It walks an answer as the decoder does.  A token runs segments from shallow to deep until the exit that emits it; positions that
left earlier wait before deeper segments and run with the next token that goes there, in one call that costs what a block costs
at so many positions.  Exits on the way are asked, and cost a gate, an exit transformer and a head, or a gate alone.  The prompt
is the first thing that waits.  An exit distribution becomes scripts that meet its shares, in random order, and their mean.

Pure arithmetic: does not know models, tensors or how costs were measured, and nothing of batches or lossless mode.

Shape letters: N tokens of an answer, K exits, L blocks.
"""

from __future__ import annotations

import bisect
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from free_dist.atomic import write_atomically
from free_dist.config import ConfigError, MissingFileError, UserError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DecodeCosts:
    """Measured costs, in seconds; one sequence."""

    n_blocks: int
    """Blocks of the stack, L."""
    block: Mapping[int, float]
    """New positions in one call -> one block."""
    last_block: Mapping[int, float]
    """The same for a block that caches all positions and computes the last output alone; exits that are blocks always do."""
    head: float
    """Final norm, the backbone's own head and the choice of a token, at full depth."""
    exit_heads: Mapping[str, float]
    """Final norm, head and decision of an exit at one position, by the head's name, such as ``full`` or ``pruned``."""
    gate: float
    """Asking a gate."""
    token: float
    """Bookkeeping of one token: embedding it and letting it enter the stack."""
    segment: float
    """Bookkeeping of one call of a segment or an exit transformer, whatever its blocks."""
    exit_transformer: float | None = None
    """An exit transformer that is no block and reads the last position alone (``bottleneck``); None: exits are blocks."""
    origin: str = ""
    """What was measured, in words."""

    def __post_init__(self) -> None:
        for name, curve in (("block", self.block), ("last_block", self.last_block)):
            if 1 not in curve or min(curve) < 1:
                raise ConfigError(f"costs: {name} has positions {sorted(curve)}; want 1 and, if any, larger ones")
        singles = {"head": self.head, "gate": self.gate, "token": self.token, "segment": self.segment}
        if self.exit_transformer is not None:
            singles["exit_transformer"] = self.exit_transformer
        for name, value in [*_entries("block", self.block), *_entries("last_block", self.last_block), *singles.items()]:
            if not value >= 0:
                raise ConfigError(f"costs: {name}={value}: want seconds, 0 or more")

    def in_blocks(self, seconds: float) -> float:
        """A time in units of one block at one position."""
        return seconds / self.block[1]

    def exit_at(self, positions: float) -> float:
        """Seconds of an exit transformer that so many positions reached since it was last asked."""
        return at_positions(self.last_block, positions) if self.exit_transformer is None else self.exit_transformer


@dataclass(frozen=True, kw_only=True)
class ExitSetting:
    """Which exits are asked, and how."""

    layers: tuple[int, ...]
    """Blocks the exits follow, shallow to deep."""
    head: str = "full"
    """Which of the costs' exit heads decides."""
    gate: bool = False
    """A gate is asked first; it opens wherever the exit emits."""
    false_open: float = 0.0
    """Share of the other visits where it opens in vain."""
    checked: bool = True
    """False: the stack is cut at the exits but none is asked, which leaves the mechanism's own cost."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model expects of an answer; times in seconds."""

    seconds_per_token: float
    full_seconds_per_token: float
    """Without exits."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds per token by what they go to: blocks, checks, heads (of full depth), bookkeeping."""

    @property
    def speedup(self) -> float:
        """Full depth's time over this one's; above 1 is faster."""
        return self.full_seconds_per_token / self.seconds_per_token


def at_positions(curve: Mapping[int, float], positions: float) -> float:
    """A measured curve at any number of positions: linear in between, and with its last slope beyond."""
    known = sorted(curve)
    if positions <= known[0] or len(known) == 1:
        return curve[known[0]]
    upper = min(bisect.bisect_left(known, positions), len(known) - 1)
    a, b = known[upper - 1], known[upper]
    return curve[a] + (curve[b] - curve[a]) * (positions - a) / (b - a)


def token_costs(
    costs: DecodeCosts, exits: ExitSetting | None, script: Sequence[int], *, prompt: int
) -> list[dict[str, float]]:
    """Per token of an answer, its seconds by part.

    ``script``: for each token the exit layer that emits it, or L for full depth.  ``prompt``: positions read before the first
    token.  A gate that opens in vain with some probability is followed in its mean.
    """
    layers = exits.layers if exits is not None else ()
    _check_layers(layers, costs.n_blocks)
    segments = list(pairwise((0, *layers, costs.n_blocks)))
    waiting = [float(prompt)] + [0.0] * len(layers)
    unread = [0.0] * len(layers)  # positions whose keys and values an exit transformer lacks
    found = []
    for place, layer in enumerate(script):
        if layer != costs.n_blocks and layer not in layers:
            raise ValueError(f"script: token {place} leaves after block {layer}, exits follow {list(layers)}")
        parts = {"blocks": 0.0, "checks": 0.0, "heads": 0.0, "bookkeeping": costs.token}
        if place:
            waiting[0] += 1
        for depth, (start, stop) in enumerate(segments):
            n, waiting[depth] = waiting[depth], 0.0
            parts["bookkeeping"] += costs.segment
            if depth == len(layers):
                parts["blocks"] += (stop - start - 1) * at_positions(costs.block, n)
                parts["blocks"] += at_positions(costs.last_block, n)
                parts["heads"] += costs.head
                break
            parts["blocks"] += (stop - start) * at_positions(costs.block, n)
            waiting[depth + 1] += n
            unread[depth] += n
            assert exits is not None
            emits = layer == stop
            if exits.checked:
                asked = 1.0 if emits or not exits.gate else exits.false_open
                check = costs.exit_at(unread[depth]) + costs.exit_heads[exits.head]
                parts["checks"] += asked * check + (costs.gate if exits.gate else 0.0)
                parts["bookkeeping"] += asked * costs.segment  # an exit transformer is called like a segment
                unread[depth] *= 1 - asked
            if emits:
                break
        found.append(parts)
    return found


def predict(
    costs: DecodeCosts,
    exits: ExitSetting,
    shares: Mapping[int, float],
    *,
    tokens: int,
    prompt: int,
    full_first: bool = False,
    draws: int = 100,
    seed: int = 0,
) -> Prediction:
    """The mean over ``draws`` answers of ``tokens`` tokens whose exits are distributed as ``shares`` (layer -> share) says.

    What ``shares`` leave to 1 goes to full depth.  ``full_first``: a first token at full depth, outside the shares and outside
    the time, so that the whole prompt has been read: what is predicted is decoding alone.  Raises UserError for unusable shares.
    """
    if exits.head not in costs.exit_heads:
        raise UserError(f"exit head {exits.head!r} was not measured; the costs have {', '.join(costs.exit_heads)}")
    generator = random.Random(seed)
    opening = [costs.n_blocks] * full_first
    parts = {"blocks": 0.0, "checks": 0.0, "heads": 0.0, "bookkeeping": 0.0}
    for _ in range(draws):
        script = opening + draw_script(shares, tokens, costs.n_blocks, generator)
        for token in token_costs(costs, exits, script, prompt=prompt)[len(opening) :]:
            for name, seconds in token.items():
                parts[name] += seconds / (draws * tokens)
    full = token_costs(costs, None, [costs.n_blocks] * (len(opening) + tokens), prompt=prompt)[len(opening) :]
    return Prediction(
        seconds_per_token=sum(parts.values()),
        full_seconds_per_token=sum(sum(token.values()) for token in full) / tokens,
        parts=parts,
    )


def draw_script(shares: Mapping[int, float], tokens: int, n_blocks: int, generator: random.Random) -> list[int]:
    """``tokens`` exit layers in random order that meet ``shares`` as closely as whole tokens can; the rest is L."""
    total = sum(shares.values())
    if any(not 0 <= share <= 1 for share in shares.values()) or total > 1 + 1e-9:
        raise UserError(f"exit shares {dict(shares)}: want numbers from 0 to 1 with a sum of at most 1")
    whole = dict(shares)
    whole[n_blocks] = whole.get(n_blocks, 0.0) + max(0.0, 1 - total)
    counts = {layer: int(share * tokens) for layer, share in whole.items()}
    # Largest remainders get the tokens that rounding down left over.
    by_remainder = sorted(whole, key=lambda layer: counts[layer] - whole[layer] * tokens)
    for layer in by_remainder[: tokens - sum(counts.values())]:
        counts[layer] += 1
    script = [layer for layer, count in counts.items() for _ in range(count)]
    generator.shuffle(script)
    return script


def typical_script(
    costs: DecodeCosts,
    exits: ExitSetting,
    shares: Mapping[int, float],
    *,
    tokens: int,
    prompt: int,
    full_first: bool = False,
    draws: int = 100,
    seed: int = 0,
) -> list[int]:
    """Of ``draws`` scripts with these shares, the one whose predicted time is nearest to their mean.

    The order of a few tokens decides how many positions are never caught up, so one script drawn blindly says little about a
    distribution.  The first entry is L where ``full_first``; it comes in addition to ``tokens``.
    """
    generator = random.Random(seed)
    opening = [costs.n_blocks] * full_first
    scripts = [opening + draw_script(shares, tokens, costs.n_blocks, generator) for _ in range(draws)]
    times = [
        sum(sum(token.values()) for token in token_costs(costs, exits, script, prompt=prompt)[len(opening) :])
        for script in scripts
    ]
    mean = sum(times) / draws
    return min(zip(times, scripts, strict=True), key=lambda pair: abs(pair[0] - mean))[1]


def visit_cost(costs: DecodeCosts, exits: ExitSetting) -> float:
    """Extra cost, in blocks, of visiting an exit that does not emit: gate, and what a gate opened in vain leads to."""
    asked = exits.false_open if exits.gate else 1.0
    seconds = asked * (costs.exit_at(1) + costs.exit_heads[exits.head]) + (costs.gate if exits.gate else 0.0)
    return costs.in_blocks(seconds)


def save_costs(costs: DecodeCosts, path: str | Path) -> None:
    """Write measured costs as JSON."""
    content = {"format_version": FORMAT_VERSION} | asdict(costs)
    write_atomically(Path(path), json.dumps(content, indent=1).encode() + b"\n")


def load_costs(path: str | Path) -> DecodeCosts:
    """Inverse of :func:`save_costs`; raises MissingFileError or ConfigError naming the file."""
    if not Path(path).is_file():
        raise MissingFileError(f"{path} does not exist: give a file of measured costs (launch/plan.py decode --save)")
    try:
        content = json.loads(Path(path).read_text())
        if content.pop("format_version", None) != FORMAT_VERSION:
            raise ConfigError(f"not of format {FORMAT_VERSION}")
        for name in ("block", "last_block"):
            content[name] = {int(positions): float(seconds) for positions, seconds in content[name].items()}
        return DecodeCosts(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of decoding costs ({error}); measure them again") from error


def _entries(name: str, curve: Mapping[int, float]) -> list[tuple[str, float]]:
    return [(f"{name}[{positions}]", seconds) for positions, seconds in curve.items()]


def _check_layers(layers: Sequence[int], n_blocks: int) -> None:
    if list(layers) != sorted(set(layers)) or (layers and not 1 <= layers[0] <= layers[-1] < n_blocks):
        raise UserError(f"exit layers {list(layers)}: want increasing block numbers from 1 to {n_blocks - 1}")
