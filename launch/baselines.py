#!/usr/bin/env python
"""Score what needs no language model on the samples that launch/evaluate.py would take: the nearest training image, and less.

    python launch/baselines.py --config launch/recipes/finetune_smollm2.yaml data.root=data/easyvqa

Reads backbone, data and evaluation of the recipe.  The last line is one JSON object: task -> baseline -> quality.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from free_dist.config import Recipe
from free_dist.recipe_io import add_recipe_arguments, fail_clearly, load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    with fail_clearly(parser):
        print(json.dumps(baselines(load_recipe(arguments.config, arguments.overrides))))


def baselines(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Task -> baseline -> its quality; says each as it is found."""
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from free_dist.data.pretrained import load_pretrained
    from free_dist.data.stream import split_samples
    from free_dist.data.visual_cache import use_visual_cache
    from free_dist.evaluation.nearest_neighbour import baseline_answers, image_vectors
    from free_dist.evaluation.tasks import TaskScorer

    disable_progress_bar()
    settings, data = recipe.evaluation, recipe.data
    tasks = {name: TaskScorer(name, settings, only_quality=True) for name in settings.tasks}
    training = {name: split_samples(data, "train", name) for name in tasks}
    asked = {name: split_samples(data, settings.split, name, max_samples=settings.max_samples) for name in tasks}
    tasks = {name: task for name, task in tasks.items() if training[name] and asked[name]}
    backbone, encoder = load_pretrained(recipe.backbone.path, allow_pickle=recipe.backbone.allow_pickle)
    use_visual_cache(data, backbone, encoder)
    images = (sample.image for split in (training, asked) for name in tasks for sample in split[name])
    vectors = image_vectors(backbone, encoder, images, lambda batches: tqdm(batches, desc="vision", mininterval=1.0))
    found: dict[str, dict[str, float]] = {}
    for name, task in tasks.items():
        answers = baseline_answers(training[name], asked[name], vectors)
        references = [sample.references for sample in asked[name]]
        found[name] = {baseline: task.score(given, references).quality for baseline, given in answers.items()}
        print(f"{name}: {task.task.quality_name} on {len(references)} samples of {Path(data.root) / settings.split}")
        for baseline, quality in found[name].items():
            print(f"  {baseline:<28}{quality:.3f}")
    return found


if __name__ == "__main__":
    main()
