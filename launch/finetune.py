#!/usr/bin/env python
"""Stage 1: train the embedded backbone on task data and save it as a Hugging Face directory.  One process."""

from __future__ import annotations

import argparse
from pathlib import Path

from free_dist.config import Recipe
from free_dist.recipe_io import add_recipe_arguments, fail_clearly, load_recipe, save_recipe
from free_dist.training.runs import refuse_existing_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        run(load_recipe(arguments.config, arguments.overrides))


def run(recipe: Recipe) -> None:
    """Train a new embedded backbone as the recipe says; raises UserError if ``run_dir`` already holds a run."""
    run_dir = Path(recipe.run_dir)
    refuse_existing_run(run_dir)

    from free_dist.backbones import Blip2Backbone
    from free_dist.backbones.blip2 import load_image_processor, load_tokenizer
    from free_dist.backbones.embedded import grown, new_image_processor, new_model, train_tokenizer
    from free_dist.data.samples import SampleEncoder
    from free_dist.data.stream import corpus
    from free_dist.training.finetune import finetune
    from free_dist.training.vision import pretrain_vision

    start, n_blocks = recipe.finetune.start, recipe.finetune.n_blocks
    if start is None:
        backbone = Blip2Backbone(new_model(n_blocks=n_blocks, seed=recipe.training.seed))
        tokenizer = train_tokenizer(corpus(recipe.data), vocab_size=backbone.vocab_size)
        image_processor = new_image_processor()
    else:
        backbone = Blip2Backbone(grown(Blip2Backbone.from_pretrained(start).model, n_blocks))
        tokenizer, image_processor = load_tokenizer(start), load_image_processor(start)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, run_dir / "recipe.yaml")
    encoder = SampleEncoder(tokenizer, image_processor, backbone.layout, backbone.max_positions)
    if recipe.finetune.vision_steps:
        pretrain_vision(backbone, encoder, recipe, steps=recipe.finetune.vision_steps)
    finetune(backbone, encoder, recipe)
    print(f"saved: {run_dir / 'backbone'}")


if __name__ == "__main__":
    main()
