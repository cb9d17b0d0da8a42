"""Cheap checks of an exit: a learned gate before it, a discriminator behind it, and heads that read fewer weights.

A full check of an exit costs one exit transformer and one vocabulary head, which weighs more than a block.  Most visits
that emit nothing can be told earlier: the gate looks at ``h_k`` before the exit transformer, the discriminator at the exit
feature before the head, and a smaller head decides on what is left.  Each is an option and works with or without the others.

Does not know thresholds of confidence, caches, or how gates and factors are fitted (``check_fitting``) and kept
(``check_files``).  Nothing here waits for the device: every answer is a tensor.

Shape letters: K exits, R rows in a call, D model width, V vocabulary, M columns of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from free_dist.backbones import Backbone
from free_dist.config import EXIT_HEADS, ConfigError, UserError
from free_dist.exits.classifier import LEAK, FeatureClassifiers
from free_dist.exits.transformer import ExitBank


class Scores(NamedTuple):
    """What an exit head returns."""

    logits: Tensor
    """[R, M]."""
    ids: Tensor | None
    """[M] int64, token id of each column, ascending; None: column = token id."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Which cheap checks are switched on; raises ConfigError for values that cannot run."""

    gate: bool = False
    """Ask the gate before the exit transformer."""
    gate_threshold: float | Sequence[float] | None = None
    """Probability that opens the gate, for all exits or one per exit; None: as fitted."""
    head: str = "full"
    """``full``, ``pruned`` (frequent rows of the frozen head) or ``low_rank`` (approximate screen, exact rescore)."""
    pruned_size: int | None = None
    """Rows of the pruned head, the end-of-sequence token's included; None: as fitted."""
    rank: int | None = None
    """Rank of the screen; None: as fitted."""
    rescored: int = 32
    """Best columns of the screen, per row, that are computed again exactly."""
    discriminator: bool = False
    """Ask the exit's feature classifier before the head."""
    discriminator_threshold: float | Sequence[float] | None = None
    """Probability that lets a feature pass to the head, for all exits or one per exit; None: as fitted."""

    @property
    def setting(self) -> str:
        """What is switched on, in the order it is asked, such as ``gate+pruned``."""
        return setting_name(gate=self.gate, discriminator=self.discriminator, head=self.head)

    def __post_init__(self) -> None:
        if self.head not in EXIT_HEADS:
            raise ConfigError(f"head={self.head!r}: want one of {', '.join(EXIT_HEADS)}")
        for name, size in (("pruned_size", self.pruned_size), ("rank", self.rank), ("rescored", self.rescored)):
            if size is not None and size < 1:
                raise ConfigError(f"{name}={size}: want at least 1")
        for name in ("gate_threshold", "discriminator_threshold"):
            value = self.gate_threshold if name == "gate_threshold" else self.discriminator_threshold
            values = [value] if isinstance(value, (int, float)) else value or []
            if not all(0 <= one <= 1 for one in values):
                raise ConfigError(f"{name}={value}: want probabilities from 0 (lets all pass) to 1 (none)")


class FullHead(nn.Module):
    """The frozen head itself, by reference."""

    def __init__(self, lm_head: nn.Module) -> None:
        super().__init__()
        self.lm_head = lm_head

    def forward(self, features: Tensor) -> Scores:
        """Normed features [R, D] -> exact logits [R, V]."""
        return Scores(self.lm_head(features), None)


class OwnHeads(nn.Module):
    """The heads of exits that have one each, by reference."""

    def __init__(self, bank: ExitBank) -> None:
        """Of a bank that ``has_own_heads``."""
        super().__init__()
        self.heads = nn.ModuleList(exit_transformer.own_head for exit_transformer in bank.transformers)  # type: ignore[misc]

    def forward(self, exit_index: int, features: Tensor) -> Scores:
        """Normed features of one exit [R, D] -> logits [R, V] of its head."""
        return Scores(self.heads[exit_index](features), None)


