"""The decoders of the benchmark, each as an arm for the paired clock and as a run split into vision, prefill and decode.

A split needs a clock inside the answer, which costs time itself; so end-to-end times are taken without it, and splits
in runs of their own.  Does not know tasks, samples or how times are summed up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

from free_dist.backbones import Backbone, Blip2Backbone, Instruction
from free_dist.decoding.generate import generate
from free_dist.decoding.runners import StaticRunner
from free_dist.evaluation.benchmark import Arm, Decoded, Prompt, decoded, hf_generate, wait_for_device
from free_dist.exits import ExitBank
from free_dist.exits.gate import ExitChecks


class Split(NamedTuple):
    """One answer's time, in seconds, by what it was spent on."""

    vision: float
    """Pixels to visual prefix."""
    prefill: float
    """Prefix and prompt to the first token."""
    decode: float
    """All further tokens; 0 where there is none."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One decoder of the benchmark."""

    arm: Arm
    split: Callable[[Tensor, Prompt, Instruction | None], Split]
    """(pixels [1, 3, height, width], prompt ids, what the Q-Former reads) -> the same answer's times, by part."""


class TokenClock(BaseStreamer):
    """A streamer that notes when the prompt and the tokens arrive, and forgets them."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @property
    def first_token(self) -> float:
        """When the first token was there; the prompt comes before it."""
        return self.times[1]

    def put(self, value: Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept open."""


def ours(
    backbone: Backbone,
    bank: ExitBank | None = None,
    *,
    method: str,
    max_new_tokens: int,
    thresholds: Sequence[float] | None = None,
    checks: ExitChecks | None = None,
    lossless: bool = False,
    eos: int | None = None,
    runner: StaticRunner | None = None,
) -> Contestant:
    """Our decoder: at full depth without a bank, else with exits at ``thresholds``, one per exit, asked by ``checks``.

    A negative ``eos`` ends no answer, so that all have ``max_new_tokens`` tokens.
    """
    settings: dict[str, Any] = {
        "thresholds": thresholds,
        "max_new_tokens": max_new_tokens,
        "checks": checks,
        "lossless": lossless,
        "eos_token_id": eos,
        "runner": runner,
    }

    def decode(pixel_values: Tensor, prompt_ids: Prompt, instruction: Instruction | None = None) -> Decoded:
        return decoded(generate(backbone, bank, pixel_values, prompt_ids, instruction=instruction, **settings), bank)

    @torch.inference_mode()
    def split(pixel_values: Tensor, prompt_ids: Prompt, instruction: Instruction | None = None) -> Split:
        clock = TokenClock()
        wait_for_device(pixel_values.device)
        start = time.perf_counter()
        prefix = backbone.encode_prefix(pixel_values, None, instruction)
        wait_for_device(pixel_values.device)
        seen = time.perf_counter()
        generate(backbone, bank, None, prompt_ids, prefix=prefix, streamer=clock, **settings)
        return Split(seen - start, clock.first_token - seen, time.perf_counter() - clock.first_token)

    threshold = None if thresholds is None else min(thresholds)
    return Contestant(arm=Arm(method=method, threshold=threshold, decode=decode), split=split)


def hugging_face(
    backbone: Blip2Backbone, *, max_new_tokens: int, eos: int | None = None, compiled_for: int | None = None
) -> Contestant:
    """Hugging Face's greedy ``generate``, method ``hf``.

    ``compiled_for``: prompt positions, at most, for which its static cache is laid out and its decoding step compiled
    (method ``hf_compiled``).  One size for all prompts means one graph; compiling happens in the first call and takes long.
    """
    options: dict[str, Any] = {}
    if compiled_for is not None:
        config = CompileConfig(fullgraph=False, mode=None, dynamic=False)
        # Without this transformers leaves the model uncompiled on a CPU, and says nothing.
        config._compile_all_devices = True
        options = {
            "cache_implementation": "static",
            "max_cache_len": compiled_for + max_new_tokens,
            "compile_config": config,
        }

    def decode(pixel_values: Tensor, prompt_ids: Prompt, instruction: Instruction | None = None) -> Decoded:
        return hf_generate(
            backbone, pixel_values, prompt_ids, instruction, max_new_tokens=max_new_tokens, eos=eos, **options
        )

    def split(pixel_values: Tensor, prompt_ids: Prompt, instruction: Instruction | None = None) -> Split:
        clock = TokenClock()
        wait_for_device(pixel_values.device)
        with _noting_prefix(backbone) as seen:
            start = time.perf_counter()
            hf_generate(
                backbone,
                pixel_values,
                prompt_ids,
                instruction,
                max_new_tokens=max_new_tokens,
                eos=eos,
                streamer=clock,
                **options,
            )
            end = time.perf_counter()
        return Split(seen[0] - start, clock.first_token - seen[0], end - clock.first_token)

    return Contestant(
        arm=Arm(method="hf" if compiled_for is None else "hf_compiled", threshold=None, decode=decode), split=split
    )


@contextmanager
def _noting_prefix(backbone: Blip2Backbone) -> Iterator[list[float]]:
    """The times at which the visual prefix was ready."""
    times: list[float] = []

    def note(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        wait_for_device(output.device)
        times.append(time.perf_counter())

    handle = backbone.model.language_projection.register_forward_hook(note)
    try:
        yield times
    finally:
        handle.remove()
