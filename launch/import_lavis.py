#!/usr/bin/env python
"""Turn LAVIS checkpoints into a Hugging Face directory, or a LAVIS run's YAML into a recipe.  Needs no LAVIS.

  import_lavis.py --kind blip2-opt --checkpoint blip2_pretrained_opt2.7b.pth --vision eva_vit_g.pth \\
      --language-model opt-2.7b --out blip2-opt-2.7b
  import_lavis.py --kind minigpt4 --checkpoint pretrained_minigpt4.pth --qformer blip2_pretrained_flant5xxl.pth \\
      --vision eva_vit_g.pth --language-model vicuna-7b --out minigpt4-7b
  import_lavis.py recipe caption_coco_ft.yaml --out caption_coco.yaml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from free_dist.recipe_io import fail_clearly, positive_integer

KIND_NAMES = ("blip2-opt", "blip2-t5", "instructblip-vicuna", "instructblip-t5", "minigpt4")


def main() -> None:
    if sys.argv[1:2] == ["recipe"]:
        import_recipe(sys.argv[2:])
        return
    parser = build_parser()
    arguments = parser.parse_args()
    with fail_clearly(parser):
        import_checkpoint(arguments)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KIND_NAMES, required=True)
    parser.add_argument(
        "--checkpoint", type=Path, action="append", required=True, help="LAVIS .pth; given again, later ones win"
    )
    parser.add_argument("--vision", type=Path, help="eva_vit_g.pth, unless a checkpoint holds the vision tower")
    parser.add_argument("--qformer", type=Path, help=".pth below the checkpoints, such as blip2_pretrained.pth")
    parser.add_argument("--language-model", type=Path, required=True, help="Hugging Face directory, with tokenizer")
    parser.add_argument(
        "--qformer-tokenizer", type=Path, help="InstructBLIP: directory of bert-base-uncased's tokenizer"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--image-size", type=positive_integer, help="pixels; default: as the position embedding says")
    parser.add_argument("--vision-heads", type=positive_integer, help="default: heads of 88, as in EVA-g")
    parser.add_argument("--qformer-heads", type=positive_integer, help="default: heads of 64, as in BERT")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: %(default)s)")
    return parser


def import_checkpoint(arguments: argparse.Namespace) -> None:
    """Write the Hugging Face directory and say what it holds; raises UserError."""
    from free_dist.backbones.lavis import LavisFiles, import_lavis

    files = LavisFiles(
        kind=arguments.kind,
        language_model=arguments.language_model,
        checkpoints=tuple(arguments.checkpoint),
        vision=arguments.vision,
        qformer=arguments.qformer,
        qformer_tokenizer=arguments.qformer_tokenizer,
        image_size=arguments.image_size,
        vision_heads=arguments.vision_heads,
        qformer_heads=arguments.qformer_heads,
        max_shard_size=arguments.max_shard_size,
    )
    imported = import_lavis(files, arguments.out)
    for name in imported.left_out:
        print(f"left out: {name}")
    print(f"saved: {imported.directory} ({imported.parameters:,} parameters)")


def import_recipe(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="import_lavis.py recipe", description="LAVIS runner YAML -> recipe YAML")
    parser.add_argument("yaml", type=Path, help="file that LAVIS's train.py takes as --cfg-path")
    parser.add_argument("--out", type=Path, required=True, help="recipe to write")
    parser.add_argument(
        "--samples", type=positive_integer, help="rows of an epoch (default: those of COCO's or VQAv2's training split)"
    )
    arguments = parser.parse_args(argv)
    with fail_clearly(parser):
        from free_dist.data.lavis_recipe import import_recipe as convert

        imported = convert(arguments.yaml, arguments.out, samples=arguments.samples)
        for field, value in imported.ds_config.items():
            print(f"set in the ds_config: {field} = {value}")
        for note in imported.without_counterpart:
            print(f"no counterpart: {note}")
        print(f"saved: {arguments.out}")


if __name__ == "__main__":
    main()