class PrunedHead(nn.Module):
    """Chosen rows of the frozen head, copied so that they lie side by side in memory.

    Its logits are the full head's.  Its softmax leaves the other tokens out, so a confidence is at least the full head's:
    choose thresholds with the head they are used with.
    """

    ids: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, lm_head: nn.Linear, ids: Tensor) -> None:
        """``ids`` [M]: tokens to keep, in any order, none twice."""
        super().__init__()
        kept = torch.sort(ids.to(lm_head.weight.device, torch.long)).values
        self.register_buffer("ids", kept)
        self.register_buffer("weight", lm_head.weight.detach()[kept].contiguous())
        self.register_buffer("bias", None if lm_head.bias is None else lm_head.bias.detach()[kept].contiguous())

    def forward(self, features: Tensor) -> Scores:
        """Normed features [R, D] -> exact logits [R, M] of the kept tokens."""
        return Scores(F.linear(features, self.weight, self.bias), self.ids)


class LowRankHead(nn.Module):
    """Approximate logits of every token from two thin factors; each row's best ones are replaced by exact logits.

    The approximate ones stay in the softmax, so a confidence still counts the whole vocabulary.
    """

    down: Tensor
    up: Tensor

    def __init__(self, lm_head: nn.Linear, down: Tensor, lift: Tensor, rescored: int) -> None:
        """``down`` [rank, D] and ``lift`` [D, rank]: ``W @ lift @ down`` approximates the head's weight ``W`` [V, D]."""
        super().__init__()
        self.lm_head = lm_head
        weight = lm_head.weight.detach()
        # The product is taken in float32, or a half-precision head would be rounded twice.
        self.register_buffer("up", (weight.float() @ lift.to(weight.device, torch.float32)).to(weight.dtype))
        self.register_buffer("down", down.to(weight).contiguous())
        self.rescored = min(rescored, len(weight))

    def forward(self, features: Tensor) -> Scores:
        """Normed features [R, D] -> logits [R, V], exact in each row's ``rescored`` best columns of the screen."""
        screened = F.linear(F.linear(features, self.down), self.up, self.lm_head.bias)
        best = screened.topk(self.rescored, dim=-1, sorted=False).indices  # [R, rescored]
        rows = F.embedding(best, self.lm_head.weight)  # [R, rescored, D]
        exact = torch.bmm(rows, features.unsqueeze(-1)).squeeze(-1)
        if self.lm_head.bias is not None:
            exact = exact + self.lm_head.bias[best]
        return Scores(screened.scatter(-1, best, exact), None)


class CheckCosts(NamedTuple):
    """Weights that the parts of one check read, in units of one block's: their cost where weight traffic is the limit."""

    gate: float
    exit_transformer: float
    discriminator: float
    head: float

    def visit(self, gate_rate: float = 1.0, discriminator_rate: float = 1.0) -> float:
        """Mean cost of a visit in blocks; the rates are the shares of visits and of features that are let through."""
        return self.gate + gate_rate * (self.exit_transformer + self.discriminator + discriminator_rate * self.head)


