#!/usr/bin/env python
"""Answer one prompt about one image with early exits; shows where each token was emitted and what it cost."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from free_dist.config import EMBEDDED_BACKBONE, MissingFileError, UserError
from free_dist.recipe_io import fail_clearly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exits", type=Path, required=True, help="directory with exits.safetensors and exits.json")
    parser.add_argument("--image", type=Path, required=True, help="image file (PNG or JPEG)")
    parser.add_argument("--prompt", required=True, help='such as "Question: what color is the shape? Answer:"')
    parser.add_argument(
        "--backbone", default=EMBEDDED_BACKBONE, help="Hugging Face directory, or embedded (default: %(default)s)"
    )
    parser.add_argument(
        "--threshold",
        type=confidence,
        metavar="CONFIDENCE",
        help="for every exit: 0 always exits, 1 or more never; default: as exported",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        default=32,
        metavar="TOKENS",
        help="longest answer (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with fail_clearly(parser):
        answer(arguments, read_image(arguments.image))


def answer(arguments: argparse.Namespace, image: bytes) -> None:
    """Generate and print the answer and, per token, where it was emitted."""
    if not arguments.exits.is_dir():
        raise MissingFileError(f"--exits {arguments.exits}: no such directory")

    from free_dist.data.pretrained import load_pretrained
    from free_dist.data.samples import Turn
    from free_dist.decoding import generate
    from free_dist.exits.export import load_exits, read_exits_manifest

    thresholds = read_exits_manifest(arguments.exits).thresholds if arguments.threshold is None else arguments.threshold
    backbone, encoder = load_pretrained(arguments.backbone)
    bank = load_exits(backbone, arguments.exits)
    pixel_values = encoder.encode_image(image)[None]
    prompt_ids = encoder.encode_prompt([Turn(prompt=arguments.prompt, answer="")])
    result = generate(
        backbone, bank, pixel_values, prompt_ids, thresholds=thresholds, max_new_tokens=arguments.max_new_tokens
    )

    print(encoder.decode(result.tokens))
    print(f"\n{'token':<16}{'exit layer':>12}{'blocks':>8}{'confidence':>12}")
    for record in result.records:
        layer = "full" if record.exit_layer is None else str(record.exit_layer)
        confidence = "" if record.confidence is None else f"{record.confidence:.3f}"
        print(f"{encoder.tokenizer.decode([record.token])!r:<16}{layer:>12}{record.blocks:>8}{confidence:>12}")
    checks = f"{result.exit_calls} exit checks, {result.head_calls} heads"
    print(f"mean backbone blocks {result.mean_backbone_blocks:.2f} of {result.n_blocks}; {checks}")


def read_image(path: Path) -> bytes:
    """The bytes of an image file that can be decoded; raises MissingFileError or UserError."""
    if not path.is_file():
        raise MissingFileError(f"--image {path}: no such file")
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except (OSError, SyntaxError) as error:  # Pillow reports some damaged PNG files as a SyntaxError
        raise UserError(f"--image {path}: not a readable image; give a PNG or JPEG file") from error
    return content


def positive_integer(text: str) -> int:
    """A command-line value of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: want at least 1")
    return value


def confidence(text: str) -> float:
    """A command-line value of at least 0; NaN is refused too."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text}: want a number from 0 (always exit) to 1 or more (never exit)")
    return value


if __name__ == "__main__":
    main()
