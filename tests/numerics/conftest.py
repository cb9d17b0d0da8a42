"""Fixtures of the numerics tests: a small random BLIP-2 of every decoder type.

The widths are chosen so that nothing fits by accident: heads times head width is not the model width (LLaMA, T5), key-value
heads are fewer than query heads, encoder and decoder differ in depth, and sequences are longer than the largest T5 distance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from free_dist.backbones import Blip2Backbone, LayerCache, Memory, RaggedSpan

VOCAB = 61
QUERIES = 3
IMAGE_TOKEN = 5
PROMPT_LENGTHS = (4, 11, 7)
CAPACITY = 60
CPU = torch.device("cpu")


def opt_config() -> OPTConfig:
    return OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
    )


def llama_config(n_shared_heads: int, rope: dict[str, Any] | None = None) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=n_shared_heads,
        head_dim=12,
        max_position_embeddings=64,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 100.0},
    )


def t5_config(feed_forward: str, *, scaled: bool) -> T5Config:
    return T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=12,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=9,
        dropout_rate=0.0,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=scaled,
        decoder_start_token_id=0,
    )


TEXT_CONFIGS = {
    "opt": opt_config,
    "llama": lambda: llama_config(4),
    "llama-grouped": lambda: llama_config(2),
    "llama-yarn": lambda: llama_config(
        1, {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "flan-t5": lambda: t5_config("gated-gelu", scaled=False),
    "t5": lambda: t5_config("relu", scaled=True),
}


def new_backbone(kind: str, dtype: torch.dtype = torch.float32) -> Blip2Backbone:
    vision = Blip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    qformer = Blip2QFormerConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        encoder_hidden_size=16,
        cross_attention_frequency=1,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=TEXT_CONFIGS[kind](),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(3)
    model = Blip2ForConditionalGeneration(config).eval().requires_grad_(False)
    nn.init.normal_(model.query_tokens)
    language_model = model.language_model
    if kind == "flan-t5":  # published ones have a head of their own
        language_model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 32), requires_grad=False)
    if kind == "t5":  # a tied head repeats what it reads, unless the blocks outweigh the embedding
        language_model.shared.weight.mul_(0.05)
    for name, parameter in language_model.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape))
        elif kind in ("opt", "llama", "llama-grouped", "llama-yarn"):
            # Initial weights are so small that every block is nearly the identity.
            parameter.normal_(std=0.3 if parameter.ndim == 2 else 0.1)
        elif "relative_attention_bias" in name:
            parameter.normal_()
    return Blip2Backbone(model.to(dtype))


@dataclass(frozen=True, kw_only=True)
class DecoderCase:
    """One decoder type with images, prompts of several lengths and an answer."""

    kind: str
    backbone: Blip2Backbone
    pixels: Tensor
    """One image per prompt."""
    prompts: list[list[int]]
    answer: tuple[int, ...] = (7, 31, 12, 44, 9, 50, 23, 38, 17, 28, 6, 55)
    """Longer than the largest distance that T5's buckets tell apart here."""

    @property
    def is_t5(self) -> bool:
        return self.kind.endswith("t5")

    @property
    def tolerance(self) -> dict[str, float]:
        """LLaMA's norm rounds to float32 whatever the type, and T5's its variance, which multiplies the last bits."""
        return {"rtol": 1e-9, "atol": 1e-9} if self.kind == "opt" else {"rtol": 2e-6, "atol": 2e-6}

    def inputs(self, row: int, answer: tuple[int, ...] | None = None) -> tuple[Tensor, Memory | None]:
        """``h_0`` of a prompt (or T5's start token) and an answer, [1, T, D], and the memory."""
        backbone = self.backbone
        start = backbone.start([self.prompts[row]], backbone.encode_prefix(self.pixels[row : row + 1]))
        ids = torch.tensor([self.answer if answer is None else answer])
        return torch.cat([start.hidden, backbone.embed(ids, None, start.hidden.shape[1])], 1), start.memory

    def reference(self, row: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Hidden states and logits [1, T, ...] of transformers on the same positions."""
        model, prompt = self.backbone.model, self.prompts[row]
        if self.is_t5:
            ids, more = torch.tensor([prompt]), {"decoder_input_ids": torch.tensor([[0, *self.answer]])}
        else:
            ids, more = torch.tensor([[*prompt, *self.answer]]), {}
        pixels = self.pixels[row : row + 1].to(model.dtype)
        with torch.no_grad():
            output = model(pixel_values=pixels, input_ids=ids, output_hidden_states=True, **more)
        outputs = output.language_model_outputs
        return outputs.decoder_hidden_states if self.is_t5 else outputs.hidden_states, output.logits

    def caches(self, n_rows: int, memory: Memory | None) -> list[LayerCache]:
        return [self.backbone.new_layer_cache(n_rows, CAPACITY, memory) for _ in range(self.backbone.n_blocks)]

    def ragged(self, rows: list[int], starts: list[int], stops: list[int]) -> RaggedSpan:
        span = RaggedSpan(rows, starts, stops, n_rows=len(self.prompts), capacity=CAPACITY, device=CPU)
        return self.backbone.with_shared(span, CPU)

    @torch.no_grad()
    def greedy(self, row: int, n_tokens: int) -> list[int]:
        """Full depth, one token at a time; the prompt in one call, of which only the last output is computed."""
        backbone = self.backbone
        start = backbone.start([self.prompts[row]], backbone.encode_prefix(self.pixels[row : row + 1]))
        held, hidden, length = self.caches(1, start.memory), start.hidden, 0
        tokens: list[int] = []
        while len(tokens) < n_tokens:
            span = backbone.new_span(length, hidden.shape[1], CPU)
            length += hidden.shape[1]
            last = backbone.run_blocks(hidden, 0, backbone.n_blocks, held, span, last_only=True)
            tokens.append(int(backbone.lm_head(backbone.final_norm(last))[0, -1].argmax()))
            hidden = backbone.embed(torch.tensor([tokens[-1:]]), None, length)
        return tokens


def new_case(kind: str, dtype: torch.dtype = torch.float64) -> DecoderCase:
    generator = torch.Generator().manual_seed(2)
    prompts = [
        [IMAGE_TOKEN] * QUERIES + torch.randint(6, VOCAB, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    pixels = torch.randn(len(prompts), 3, 16, 16, generator=generator, dtype=torch.float64)
    return DecoderCase(kind=kind, backbone=new_backbone(kind, dtype), pixels=pixels.to(dtype), prompts=prompts)


@pytest.fixture(scope="module", params=list(TEXT_CONFIGS))
def case(request: pytest.FixtureRequest) -> DecoderCase:
    """In float64, where a wrong cache cannot pass for rounding; parametrised over all kinds of ``TEXT_CONFIGS``."""
    return new_case(request.param)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., DecoderCase]:
    """``make_case(kind, dtype)``: a case of its own, to be changed."""
    return new_case