class ExitChecks(nn.Module):
    """The checks of all K exits, in the order they are asked: gate, exit transformer (not here), discriminator, head."""

    def __init__(
        self,
        head: FullHead | OwnHeads | PrunedHead | LowRankHead,
        *,
        gates: FeatureClassifiers | None = None,
        gate_thresholds: Sequence[float] = (),
        discriminators: FeatureClassifiers | None = None,
        discriminator_thresholds: Sequence[float] = (),
    ) -> None:
        """Without gates and discriminators, float32 both, nothing is turned away; thresholds are probabilities, per exit."""
        super().__init__()
        self.head = head
        self.gates = gates
        self.gate_thresholds = tuple(gate_thresholds)
        self.discriminators = discriminators
        self.discriminator_thresholds = tuple(discriminator_thresholds)
        self._gate_logits = [_logit(value) for value in self.gate_thresholds]
        self._discriminator_logits = [_logit(value) for value in self.discriminator_thresholds]

    def may_exit(self, exit_index: int, hidden: Tensor) -> Tensor | None:
        """Un-normed ``h_k`` [R, D] -> bool [R], true where the exit is worth running; None: no gate, always run it."""
        if self.gates is None:
            return None
        return gate_logits(self.gates, exit_index, hidden) > self._gate_logits[exit_index]

    def looks_final(self, exit_index: int, features: Tensor) -> Tensor | None:
        """Normed exit features [R, D] -> bool [R], true where the head is worth running; None: no discriminator."""
        if self.discriminators is None:
            return None
        logits = discriminator_logits(self.discriminators, exit_index, features)
        return logits > self._discriminator_logits[exit_index]

    def scores(self, exit_index: int, features: Tensor) -> Scores:
        """Normed features of one exit [R, D] -> logits [R, M]; exits share one head unless each has its own."""
        return self.head(exit_index, features) if isinstance(self.head, OwnHeads) else self.head(features)

    def costs(self, backbone: Backbone, exit_transformer: nn.Module) -> CheckCosts:
        """What each part reads, in blocks of ``backbone``; ``exit_transformer`` is one of those asked, which are alike."""
        block = sum(parameter.numel() for parameter in backbone.block(1).parameters())

        def of_one_exit(classifiers: FeatureClassifiers | None) -> float:
            if classifiers is None:
                return 0.0
            return sum(parameter[0].numel() for parameter in classifiers.parameters()) / block

        head = self.head
        if isinstance(head, PrunedHead):
            read = head.weight.numel()
        elif isinstance(head, LowRankHead):
            read = head.up.numel() + head.down.numel() + head.rescored * head.down.shape[1]
        else:
            asked = head.heads[0] if isinstance(head, OwnHeads) else head
            read = sum(parameter.numel() for parameter in asked.parameters())
        exit_read = sum(parameter.numel() for parameter in exit_transformer.parameters())
        if isinstance(head, OwnHeads):
            exit_read -= read  # it holds its head
        return CheckCosts(of_one_exit(self.gates), exit_read / block, of_one_exit(self.discriminators), read / block)


def setting_name(*, gate: bool, discriminator: bool, head: str) -> str:
    """One combination of checks by name, such as ``gate+pruned``; ``full`` is the check without any of them."""
    return "+".join(["gate"] * gate + ["discriminator"] * discriminator + [head])


def gate_logits(gates: FeatureClassifiers, exit_index: int, hidden: Tensor) -> Tensor:
    """Un-normed ``h_k`` [R, D] -> one exit's gate logits [R]; the layer norm takes out the scale, which grows with k."""
    return discriminator_logits(gates, exit_index, F.layer_norm(hidden.float(), hidden.shape[-1:]))


def discriminator_logits(classifiers: FeatureClassifiers, exit_index: int, features: Tensor) -> Tensor:
    """Features [R, D] -> one exit's logits [R]: entry ``exit_index`` of ``FeatureClassifiers.forward``, alone."""
    # Always float32: the classifiers are small, and half precision of this layout is slow on a CPU without matrix units.
    inner = torch.addmm(classifiers.bias_in[exit_index], features.float(), classifiers.weight_in[exit_index])
    inner = F.leaky_relu(inner, LEAK)
    return torch.addmm(classifiers.bias_out[exit_index], inner, classifiers.weight_out[exit_index]).squeeze(-1)


def full_head(bank: ExitBank) -> FullHead | OwnHeads:
    """What reads a bank's exits without anything left out: the frozen head, or the exits' own."""
    return OwnHeads(bank) if bank.has_own_heads else FullHead(bank.lm_head)


def linear_head(bank: ExitBank) -> nn.Linear:
    """The bank's head where it is one matrix; raises UserError for any other, of which only ``head=full`` can be made."""
    if bank.has_own_heads:
        raise UserError("head: these exits are classifiers with a head each; only head=full reads them")
    if not isinstance(bank.lm_head, nn.Linear):
        kind = type(bank.lm_head).__name__
        raise UserError(f"head: this backbone's head is a {kind}, not one matrix; only head=full reads it")
    return bank.lm_head


def _logit(probability: float) -> float:
    # Thresholds are compared as logits, so that no row pays for a sigmoid; 0 and 1 let everything and nothing pass.
    return float(torch.logit(torch.tensor(probability, dtype=torch.float64)))
