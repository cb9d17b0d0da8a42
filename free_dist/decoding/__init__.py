"""Decoding that stops early: exact caches, exit policies, generation at batch 1."""

from free_dist.decoding.cache import Counts, PendingCache
from free_dist.decoding.generate import (
    DecodingState,
    GenerationResult,
    TokenRecord,
    decode_one_token,
    generate,
    prefill,
)
from free_dist.decoding.policy import Decision, ExitPolicy, MaxProbPolicy

__all__ = [
    "Counts",
    "Decision",
    "DecodingState",
    "ExitPolicy",
    "GenerationResult",
    "MaxProbPolicy",
    "PendingCache",
    "TokenRecord",
    "decode_one_token",
    "generate",
    "prefill",
]
