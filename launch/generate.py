#!/usr/bin/env python
"""Answer a prompt about images with early exits; every token is coloured by the exit it left from.

Several images are answered in one batch. On a terminal a single answer appears token by token, as tokens become final. Colours
need a terminal; NO_COLOR switches them off, FORCE_COLOR on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from free_dist.config import (
    EMBEDDED_BACKBONE,
    EXIT_HEADS,
    POLICY_NAMES,
    TASKS,
    BackboneConfig,
    ConfigError,
    DataConfig,
    DecodingConfig,
    MissingFileError,
    UserError,
)
from free_dist.recipe_io import add_device_arguments, fail_clearly, positive_integer

if TYPE_CHECKING:
    from rich.console import Console

    from free_dist.data.samples import SampleEncoder
    from free_dist.decoding.pipeline import Answer
    from free_dist.decoding.policy import ExitPolicy
    from free_dist.exits.manifest import ExitsManifest

DEFAULT_EXITS = Path("runs/quickstart/exits/export")
EXIT_COLOURS = (
    "green", "cyan", "yellow", "magenta", "blue", "bright_green", "bright_cyan", "bright_yellow", "bright_magenta",
    "bright_blue",
)  # fmt: skip
FULL_DEPTH_COLOUR = "red"


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        check_arguments(arguments)
        for path in arguments.images:
            check_image(path)
        run(arguments)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file (PNG or JPEG)")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--question", metavar="TEXT", help="asked as the exits' training questions were")
    prompts.add_argument("--prompt", metavar="TEXT", help="the whole text before the answer, as it is")
    prompts.add_argument(
        "--caption", action="store_true", help="describe the image, prompted as in the exits' training"
    )
    parser.add_argument(
        "--exits", type=Path, default=DEFAULT_EXITS, metavar="DIR",
        help="directory with exits.safetensors and exits.json (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--backbone", default=EMBEDDED_BACKBONE, help="Hugging Face directory, or embedded (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model.bin where --backbone has no safetensors"
    )
    add_device_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per image and line, nothing else")
    parser.add_argument("--no-color", action="store_true", help="no colours, even on a terminal")

    exits = parser.add_argument_group("exits")
    exits.add_argument(
        "--threshold", type=confidences, metavar="CONFIDENCE",
        help="for every exit, or one per exit as in 0.9,0.8,0.7: 0 always exits, 1 or more never; default: as exported",
    )  # fmt: skip
    exits.add_argument(
        "--policy", choices=POLICY_NAMES, default="max_prob", help="what confidence is (default: %(default)s)"
    )
    exits.add_argument(
        "--patience", type=positive_integer, metavar="EXITS",
        help="exits in a row that must agree, with --policy patience (default: 2)",
    )  # fmt: skip
    exits.add_argument(
        "--calibrated", choices=TASKS, metavar="TASK", help=f"thresholds of launch/calibrate.py for {', '.join(TASKS)}"
    )
    exits.add_argument("--gate", action="store_true", help="a fitted gate tells which checks are worth making")
    exits.add_argument(
        "--exit-head", choices=EXIT_HEADS, default="full",
        help="what exits read tokens with; launch/fit_checks.py fits the smaller ones (default: %(default)s)",
    )  # fmt: skip
    exits.add_argument(
        "--lossless", action="store_true", help="exits only draft: the full model checks every token before it is final"
    )

    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--max-new-tokens", type=positive_integer, metavar="TOKENS",
        help=f"longest answer; default: that of the exits' recipe, or {DecodingConfig.max_new_tokens}",
    )  # fmt: skip
    decoding.add_argument(
        "--num-beams",
        type=positive_integer,
        default=1,
        metavar="BEAMS",
        help="beam search above 1 (default: %(default)s)",
    )
    decoding.add_argument("--do-sample", action="store_true", help="draw tokens instead of taking the most likely")
    decoding.add_argument(
        "--temperature", type=temperature, help="with --do-sample: below 1 is more careful (default: 1)"
    )
    decoding.add_argument(
        "--top-k", type=positive_integer, metavar="K", help="with --do-sample: only the K most likely"
    )
    decoding.add_argument(
        "--top-p",
        type=share,
        metavar="P",
        help="with --do-sample: only the most likely, up to a probability of P in all",
    )
    decoding.add_argument("--seed", type=int, help="with --do-sample: draws repeat with their seed (default: 0)")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Flags that do not go together, and exits that are not there; before torch is imported."""
    if not arguments.exits.is_dir():
        made_by = "make quickstart" if arguments.exits == DEFAULT_EXITS else "launch/train.py"
        raise MissingFileError(f"--exits {arguments.exits}: no such directory; {made_by} writes one")
    for name in ("temperature", "top_k", "top_p", "seed"):
        if vars(arguments)[name] is not None and not arguments.do_sample:
            raise ConfigError(f"--{name.replace('_', '-')} has a meaning only with --do-sample; add that, or drop it")
    if arguments.num_beams > 1 and (arguments.do_sample or arguments.lossless):
        other = "--do-sample" if arguments.do_sample else "--lossless"
        raise ConfigError(f"--num-beams {arguments.num_beams} does not go with {other}; drop one of them")
    if arguments.patience is not None and arguments.policy != "patience":
        raise ConfigError("--patience has a meaning only with --policy patience")
    if arguments.policy in ("entropy", "margin") and arguments.threshold is None:
        raise ConfigError(f"--policy {arguments.policy}: exported thresholds are for max_prob; give --threshold")
    if arguments.calibrated and (arguments.gate or arguments.exit_head != "full"):
        raise ConfigError(
            "--calibrated: its thresholds were tested with the full head and no gate; drop --gate and --exit-head"
        )
    if arguments.calibrated and (arguments.threshold is not None or arguments.policy != "max_prob"):
        other = "--policy" if arguments.threshold is None else "--threshold"
        raise ConfigError(f"--calibrated brings its own thresholds, for max_prob; drop {other}")


