"""The exits of a backbone: K exit transformers in front of the backbone's own frozen norm and head, or heads of their own.

An exit after block k maps ``h_k`` to a feature that the frozen head can read (FREE, arXiv 2506.06884, section 3).  Does not
know how exits are trained, when they fire, or what an exit transformer is made of (:mod:`free_dist.exits.variants`).

Shape letters: K exits, B batch, T positions, N selected positions, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from free_dist.backbones import Backbone, Memory, Span
from free_dist.backbones.packed import PackedRows
from free_dist.config import ConfigError
from free_dist.exits.variants import ExitVariant, new_exit_transformer

_PREFIX = "transformers."


class ExitBank(nn.Module):
    """K exit transformers and the frozen final norm and head they share.

    ``final_norm`` and ``lm_head``, and the blocks that ``lora`` updates, are the backbone's own, by reference unless
    ``copy_frozen``: a backbone about to be sharded must not take the exits' weights with it.
    """

    def __init__(
        self,
        backbone: Backbone,
        exit_layers: Sequence[int],
        *,
        variant: ExitVariant | str = "full",
        init: str = "next",
        copy_frozen: bool = False,
    ) -> None:
        """``variant``: a name of ``EXIT_VARIANTS``, or ``lens``, with its default sizes, or with sizes of one's own.

        ``init`` names the block that an exit starts from: ``same``, ``next`` or ``last``; not every variant starts from one.
        """
        super().__init__()
        self.exit_layers = tuple(exit_layers)
        self.init = init
        variant = ExitVariant(name=variant) if isinstance(variant, str) else variant
        self.variant = variant.sized(backbone.hidden_size)
        """With every size written out."""
        check_exit_layers(self.exit_layers, backbone.n_blocks)
        final_norm, lm_head = backbone.shared_modules()
        frozen: dict[int, nn.Module] = {}  # exits that start from one block share one copy of it
        transformers = []
        for k in self.exit_layers:
            source = init_block(k, init, backbone.n_blocks)
            block = backbone.block(source)
            if copy_frozen and self.variant.name == "lora":
                if source not in frozen:
                    frozen[source] = copy.deepcopy(block)
                block = frozen[source]
            transformers.append(
                new_exit_transformer(self.variant, block, backbone.block_call, backbone.hidden_size, lm_head)
            )
        self.transformers = nn.ModuleList(transformers)
        self._trainable = {name for name, weight in self.transformers.named_parameters() if weight.requires_grad}
        self.parameters_per_exit = tuple(
            sum(weight.numel() for weight in exit_transformer.parameters() if weight.requires_grad)
            for exit_transformer in self.transformers
        )
        """[K], numbers that training an exit changes; they stay what they are when the bank is merged."""
        if copy_frozen:
            final_norm, lm_head = copy.deepcopy(final_norm), copy.deepcopy(lm_head)
        self.final_norm = final_norm.requires_grad_(False)
        self.lm_head = lm_head.requires_grad_(False)

    def forward(
        self,
        taps: Sequence[Tensor],
        positions: Tensor | None = None,
        *,
        memory: Memory | None = None,
        span: Span | PackedRows | None = None,
    ) -> Tensor:
        """Hidden states ``h_k``, one [B, T, D] per exit -> normed exit features [K, N, D].

        ``positions`` [B, T] selects the N positions that are kept, row by row; None keeps all, giving [K, B, T, D].
        ``memory`` and ``span`` are those of ``BackboneFeatures``; packed rows, taps [M, D], know their answer positions.
        """
        only_answers = isinstance(span, PackedRows) and span.at_answers is not None
        states = [
            exit_transformer(tap, span=span, memory=memory, last_only=only_answers)
            for exit_transformer, tap in zip(self.transformers, taps, strict=True)
        ]
        if isinstance(span, PackedRows):
            states = states if only_answers else [state.index_select(0, span.answers) for state in states]
        elif positions is not None:
            states = [state[positions] for state in states]
        return self.final_norm(torch.stack(states))

    @property
    def has_own_heads(self) -> bool:
        """Whether exits read their features with heads of their own, which are then trained too."""
        return any(exit_transformer.own_head is not None for exit_transformer in self.transformers)

    @property
    def blocks_per_exit(self) -> int:
        """Blocks that one call of an exit counts as: 1 for an exit transformer that is a block, 0 for what is none."""
        return int(all(exit_transformer.is_block for exit_transformer in self.transformers))

    def logits(self, features: Tensor) -> Tensor:
        """The full model's normed features [..., D] -> logits [..., V] of the frozen head."""
        return self.lm_head(features)

    def exit_logits(self, features: Tensor) -> Tensor:
        """Normed features of all exits [K, ..., D] -> logits [K, ..., V] of the heads that read them."""
        if not self.has_own_heads:
            return self.lm_head(features)
        return torch.stack([self.logits_of(index, own) for index, own in enumerate(features)])

    def logits_of(self, exit_index: int, features: Tensor) -> Tensor:
        """Normed features of one exit [..., D] -> logits [..., V] of the head that reads them."""
        head = self.transformers[exit_index].own_head
        return self.lm_head(features) if head is None else head(features)  # type: ignore[operator]

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The weights that training changes, alone: of ``lora`` the updates, without the blocks they belong to."""
        weights = self.transformers.state_dict()
        return {_PREFIX + name: tensor for name, tensor in weights.items() if name in self._trainable}

    def load_trainable_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`trainable_state_dict`, in this bank's type and device; raises ValueError unless all names fit."""
        wanted = {_PREFIX + name for name in self._trainable}
        if wanted != set(weights):
            raise ValueError(f"not the weights of these exits: {sorted(wanted ^ set(weights))[:3]} and more")
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
        self.transformers.load_state_dict(own, strict=False)

    def save_pretrained(
        self, directory: str | Path, backbone: Backbone, *, thresholds: float | Sequence[float]
    ) -> None:
        """Write an export for the backbone these exits hang on: :func:`free_dist.exits.export.save_exits`."""
        from free_dist.exits.export import save_exits  # which needs this class

        save_exits(self, directory, backbone=backbone, thresholds=thresholds)

    @classmethod
    def from_pretrained(cls, directory: str | Path, backbone: Backbone) -> ExitBank:
        """An export on its backbone, ready to decode: :func:`free_dist.exits.export.load_exits`; raises what that raises."""
        from free_dist.exits.export import load_exits  # which needs this class

        return load_exits(backbone, directory)

    def merged(self) -> ExitBank:
        """The same exits in the form that decodes fastest: ``lora`` as full blocks, one set of matrices more per exit.

        The other variants are that already, and this bank itself is returned.  A merged bank does not follow later changes
        of the updates or of the backbone's matrices, and its own variant is ``full``.
        """
        if self.variant.name != "lora":
            return self
        bank = copy.copy(self)
        bank._modules = dict(self._modules)
        bank.transformers = nn.ModuleList(module.merged() for module in self.transformers).train(self.training)  # type: ignore[operator]
        bank.variant = replace(self.variant, name="full")
        bank._trainable = {name for name, _ in bank.transformers.named_parameters()}
        return bank

    def subset(self, exit_layers: Sequence[int]) -> ExitBank:
        """Some of these exits as a bank of their own, which decodes as this one does with the others switched off.

        Weights are shared.  Raises ConfigError for a layer without an exit.
        """
        missing = [k for k in exit_layers if k not in self.exit_layers]
        if missing:
            raise ConfigError(
                f"exits.exit_layers={list(exit_layers)}: no exit after {missing}; there are {list(self.exit_layers)}"
            )
        check_exit_layers(exit_layers, max(self.exit_layers))
        rows = [self.exit_layers.index(k) for k in exit_layers]
        bank = copy.copy(self)
        bank._modules = dict(self._modules)
        bank.exit_layers = tuple(exit_layers)
        bank.parameters_per_exit = tuple(self.parameters_per_exit[i] for i in rows)
        bank.transformers = nn.ModuleList(self.transformers[i] for i in rows).train(self.training)
        new = {str(i): str(place) for place, i in enumerate(rows)}
        parts = [name.partition(".") for name in self._trainable]
        bank._trainable = {f"{new[number]}.{rest}" for number, _, rest in parts if number in new}
        return bank


def trained_parameters(bank: ExitBank) -> int:
    """Numbers that training the exits of a bank changes, also of a merged one: of ``lora`` the updates, not the blocks."""
    return sum(bank.parameters_per_exit)


def check_exit_layers(exit_layers: Sequence[int], n_blocks: int) -> None:
    """Raise ConfigError unless the layers are strictly increasing and lie in 1..L."""
    ordered = sorted(set(exit_layers))
    if not exit_layers or list(exit_layers) != ordered or ordered[0] < 1 or ordered[-1] > n_blocks:
        raise ConfigError(
            f"exits.exit_layers={list(exit_layers)}: want strictly increasing block numbers from 1 to {n_blocks}"
        )


def init_block(exit_layer: int, init: str, n_blocks: int) -> int:
    """The block, 1-based, that an exit after ``exit_layer`` is copied from; raises ConfigError for an unknown ``init``."""
    sources = {"same": exit_layer, "next": min(exit_layer + 1, n_blocks), "last": n_blocks}
    if init not in sources:
        raise ConfigError(f"exits.init={init!r}: want one of {', '.join(sources)}")
    return sources[init]
