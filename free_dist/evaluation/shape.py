"""A backbone of true shapes with random weights, and exits that emit as a script says: the mechanism without a checkpoint.

Weights are random but every block has its own, because decoding one sequence is bound by reading them.  Scores, gates and
confidences are computed in full and then overruled, so costs are real although decisions are not.
Does not know times or how costs are predicted.

Shape letters: K exits, R rows of a call, D model width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

from free_dist.backbones import Blip2Backbone
from free_dist.decoding.policy import Decision, MaxProbPolicy, Scores
from free_dist.exits import ExitBank
from free_dist.exits.classifier import FeatureClassifiers
from free_dist.exits.gate import ExitChecks, FullHead, LowRankHead, PrunedHead

WEIGHT_SCALE = 0.02
"""Half width of the uniform distribution that weights are drawn from."""
POOL = 1 << 24
"""Random numbers drawn in all; tensors take their weights from random places of them, which is as fast as copying."""
GATE_SIZE = 256
"""Hidden units of a gate."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a BLIP-2 with an OPT language model."""

    n_blocks: int
    width: int
    n_heads: int
    inner: int
    """Width between the two linear maps of a block's feed-forward half."""
    vocab_size: int
    n_queries: int
    """Visual positions."""


OPT_2_7B = Shape(n_blocks=32, width=2560, n_heads=32, inner=10240, vocab_size=50272, n_queries=32)
"""The language model of BLIP-2 OPT-2.7B."""


def random_backbone(shape: Shape, *, dtype: torch.dtype, vision: bool = False, seed: int = 0) -> Blip2Backbone:
    """A frozen backbone of ``shape`` on the CPU; 5.6 GB in bfloat16 for OPT-2.7B.

    ``vision``: with BLIP-2's own vision tower and Q-Former (1.1 billion weights more) instead of toys of one layer.
    """
    text = OPTConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        word_embed_proj_dim=shape.width,
        ffn_dim=shape.inner,
        num_hidden_layers=shape.n_blocks,
        num_attention_heads=shape.n_heads,
        dropout=0.0,
        attention_dropout=0.0,
    )
    if vision:
        tower, qformer = Blip2VisionConfig(), Blip2QFormerConfig()
    else:
        tower = Blip2VisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28
        )
        qformer = Blip2QFormerConfig(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            encoder_hidden_size=32,
        )
    config = Blip2Config(
        vision_config=tower,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=shape.n_queries,
        image_token_index=shape.vocab_size - 1,
    )
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    fill(model, seed)
    return Blip2Backbone(model.eval().requires_grad_(False))


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Give an uninitialised model weights: small random numbers, and ones for the gains of layer norms."""
    chooser = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(POOL).uniform_(-WEIGHT_SCALE, WEIGHT_SCALE, generator=generator)
    pools = {dtype: pool.to(dtype) for dtype in {parameter.dtype for parameter in model.parameters()}}
    for parameter in model.parameters():
        flat = parameter.view(-1)
        numbers = pools[parameter.dtype]
        for begin in range(0, len(flat), POOL // 2):
            part = flat[begin : begin + POOL // 2]
            offset = chooser.randrange(POOL - len(part) + 1)
            part.copy_(numbers[offset : offset + len(part)])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
    for name, buffer in model.named_buffers():
        assert name.endswith("position_ids"), f"{name}: how to fill this buffer is not known"
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


class Script:
    """Which exit each answer token leaves at; the policy and the gate made from it ask where the decoder stands.

    For one row, without lossless mode.
    """

    def __init__(
        self, layers: Sequence[int], exit_layers: Sequence[int], *, false_open: float = 0.0, checked: bool = True
    ) -> None:
        """``layers``: per token an exit layer, or any other number for full depth.

        ``false_open``: share of the other visits at which the gate opens all the same.  ``checked=False``: the stack is cut at
        the exits, but none is asked.
        """
        self._layers = tuple(layers)
        self._exit_layers = tuple(exit_layers)
        self._false_open = false_open
        self._checked = checked
        self._random = random.Random(len(layers))
        self._visited = 0
        self._measure = MaxProbPolicy(0.0, len(self._exit_layers))

    def is_active(self, exit_index: int) -> bool:
        """Always: every exit cuts the stack."""
        return True

    def is_active_at(self, exit_index: int, position: int) -> bool:
        """Whether exits are asked; notes the answer position, which a gate is not told."""
        self._visited = position
        return self._checked

    def decide(
        self, exit_index: int, scores: Scores, positions: Sequence[int], earlier: Sequence[Sequence[int]]
    ) -> Decision:
        """What the scores say, with the script's decision."""
        decision = self._measure.decide(exit_index, scores, positions, earlier)
        return decision._replace(emit=[self._emits(exit_index, position) for position in positions])

    def opens_gate(self, exit_index: int) -> bool:
        """Whether the gate lets the visit through that was announced last."""
        return self._emits(exit_index, self._visited) or self._random.random() < self._false_open

    def _emits(self, exit_index: int, position: int) -> bool:
        return self._layers[position] == self._exit_layers[exit_index]


class ScriptedChecks(ExitChecks):
    """Checks whose gate is computed and then, where there is a script, says what the script says."""

    script: Script | None = None

    def may_exit(self, exit_index: int, hidden: Tensor) -> Tensor | None:
        """Un-normed ``h_k`` [R, D] -> bool [R], or None without gates."""
        likely = super().may_exit(exit_index, hidden)
        if likely is None or self.script is None:
            return likely
        return torch.full_like(likely, self.script.opens_gate(exit_index))


def random_checks(backbone: Blip2Backbone, bank: ExitBank, head: str, *, gate: bool, size: int) -> ScriptedChecks:
    """Checks with random gates and a head of this backbone's: ``full``, ``pruned`` to ``size`` rows, ``low_rank`` of ``size``."""
    generator = torch.Generator().manual_seed(0)
    lm_head = bank.lm_head
    assert isinstance(lm_head, nn.Linear)
    made: FullHead | PrunedHead | LowRankHead
    if head == "full":
        made = FullHead(lm_head)
    elif head == "pruned":
        made = PrunedHead(lm_head, torch.randperm(backbone.vocab_size, generator=generator)[:size])
    else:
        factor = torch.randn(size, backbone.hidden_size, generator=generator)
        made = LowRankHead(lm_head, factor, factor.t() / backbone.hidden_size, rescored=32)
    n_exits = len(bank.exit_layers)
    gates = FeatureClassifiers(n_exits, backbone.hidden_size, GATE_SIZE).requires_grad_(False) if gate else None
    return ScriptedChecks(made, gates=gates, gate_thresholds=[0.5] * n_exits if gate else ())
