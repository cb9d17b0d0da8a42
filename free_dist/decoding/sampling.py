"""How the next token is taken from logits: the most likely one, or a draw after temperature, top-k and top-p.

Knows nothing of exits, caches or drafts.

Shape letters: N positions, M columns of a head, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from free_dist.config import UserError
from free_dist.decoding.policy import Scores


class Sampler:
    """Draws tokens from warped distributions; the warpers are transformers' own, in its order."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """``generator`` makes draws repeatable; None takes torch's default.  Raises UserError naming a bad argument."""
        if not temperature > 0:
            raise UserError(
                f"temperature={temperature}: want a number above 0; for greedy decoding set do_sample=False"
            )
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k={top_k}: want at least 1, or None for no limit")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p}: want a number above 0 and at most 1, or None")
        self._warpers = LogitsProcessorList()
        if temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(top_p)))
        self._generator = generator

    def probabilities(self, scores: Scores, vocab_size: int) -> Tensor:
        """Logits over [N, M] columns -> warped probabilities over the vocabulary, [N, V], float32 at least.

        Tokens that a head leaves out have probability 0.
        """
        logits = scores.logits if scores.logits.dtype == torch.float64 else scores.logits.float()
        probabilities = torch.softmax(self._warpers(None, logits), dim=-1)
        if scores.ids is None:
            return probabilities
        whole = probabilities.new_zeros(probabilities.shape[0], vocab_size)
        return whole.index_copy_(1, scores.ids, probabilities)

    def draw(self, probabilities: Tensor) -> Tensor:
        """One token per row of [N, V] probabilities (any scale), [N] int64."""
        return torch.multinomial(probabilities, 1, generator=self._generator)[:, 0]

    def uniform(self, n: int, device: torch.device) -> Tensor:
        """n numbers in [0, 1)."""
        return torch.rand(n, generator=self._generator, device=device)
