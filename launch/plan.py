#!/usr/bin/env python
"""Predict, before anything is trained or run, what a choice of exits will cost or save.

`decode` predicts the speed of decoding one sequence from the costs of blocks, heads and checks, measured here or read from
a file, and from the share of tokens that leave at each exit. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from free_dist.config import UserError
from free_dist.recipe_io import fail_clearly

if TYPE_CHECKING:
    from free_dist.evaluation.cost_model import DecodeCosts

MEASURED = "measured"
MEASURED_SAMPLES = 5
PRUNED_SHARE = 12
"""A pruned head keeps one row in so many, as 4,096 of OPT's 50,272."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    decode_parser = commands.add_parser("decode", help="speed of decoding with early exits")
    add_decode_arguments(decode_parser)
    arguments = parser.parse_args()
    with fail_clearly(decode_parser):
        decode(arguments)


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``decode``."""
    parser.add_argument(
        "--costs",
        default=MEASURED,
        metavar="FILE",
        help="costs that --save or launch/benchmark.py --save-costs wrote; default: measured now, on --shape",
    )
    parser.add_argument(
        "--shape",
        choices=("embedded", "opt-2.7b"),
        default="embedded",
        help="random weights to measure on; opt-2.7b takes 2 GB and a minute (default: %(default)s)",
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the costs to a file")
    parser.add_argument(
        "--exit-shares",
        required=True,
        metavar="LAYER:SHARE,...",
        help="share of tokens that leave after each exit layer, such as 6:0.5,12:0.2; the rest goes to full depth",
    )
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer (default: %(default)s)")
    parser.add_argument(
        "--prompt", type=int, default=40, help="prompt positions, visual ones too (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-read", action="store_true", help="predict decoding alone, after a first token at full depth"
    )
    parser.add_argument(
        "--head", default="full", help="which exit head decides: full, pruned, ... (default: %(default)s)"
    )
    parser.add_argument("--gate", action="store_true", help="a gate is asked before each exit")
    parser.add_argument(
        "--false-open", type=float, default=0.2, metavar="SHARE", help="visits that a gate lets through in vain"
    )


def decode(arguments: argparse.Namespace) -> None:
    """Print what the cost model predicts."""
    shares = parse_shares(arguments.exit_shares)
    for name in ("tokens", "prompt"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: want at least 1")
    if not 0 <= arguments.false_open <= 1:
        raise UserError(f"--false-open {arguments.false_open}: want a share from 0 to 1")

    from free_dist.evaluation.cost_model import ExitSetting, load_costs, predict, save_costs, visit_cost

    # What waits at once is at most the answer, or the prompt where it is read lazily.
    longest = arguments.tokens if arguments.prompt_read else max(arguments.tokens, arguments.prompt)
    costs = measure(arguments.shape, longest) if arguments.costs == MEASURED else load_costs(arguments.costs)
    if arguments.save is not None:
        save_costs(costs, arguments.save)
    setting = ExitSetting(
        layers=tuple(sorted(shares)),
        head=arguments.head,
        gate=arguments.gate,
        false_open=arguments.false_open if arguments.gate else 0.0,
    )
    expected = predict(
        costs,
        setting,
        shares,
        tokens=arguments.tokens,
        prompt=arguments.prompt,
        full_first=arguments.prompt_read,
    )
    visit = visit_cost(costs, setting)
    print(f"costs: {costs.origin or arguments.costs}; one block {1e3 * costs.block[1]:.3f} ms")
    curve = ", ".join(f"{n}: {costs.in_blocks(seconds):.2f}" for n, seconds in sorted(costs.block.items()))
    print(f"a block at new positions, in blocks at one position: {curve}")
    heads = ", ".join(f"{name} {costs.in_blocks(seconds):.2f}" for name, seconds in costs.exit_heads.items())
    print(f"heads in blocks: {heads}; gate {costs.in_blocks(costs.gate):.3f}; a fruitless visit {visit:.2f}")
    for name, seconds in expected.parts.items():
        print(f"  {name:<12}{1e3 * seconds:9.2f} ms per token")
    print(f"  {'together':<12}{1e3 * expected.seconds_per_token:9.2f} ms per token")
    print(f"  {'full depth':<12}{1e3 * expected.full_seconds_per_token:9.2f} ms per token")
    print(f"speed-up {expected.speedup:.2f}")
    print(
        json.dumps(
            {"speedup": expected.speedup, "exit_shares": {str(k): v for k, v in shares.items()}, "visit_blocks": visit}
            | asdict(expected)
        )
    )


def parse_shares(text: str) -> dict[int, float]:
    """``6:0.5,12:0.2`` -> {6: 0.5, 12: 0.2}; raises UserError."""
    shares: dict[int, float] = {}
    for entry in text.split(","):
        layer, _, share = entry.partition(":")
        try:
            shares[int(layer)] = float(share)
        except ValueError as error:
            raise UserError(f"--exit-shares {text}: {entry!r} is not LAYER:SHARE, such as 6:0.5") from error
    return shares


def measure(shape: str, longest: int) -> DecodeCosts:
    """Time the pieces of decoding on random weights, blocks at up to ``longest`` positions."""
    import torch

    from free_dist.backbones import Blip2Backbone
    from free_dist.backbones.embedded import new_model
    from free_dist.evaluation.measure_costs import CostMeter
    from free_dist.evaluation.shape import OPT_2_7B, random_backbone, random_checks
    from free_dist.exits import ExitBank

    if shape == "embedded":
        backbone = Blip2Backbone(new_model().eval().requires_grad_(False))
        n_blocks = backbone.n_blocks
    else:
        # Eight blocks are more than any processor cache holds, so they cost what each of 32 does.
        backbone = random_backbone(replace(OPT_2_7B, n_blocks=8), dtype=torch.bfloat16)
        n_blocks = OPT_2_7B.n_blocks
    bank = ExitBank(backbone, [1]).eval().requires_grad_(False)
    sizes = {"full": 0, "pruned": backbone.vocab_size // PRUNED_SHARE, "low_rank": backbone.hidden_size // 20}
    checks = {name: random_checks(backbone, bank, name, gate=False, size=size) for name, size in sizes.items()}
    gated = random_checks(backbone, bank, "pruned", gate=True, size=sizes["pruned"])
    positions = [n for n in (1, 2, 4, 8, 16, 32) if n <= max(longest, 2)]
    meter = CostMeter(backbone, bank, checks, gated=gated, positions=positions)
    meter.sample()  # the first one warms up
    meter.forget()
    for _ in range(MEASURED_SAMPLES):
        meter.sample()
    costs = meter.costs(f"measured on random weights of {shape}, {torch.get_num_threads()} threads")
    return replace(costs, n_blocks=n_blocks)


if __name__ == "__main__":
    main()
