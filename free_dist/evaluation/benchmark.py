"""Honest clock: several decoders on the same samples, interleaved, timed end to end from pixels to tokens.

Every decoder ("arm") answers a sample before any sees the next one, in an order drawn anew for each sample, so that
drift of the machine hits all arms alike.  Vision tower and prefill are inside the clock; image decoding and
tokenisation, the same for all, are outside.  Ratios are quotients of summed times over the samples both arms ran.

Does not know tasks, scores or thresholds.  The number of threads is the caller's, and is recorded, not set.

Shape letter: B prompts answered in one call.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from free_dist.backbones import Backbone, Blip2Backbone, Instruction
from free_dist.data.samples import Sample, SampleEncoder
from free_dist.decoding.generate import generate
from free_dist.decoding.result import Generation
from free_dist.exits import ExitBank

RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""
COLLECT_EVERY = 50
"""Samples between two garbage collections, which run outside the clock."""

Prompt = list[int] | list[list[int]]
"""Ids of one prompt, or of B prompts."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one arm produced for one sample."""

    tokens: tuple[int, ...]
    """Generated ids, row after row; the closing end-of-answer token is included where it was generated."""
    exits: tuple[int, ...]
    """Per token, the exit layer that emitted it; the number of blocks L for full depth."""
    blocks: int
    """Block calls made for all tokens, prefill included; the call of an exit that is a block counts as one."""
    seconds: float
    """Wall-clock time."""


class Decoded(NamedTuple):
    """What a decoder returns; the fields of :class:`Answer` without the time."""

    tokens: Sequence[int]
    exits: Sequence[int]
    blocks: int


Decode = Callable[[Tensor, Prompt, Instruction | None], Decoded]
"""(pixels [B, 3, height, width], prompt ids, what the Q-Former reads) -> Decoded."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One decoder under the clock."""

    method: str
    """``full``, ``hf``, ``exits``, ... as in a results row."""
    threshold: float | None
    """Confidence threshold, None for decoders without exits."""
    decode: Decode
    stride: int = 1
    """The arm answers every ``stride``-th sample; slow references need not see them all."""


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A sample, or a batch of them, ready for the clock."""

    index: int
    """Place in the whole evaluation, over all ranks."""
    pixel_values: Tensor
    """[B, 3, height, width]."""
    prompt_ids: Prompt
    instruction: Instruction | None = None
    """What a Q-Former that reads text is given."""


def full_arm(backbone: Backbone, *, max_new_tokens: int) -> Arm:
    """Our own decoder at full depth, without any exit: method ``full``."""

    def decode(pixel_values: Tensor, prompt_ids: Prompt, instruction: Instruction | None = None) -> Decoded:
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "instruction": instruction}
        return decoded(generate(backbone, None, pixel_values, prompt_ids, **settings))

    return Arm(method="full", threshold=None, decode=decode)


def exits_arm(
    backbone: Backbone, bank: ExitBank, *, threshold: float, max_new_tokens: int, method: str = "exits"
) -> Arm:
    """Our decoder with early exits at one confidence threshold for all of them."""

    def decode(pixel_values: Tensor, prompt_ids: Prompt, instruction: Instruction | None = None) -> Decoded:
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "instruction": instruction}
        return decoded(generate(backbone, bank, pixel_values, prompt_ids, thresholds=threshold, **settings), bank)

    return Arm(method=method, threshold=threshold, decode=decode)


def hf_arm(backbone: Blip2Backbone, *, max_new_tokens: int, stride: int = 1) -> Arm:
    """Hugging Face's own greedy ``generate`` with its KV cache, on the same model object and inputs: method ``hf``."""

    def decode(pixel_values: Tensor, prompt_ids: Prompt, instruction: Instruction | None = None) -> Decoded:
        return hf_generate(backbone, pixel_values, prompt_ids, instruction, max_new_tokens=max_new_tokens)

    return Arm(method="hf", threshold=None, decode=decode, stride=stride)


@torch.inference_mode()
def hf_generate(
    backbone: Blip2Backbone,
    pixel_values: Tensor,
    prompt_ids: Prompt,
    instruction: Instruction | None = None,
    *,
    max_new_tokens: int,
    eos: int | None = None,
    **options: Any,
) -> Decoded:
    """Greedy ``generate`` of the wrapped model on one prompt; ``options`` are more of its arguments."""
    layout, model = backbone.layout, backbone.model
    input_ids = torch.tensor([prompt_ids], device=pixel_values.device)
    options |= {
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": layout.eos_token_id if eos is None else eos,
        "pad_token_id": layout.pad_token_id,
    }
    read: dict[str, Any] = {}
    if instruction is not None:
        read = {"qformer_input_ids": instruction.input_ids, "qformer_attention_mask": instruction.mask}
    shown = layout.decoder_positions(prompt_ids)
    if model.config.image_token_id is None:
        # A checkpoint from before image placeholders: its ``generate`` no longer knows where an image goes.
        is_image = input_ids == layout.image_token_id
        embedded = model.get_input_embeddings()(input_ids.masked_fill(is_image, layout.pad_token_id))
        images = model.get_image_features(pixel_values, **read).pooler_output.to(embedded.dtype)
        embedded = embedded.masked_scatter(is_image[..., None].expand_as(embedded), images)
        output = model.language_model.generate(inputs_embeds=embedded, **options)
        shown = 0 if layout.decoder_start_token_id is None else 1
    else:
        output = model.generate(pixel_values=pixel_values, input_ids=input_ids, **read, **options)
    tokens = output[0, shown:].tolist()
    return Decoded(tokens, [backbone.n_blocks] * len(tokens), backbone.n_blocks * len(tokens))


