#!/usr/bin/env python
"""Predict, before anything is trained or run, what a choice of exits will cost or save.

`decode` predicts the speed of decoding one sequence from the costs of blocks, heads and checks, measured here or read from
a file, and from the share of tokens that leave at each exit. The last line is one JSON object.

`params` counts what exits of every kind would train on every published backbone, without weights.

`memory` predicts bytes per GPU, operations per sample and hours per epoch of a run, without weights or GPUs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from free_dist.config import EXIT_VARIANTS, UserError
from free_dist.ds_config import gradient_accumulation_steps, micro_batch_size, read_ds_config
from free_dist.recipe_checks import check_rows_per_step
from free_dist.recipe_io import fail_clearly, load_recipe, positive_integer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from free_dist.evaluation.cost_model import DecodeCosts
    from free_dist.evaluation.parameter_table import ExitCount

MEASURED = "measured"
MEASURED_SAMPLES = 5
TABLE_WIDTH = 120
PRUNED_SHARE = 12
"""A pruned head keeps one row in so many, as 4,096 of OPT's 50,272."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    decode_parser = commands.add_parser("decode", help="speed of decoding with early exits")
    add_decode_arguments(decode_parser)
    params_parser = commands.add_parser("params", help="parameters of every kind of exit on every backbone")
    add_params_arguments(params_parser)
    memory_parser = commands.add_parser(
        "memory", help="memory per GPU, operations per sample, hours per epoch of a run"
    )
    add_memory_arguments(memory_parser)
    arguments = parser.parse_args()
    if arguments.command == "memory":
        with fail_clearly(memory_parser):
            memory(arguments)
    elif arguments.command == "params":
        with fail_clearly(params_parser):
            params(arguments)
    else:
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
    parser.add_argument(
        "--variant",
        choices=EXIT_VARIANTS,
        default="full",
        help="kind of exit that is measured; a merged lora decodes as full does (default: %(default)s)",
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
    measured = arguments.costs == MEASURED
    costs = measure(arguments.shape, longest, arguments.variant) if measured else load_costs(arguments.costs)
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


def add_params_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``params``."""
    parser.add_argument("--backbone", action="append", metavar="NAME", help="only this one; may be given several times")
    parser.add_argument(
        "--exits",
        type=positive_integer,
        nargs="+",
        default=[1, 3, 5],
        metavar="K",
        help="numbers of exits to count (default: 1 3 5)",
    )
    parser.add_argument("--rank", type=positive_integer, default=16, help="of lora (default: %(default)s)")
    parser.add_argument(
        "--bottleneck-size", type=positive_integer, help="of bottleneck (default: a quarter of the model's width)"
    )
    parser.add_argument(
        "--discriminator-hidden-size", type=positive_integer, default=256, help="(default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def params(arguments: argparse.Namespace) -> None:
    """Print the parameter table, or its JSON."""
    from rich.console import Console
    from rich.table import Table

    from free_dist.evaluation import parameter_table as tables

    counts = tables.parameter_table(
        arguments.backbone or tables.PUBLISHED_BACKBONES,
        rank=arguments.rank,
        bottleneck_size=arguments.bottleneck_size,
        discriminator_hidden_size=arguments.discriminator_hidden_size,
    )
    if arguments.json:
        print(json.dumps(tables.as_json(counts)))
        return
    exits = sorted(set(arguments.exits))
    table = Table(
        "backbone",
        "exit",
        *("per exit", "of a block", "classifier", "saved"),
        *(f"K={n}" for n in exits),
        title="Millions of parameters that exits train (+ discriminators, in training alone)",
        box=None,
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for count in counts:
        sums = [f"{count.trained(n) / 1e6:.1f} + {n * count.discriminator / 1e6:.1f}" for n in exits]
        table.add_row(
            count.backbone if count.variant.name == "full" else "",
            count.variant.name,
            f"{count.per_exit / 1e6:.2f}",
            f"{count.per_exit / count.block:.1%}",
            f"{count.classifier / 1e6:.1f}",
            f"{count.saving:.1%}",
            *sums,
        )
    Console(width=max(TABLE_WIDTH, 80 + 16 * len(exits)), highlight=False).print(table)
    for line in params_remarks(counts):
        print(line)


def params_remarks(counts: Sequence[ExitCount]) -> Iterator[str]:
    """What the table means, against what the paper says."""
    from free_dist.evaluation import parameter_table as tables

    yield ""
    yield "classifier: an independent exit classifier, which is a trainable vocabulary head (width x vocabulary) at every exit;"
    yield "saved: the share of its parameters that an exit does not have. Both are per exit, so K does not change the share."
    enough = tables.variants_that_save(counts)
    named = ", ".join(f"{name} (at least {saving:.1%})" for name, saving in enough.items())
    yield f"saving {tables.PAPER_SAVING:.0%} or more on every backbone above: {named or 'none'}."
    yield ""
    classifier = tables.PAPER_CLASSIFIER / 1e6
    yield f"The paper says {tables.PAPER_SAVING:.0%} on OPT-2.7B, against {classifier:.0f}M for a classifier. By what is counted:"
    for name, n in tables.paper_claim().items():
        yield f"  {n / 1e6:6.1f}M saves {1 - n / tables.PAPER_CLASSIFIER:6.1%}  {name}"
    yield "The first is what the paper describes and what is trained here. The class that saves 52% has cross-attention, which"
    yield "OPT's blocks lack, and a fifth of their inner width; that the paper counted it is our reading, not its statement."


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


def measure(shape: str, longest: int, variant: str) -> DecodeCosts:
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
    bank = ExitBank(backbone, [1], variant=variant).merged().eval().requires_grad_(False)
    sizes = {"full": 0, "pruned": backbone.vocab_size // PRUNED_SHARE, "low_rank": backbone.hidden_size // 20}
    checks = {name: random_checks(backbone, bank, name, gate=False, size=size) for name, size in sizes.items()}
    gated = random_checks(backbone, bank, "pruned", gate=True, size=sizes["pruned"])
    positions = [n for n in (1, 2, 4, 8, 16, 32) if n <= max(longest, 2)]
    meter = CostMeter(backbone, bank, checks, gated=gated, positions=positions)
    meter.sample()  # the first one warms up
    meter.forget()
    for _ in range(MEASURED_SAMPLES):
        meter.sample()
    costs = meter.costs(f"measured on random weights of {shape}, {variant} exits, {torch.get_num_threads()} threads")
    return replace(costs, n_blocks=n_blocks)


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``memory``."""
    parser.add_argument(
        "--backbone",
        required=True,
        metavar="B",
        help="a published name (a wrong one lists them) or a Hugging Face directory",
    )
    parser.add_argument(
        "--ds_config", required=True, metavar="FILE", help="how the run is distributed; see ds_configs/"
    )
    parser.add_argument("--world", type=positive_integer, required=True, metavar="N", help="number of GPUs")
    parser.add_argument("--config", action="append", metavar="FILE", help="recipe YAML, as for launch/train.py")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), default=2, help="1: the backbone itself; 2: exits (default)"
    )
    parser.add_argument(
        "--text-tokens", type=positive_integer, metavar="N", help="text positions of the longest row; default: by task"
    )
    parser.add_argument(
        "--answer-tokens", type=positive_integer, metavar="N", help="answer tokens of a mean row; default: by task"
    )
    parser.add_argument(
        "--gpu-gb", type=float, default=80.0, help="memory of a GPU in 10^9 bytes (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu-tflops",
        type=float,
        default=312.0,
        help="peak of a GPU; the default is an A100's in bfloat16 (%(default)s)",
    )
    parser.add_argument(
        "--mfu", type=float, default=0.3, help="share of the peak that is reached (default: %(default)s)"
    )
    parser.add_argument("--samples", type=positive_integer, metavar="N", help="rows of an epoch; default: by data.root")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def memory(arguments: argparse.Namespace) -> None:
    """Print what a run will hold and compute."""
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu {arguments.mfu}: want a share above 0, at most 1")
    recipe = load_recipe(arguments.config)
    ds_config = read_ds_config(arguments.ds_config)
    rows = micro_batch_size(ds_config) * gradient_accumulation_steps(ds_config) * arguments.world
    check_rows_per_step(recipe, rows, f"{arguments.ds_config} on {arguments.world} GPUs")

    from free_dist.planning.memory import plan_memory
    from free_dist.planning.report import epoch_samples, plan_json, plan_lines

    plan = plan_memory(
        arguments.backbone,
        recipe,
        ds_config,
        world_size=arguments.world,
        stage=arguments.stage,
        text_tokens=arguments.text_tokens,
        answer_tokens=arguments.answer_tokens,
        gpu_bytes=arguments.gpu_gb * 1e9,
    )
    found = plan_json(
        plan,
        gpu_gb=arguments.gpu_gb,
        samples=arguments.samples or epoch_samples(recipe.data),
        gpu_tflops=arguments.gpu_tflops,
        mfu=arguments.mfu,
    )
    print(json.dumps(found) if arguments.json else "\n".join(plan_lines(found)))


if __name__ == "__main__":
    main()
