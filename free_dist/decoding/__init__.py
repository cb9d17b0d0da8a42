"""Decoding that stops early: exact caches, exit policies, lossy and lossless generation."""

from free_dist.decoding.beam import BeamOptions, beam_search
from free_dist.decoding.cache import Counts, PendingCache
from free_dist.decoding.decoder import Decoder, DecoderOptions
from free_dist.decoding.generate import generate
from free_dist.decoding.policy import (
    Decision,
    EntropyPolicy,
    ExitPolicy,
    MarginPolicy,
    MaxProbPolicy,
    PatiencePolicy,
    Scores,
    ThresholdTable,
    make_policy,
)
from free_dist.decoding.result import Generation, GenerationResult, TokenRecord
from free_dist.decoding.runners import StaticRunner, make_runner

__all__ = [
    "BeamOptions",
    "Counts",
    "Decision",
    "Decoder",
    "DecoderOptions",
    "EntropyPolicy",
    "ExitPolicy",
    "Generation",
    "GenerationResult",
    "MarginPolicy",
    "MaxProbPolicy",
    "PatiencePolicy",
    "PendingCache",
    "Scores",
    "StaticRunner",
    "ThresholdTable",
    "TokenRecord",
    "beam_search",
    "generate",
    "make_policy",
    "make_runner",
]