def decoded(generation: Generation, bank: ExitBank | None = None) -> Decoded:
    """Rows of a generation one after the other; a call that rows share is counted once, and exits as ``bank`` counts them."""
    tokens = [token for row in generation for token in row.tokens]
    exits = [row.n_blocks if layer is None else layer for row in generation for layer in row.exit_layers]
    asked = 0 if bank is None else bank.blocks_per_exit * generation.calls.exit_calls
    return Decoded(tokens, exits, generation.calls.block_calls + asked)


def prompted(
    backbone: Backbone, encoder: SampleEncoder, samples: Iterable[Sample], *, first: int = 0, step: int = 1
) -> Iterator[Prompted]:
    """Samples made ready for the clock one by one, numbered from ``first`` on by ``step``."""
    device = next(backbone.parameters()).device
    for i, sample in enumerate(samples):
        yield Prompted(
            index=first + i * step,
            pixel_values=encoder.encode_image(sample.image)[None].to(device),
            prompt_ids=encoder.encode_prompt(sample.turns),
            instruction=encoder.encode_instruction(sample.turns, device),
        )


def run_interleaved(
    arms: Sequence[Arm], samples: Iterable[Prompted], *, warmup: int = 2
) -> Iterator[list[Answer | None]]:
    """One list of answers per sample, in the order of ``arms``; None where an arm's stride leaves the sample out.

    The first ``warmup`` samples are answered by every arm once before the clock starts, and then again under it.
    Garbage collection is off while the clock runs.
    """
    iterator = iter(samples)
    opening = [sample for _, sample in zip(range(warmup), iterator, strict=False)]
    for sample in opening:
        for arm in arms:
            arm.decode(sample.pixel_values, sample.prompt_ids, sample.instruction)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for i, sample in enumerate(_chain(opening, iterator)):
            answers: list[Answer | None] = [None] * len(arms)
            order = [j for j, arm in enumerate(arms) if sample.index % arm.stride == 0]
            random.Random(sample.index).shuffle(order)
            for j in order:
                answers[j] = _timed(arms[j], sample)
            yield answers
            if i % COLLECT_EVERY == COLLECT_EVERY - 1:
                gc.collect()
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def ratio_with_interval(
    reference: Sequence[float],
    measured: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """``sum(reference) / sum(measured)`` over paired values, and its percentile bootstrap interval over samples.

    ``groups``: what each pair belongs to, such as the image that is asked about; then whole groups are drawn, because the
    pairs of one are not independent.
    """
    if len(reference) != len(measured) or not len(measured):
        raise ValueError(f"{len(reference)} reference values against {len(measured)}: want equal and above 0")
    top, bottom = np.asarray(reference, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if groups is not None:
        if len(groups) != len(measured):
            raise ValueError(f"{len(groups)} groups for {len(measured)} values")
        numbers: dict[Hashable, int] = {}
        group = [numbers.setdefault(one, len(numbers)) for one in groups]
        top, bottom = (np.bincount(group, values).astype(np.float64) for values in (top, bottom))
    drawn = np.random.default_rng(seed).integers(0, len(top), (RESAMPLES, len(top)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = top[drawn].sum(1) / bottom[drawn].sum(1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(top.sum() / bottom.sum()), (float(low), float(high))


def mean_with_interval(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, *, level: float = 0.95, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean, and its percentile bootstrap interval over values, or whole groups of them, see :func:`ratio_with_interval`."""
    return ratio_with_interval(values, [1.0] * len(values), groups, level=level, seed=seed)


def median_with_interval(
    values: Sequence[float], *, level: float = 0.95, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Median, and its percentile bootstrap interval over samples."""
    if not len(values):
        raise ValueError("no values: want at least 1")
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.quantile(np.median(array[drawn], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(array)), (float(low), float(high))


def wait_for_device(device: torch.device) -> None:
    """Return when everything started on ``device`` is done, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(arm: Arm, sample: Prompted) -> Answer:
    wait_for_device(sample.pixel_values.device)
    start = time.perf_counter()
    found = arm.decode(sample.pixel_values, sample.prompt_ids, sample.instruction)
    wait_for_device(sample.pixel_values.device)
    seconds = time.perf_counter() - start
    return Answer(tokens=tuple(found.tokens), exits=tuple(found.exits), blocks=found.blocks, seconds=seconds)


def _chain(opening: Iterable[Prompted], rest: Iterable[Prompted]) -> Iterator[Prompted]:
    yield from opening
    yield from rest