def check_image(path: Path) -> None:
    """Raises MissingFileError or UserError for a file that is no image."""
    if not path.is_file():
        raise MissingFileError(f"IMAGE {path}: no such file")
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.load()
    except (OSError, SyntaxError) as error:  # Pillow reports some damaged PNG files as a SyntaxError
        raise UserError(f"IMAGE {path}: not a readable image; give a PNG or JPEG file") from error


def run(arguments: argparse.Namespace) -> None:
    """Generate, and print the answers."""
    import torch
    from rich.live import Live
    from rich.text import Text
    from transformers.utils.logging import disable_progress_bar

    from free_dist.data.pretrained import load_for_inference
    from free_dist.decoding.pipeline import GrowingText, answer
    from free_dist.exits.check_files import load_checks
    from free_dist.exits.export import load_exits, read_exits_manifest
    from free_dist.exits.gate import CheckOptions

    disable_progress_bar()
    manifest = read_exits_manifest(arguments.exits)
    settings = asked_settings(arguments, manifest)
    policy, note = choose_policy(arguments, manifest, settings)
    config = BackboneConfig(path=arguments.backbone, allow_pickle=arguments.allow_pickle)
    backbone, encoder = load_for_inference(config, device=arguments.device, dtype=arguments.dtype)
    bank = load_exits(backbone, arguments.exits)
    checks = None
    if arguments.gate or arguments.exit_head != "full":
        wanted = CheckOptions(gate=arguments.gate, head=arguments.exit_head)
        checks = load_checks(arguments.exits, backbone, bank, wanted)
    prompt = prompt_text(arguments, settings)
    options: dict = {"num_beams": arguments.num_beams, "lossless": arguments.lossless}
    if arguments.do_sample:
        device = next(backbone.parameters()).device
        options |= {
            "do_sample": True,
            "temperature": 1.0 if arguments.temperature is None else arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
            "generator": torch.Generator(device).manual_seed(arguments.seed or 0),
        }
    console = new_console(no_color=arguments.no_color)
    is_streamed = len(arguments.images) == 1 and arguments.num_beams == 1 and sys.stdout.isatty() and not arguments.json
    # What grows is wiped away at the end: the exit of a token is known with the answer, which is then printed in colours.
    with Live(console=console, auto_refresh=False, transient=True) if is_streamed else nullcontext() as live:
        if live is not None:
            options["streamer"] = GrowingText(encoder, lambda text: live.update(Text(text), refresh=True))
        answers = answer(
            backbone, encoder, bank, arguments.images, prompt,
            thresholds=policy, checks=checks, max_new_tokens=settings["decoding.max_new_tokens"], **options,
        )  # fmt: skip
    for path, found in zip(arguments.images, answers, strict=True):
        if arguments.json:
            print(json.dumps({"image": str(path), "prompt": prompt} | found.as_dict(), allow_nan=False))
            continue
        if len(answers) > 1:
            console.print(str(path), style="bold", markup=False, highlight=False, soft_wrap=True)
        show(console, found, bank.exit_layers, encoder)
    if note and not arguments.json:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def asked_settings(arguments: argparse.Namespace, manifest: ExitsManifest) -> dict[str, Any]:
    """The recipe fields that shape prompts and answers: a flag's, else those the exits were trained with, else defaults."""
    defaults = {
        "data.question_prompt": DataConfig.question_prompt,
        "data.caption_prompt": DataConfig.caption_prompt,
        "decoding.max_new_tokens": DecodingConfig.max_new_tokens,
    }
    asked = {} if arguments.max_new_tokens is None else {"decoding.max_new_tokens": arguments.max_new_tokens}
    return defaults | manifest.decoding | asked


