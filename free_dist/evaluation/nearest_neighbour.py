"""Baselines without a language model: what training answers alone, and the nearest training image, would have answered.

Distance is the cosine between mean patch features of the frozen vision network.  What these reach needs no understanding of
a prompt beyond its words; a vision-language model should be above them.  Does not know tokens or blocks.

Shape letters: I images, W channels of patches.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from free_dist.backbones import Blip2Backbone
from free_dist.data.samples import Sample, SampleEncoder

BATCH = 16
"""Images that the vision network sees at once."""

FREQUENT, PROMPT_ONLY, NEAREST_IMAGE = "most frequent answer", "most frequent to the prompt", "nearest image"
"""The baselines: blind to prompt and image; blind to the image; the answer given of the nearest training image."""


def baseline_answers(
    training: Sequence[Sample], asked: Sequence[Sample], vectors: dict[bytes, Tensor]
) -> dict[str, list[str]]:
    """Baseline -> its answer to each of ``asked``.

    ``vectors``: encoded image -> its features [W], for the images of all samples.  ``PROMPT_ONLY`` and ``NEAREST_IMAGE``
    learn from the training samples whose last prompt is the same; a prompt that none has gets the most frequent answer.
    Raises ValueError without training samples.
    """
    if not training:
        raise ValueError("no training samples to answer from")
    known: dict[str, list[Sample]] = defaultdict(list)
    for sample in training:
        known[sample.turns[-1].prompt].append(sample)
    frequent = _most_frequent(training)
    usual = {prompt: _most_frequent(samples) for prompt, samples in known.items()}
    seen = {prompt: torch.stack([vectors[sample.image] for sample in samples]) for prompt, samples in known.items()}
    given: dict[str, list[str]] = {FREQUENT: [], PROMPT_ONLY: [], NEAREST_IMAGE: []}
    for sample in asked:
        prompt = sample.turns[-1].prompt
        nearest = frequent
        if prompt in known:
            likeness = F.cosine_similarity(seen[prompt], vectors[sample.image][None], dim=-1)
            nearest = known[prompt][int(likeness.argmax())].turns[-1].answer
        given[FREQUENT].append(frequent)
        given[PROMPT_ONLY].append(usual.get(prompt, frequent))
        given[NEAREST_IMAGE].append(nearest)
    return given


@torch.inference_mode()
def image_vectors(
    backbone: Blip2Backbone,
    encoder: SampleEncoder,
    images: Iterable[bytes],
    progress: Callable[[list[list[bytes]]], Iterable[list[bytes]]] = iter,
) -> dict[bytes, Tensor]:
    """Encoded image -> mean patch features [W]; every distinct image is looked at once.  ``progress`` wraps the batches."""
    distinct = list(dict.fromkeys(images))
    vectors: dict[bytes, Tensor] = {}
    for batch in progress([distinct[first : first + BATCH] for first in range(0, len(distinct), BATCH)]):
        pixels = torch.stack([encoder.encode_image(image) for image in batch])
        vectors |= zip(batch, backbone.encode_patches(pixels).mean(1), strict=True)
    return vectors


def _most_frequent(samples: Sequence[Sample]) -> str:
    return Counter(sample.turns[-1].answer for sample in samples).most_common(1)[0][0]
