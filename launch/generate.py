#!/usr/bin/env python
"""Answer one prompt about one image with early exits; shows where each token was emitted and what it cost."""

from __future__ import annotations

import argparse
from pathlib import Path

from free_dist.config import EMBEDDED_BACKBONE


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

    from free_dist.backbones import Blip2Backbone
    from free_dist.backbones.blip2 import load_image_processor, load_tokenizer
    from free_dist.backbones.embedded import resolve_backbone
    from free_dist.data.samples import SampleEncoder, Turn
    from free_dist.decoding import generate
    from free_dist.exits.export import load_exits, read_exits_manifest

    directory = resolve_backbone(arguments.backbone)
    try:
        thresholds = (
            read_exits_manifest(arguments.exits).thresholds if arguments.threshold is None else arguments.threshold
        )
        backbone = Blip2Backbone.from_pretrained(directory)
        bank = load_exits(backbone, arguments.exits)
        tokenizer, image_processor = load_tokenizer(directory), load_image_processor(directory)
        encoder = SampleEncoder(tokenizer, image_processor, backbone.layout, backbone.max_positions)
        pixel_values = encoder.encode_image(arguments.image.read_bytes())[None]
        prompt_ids = encoder.encode_prompt([Turn(prompt=arguments.prompt, answer="")])
        result = generate(
            backbone, bank, pixel_values, prompt_ids, thresholds=thresholds, max_new_tokens=arguments.max_new_tokens
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))

    print(encoder.decode(result.tokens))
    print(f"\n{'token':<16}{'exit layer':>12}{'blocks':>8}{'confidence':>12}")
    for record in result.records:
        layer = "full" if record.exit_layer is None else str(record.exit_layer)
        confidence = "" if record.confidence is None else f"{record.confidence:.3f}"
        print(f"{tokenizer.decode([record.token])!r:<16}{layer:>12}{record.blocks:>8}{confidence:>12}")
    checks = f"{result.exit_calls} exit checks, {result.head_calls} heads"
    print(f"mean blocks {result.mean_blocks:.2f} of {result.n_blocks}; {checks}")


if __name__ == "__main__":
    main()