def choose_policy(
    arguments: argparse.Namespace, manifest: ExitsManifest, settings: Mapping[str, Any]
) -> tuple[ExitPolicy, str]:
    """The exit policy that the flags ask for, and what is promised about it (empty: nothing)."""
    from free_dist.decoding.policy import make_policy

    thresholds: float | tuple[float, ...] = manifest.thresholds
    note = ""
    if arguments.calibrated:
        from free_dist.evaluation.calibration import read_calibration

        calibration = read_calibration(arguments.exits, arguments.calibrated)
        thresholds = calibration.thresholds
        if is_covered(arguments, settings, calibration.settings):
            note = f"for images like those of the calibration split: {calibration.guarantee}"
        else:
            note = (
                f"nothing is promised: calibrated for {arguments.calibrated} prompts, greedy, with --max-new-tokens "
                f"{calibration.settings['decoding.max_new_tokens']}"
            )
    elif arguments.threshold is not None:
        thresholds = arguments.threshold[0] if len(arguments.threshold) == 1 else arguments.threshold
    elif arguments.policy == "patience":
        thresholds = 0.0  # agreement alone decides
    n_exits = len(manifest.exit_layers)
    if arguments.threshold is not None and len(arguments.threshold) not in (1, n_exits):
        raise ConfigError(
            f"--threshold: {len(arguments.threshold)} values for {n_exits} exits (after blocks "
            f"{', '.join(map(str, manifest.exit_layers))}); give one for all, or one per exit"
        )
    patience = 2 if arguments.patience is None else arguments.patience
    return make_policy(arguments.policy, thresholds, n_exits, patience=patience), note


def is_covered(arguments: argparse.Namespace, settings: Mapping[str, Any], calibrated: Mapping[str, Any]) -> bool:
    """Whether a calibration with the settings ``calibrated`` speaks of what is asked for, with ``settings``."""

    def agree(name: str) -> bool:
        return bool(calibrated[name] == settings[name])

    asked = {
        "vqa": arguments.question is not None and agree("data.question_prompt"),
        "caption": arguments.caption and agree("data.caption_prompt"),
        "dialogue": False,  # one turn is no dialogue
    }
    is_greedy = arguments.num_beams == 1 and not arguments.do_sample
    return asked[arguments.calibrated] and is_greedy and agree("decoding.max_new_tokens")


def prompt_text(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    """The whole prompt that the flags ask for."""
    if arguments.caption:
        return settings["data.caption_prompt"]
    if arguments.question is not None:
        return settings["data.question_prompt"].replace("{question}", arguments.question)
    return arguments.prompt


def new_console(*, no_color: bool) -> Console:
    """Standard output; plain text unless it is a terminal, or FORCE_COLOR is set."""
    from rich.console import Console

    plain = no_color or bool(os.environ.get("NO_COLOR"))
    return Console(color_system=None if plain else "auto", no_color=plain, width=None if sys.stdout.isatty() else 120)


def show(console: Console, found: Answer, exit_layers: tuple[int, ...], encoder: SampleEncoder) -> None:
    """Print one answer, the legend of its colours, and the table of its tokens."""
    from rich.table import Table
    from rich.text import Text

    result = found.result
    colours: dict[int | None, str] = {
        layer: EXIT_COLOURS[i % len(EXIT_COLOURS)] for i, layer in enumerate(exit_layers)
    } | {None: FULL_DEPTH_COLOUR}
    text = Text()
    for piece, record in zip(found.pieces, result.records, strict=True):
        text.append(piece, style=colours[record.exit_layer])
    console.print(text, soft_wrap=True)
    if console.color_system is not None:
        legend = Text("left after block: ")
        for layer, colour in colours.items():
            legend.append(f"{result.n_blocks} (full depth)" if layer is None else f"{layer}  ", style=colour)
        console.print(legend)
    console.print()
    table = Table(box=None, pad_edge=False)
    table.add_column("token")
    for name in ("exit", "confidence", "blocks"):
        table.add_column(name, justify="right")
    for record in result.records:
        table.add_row(
            Text(repr(encoder.tokenizer.decode([record.token])), style=colours[record.exit_layer]),
            "full" if record.exit_layer is None else str(record.exit_layer),
            "" if record.confidence is None else f"{record.confidence:.3f}",
            str(record.blocks),
        )
    console.print(table)
    summary = f"mean backbone blocks {result.mean_backbone_blocks:.2f} of {result.n_blocks}"
    summary += f"; {result.exit_calls} exit checks, {result.head_calls} heads"
    if result.drafted:
        summary += f"; {result.drafted} drafted, {result.accepted} accepted"
    if result.score is not None:
        summary += f"; score {result.score:.3f}"
    console.print(summary, markup=False, highlight=False, soft_wrap=True)


def temperature(text: str) -> float:
    """A command-line value above 0; NaN is refused too."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: want a number above 0")
    return value


def share(text: str) -> float:
    """A command-line value above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: want a number above 0 and at most 1")
    return value


def confidences(text: str) -> tuple[float, ...]:
    """Command-line values of at least 0, separated by commas; NaN is refused too."""
    values = tuple(float(part) for part in text.split(","))
    if not all(value >= 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: want numbers from 0 (always exit) to 1 or more (never exit)")
    return values


if __name__ == "__main__":
    main()
