#!/usr/bin/env python
"""Stage 1: train the embedded backbone on task data and save it as a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from free_dist.config import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", help="recipe YAML; see launch/recipes")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, such as training.max_steps=100")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.config, arguments.overrides)

    from free_dist.backbones import Blip2Backbone
    from free_dist.backbones.embedded import new_image_processor, new_model, train_tokenizer
    from free_dist.data.samples import SampleEncoder
    from free_dist.data.stream import corpus
    from free_dist.training.finetune import finetune

    model = new_model(seed=recipe.training.seed)
    tokenizer = train_tokenizer(corpus(recipe.data), vocab_size=model.config.text_config.vocab_size)
    backbone = Blip2Backbone(model)
    encoder = SampleEncoder(tokenizer, new_image_processor(), backbone.layout, backbone.max_positions)
    finetune(backbone, encoder, recipe)
    print(f"saved: {Path(recipe.run_dir) / 'backbone'}")


if __name__ == "__main__":
    main()
