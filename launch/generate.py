#!/usr/bin/env python
"""Answer one prompt about one image with early exits; shows where each token was emitted and what it cost."""

from __future__ import annotations

import argparse
from pathlib import Path

from free_dist.config import EMBEDDED_BACKBONE, MissingFileError
from free_dist.recipe_io import fail_clearly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--exits", type=Path, required=True, help="directory with exits.safetensors and exits.json")
    parser.add_argument("--image", type=Path, required=True, help="image file (PNG or JPEG)")
    parser.add_argument("--prompt", required=True, help='such as "Question: what color is the shape? Answer:"')
    parser.add_argument("--backbone", default=EMBEDDED_BACKBONE, help="Hugging Face directory, or embedded")
    parser.add_argument(
        "--threshold", type=float, help="confidence for every exit, 1 never exits; default: as exported"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer, in tokens")
    arguments = parser.parse_args()

    from free_dist.data.pretrained import load_pretrained
    from free_dist.data.samples import Turn
    from free_dist.decoding import generate
    from free_dist.exits.export import load_exits, read_exits_manifest

    with fail_clearly(parser):
        if not arguments.image.is_file():
            raise MissingFileError(f"--image {arguments.image}: no such file")
        thresholds = (
            read_exits_manifest(arguments.exits).thresholds if arguments.threshold is None else arguments.threshold
        )
        backbone, encoder = load_pretrained(arguments.backbone)
        bank = load_exits(backbone, arguments.exits)
        pixel_values = encoder.encode_image(arguments.image.read_bytes())[None]
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
    print(f"mean blocks {result.mean_blocks:.2f} of {result.n_blocks}; {checks}")


if __name__ == "__main__":
    main()
