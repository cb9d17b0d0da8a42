"""The tuned lens: one affine translator per block, trained so that norm and head read the full model's distribution there.

Belrose et al. 2023 (arXiv 2303.08112): ``h -> h + W h + b``, trained with KL from the final distribution, starting at the
identity, where it is the logit lens.  Between the logit lens and an exit transformer: it may turn a block's states, but cannot
look at other positions.  Does not know tasks or what is done with its readings.

Shape letters: L blocks, N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from free_dist.backbones import Backbone
from free_dist.data.samples import IGNORE, Batch
from free_dist.evaluation.probe import all_blocks

BATCH = 256
"""Tokens of a training step."""
LEARNING_RATE = 1e-3


class TunedLens(nn.Module):
    """Translators of all blocks but the last, which is read as it is."""

    def __init__(self, n_blocks: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_blocks - 1, width, width))
        """[L - 1, D, D]; zero is the identity."""
        self.bias = nn.Parameter(torch.zeros(n_blocks - 1, width))

    def translate(self, k: int, hidden: Tensor) -> Tensor:
        """States after block ``k`` (1-based) [..., D] -> translated states, before the final norm."""
        if k > len(self.weight):
            return hidden
        wide = hidden.to(self.weight.dtype)
        return (wide + wide @ self.weight[k - 1].T + self.bias[k - 1]).to(hidden.dtype)

    def tokens(self, backbone: Backbone, hidden: Iterable[Tensor]) -> Tensor:
        """States after every block, each [N, D] -> the tokens that are read there [L, N]."""
        read = (
            backbone.lm_head(backbone.final_norm(self.translate(k, h))).argmax(-1)
            for k, h in enumerate(hidden, start=1)
        )
        return torch.stack(list(read))


@torch.no_grad()
def answer_states(backbone: Backbone, batches: Iterable[Batch], *, limit: int) -> tuple[Tensor, Tensor]:
    """States after every block [L, N, D] and final normed features [N, D] at answer positions, at most ``limit`` of them."""
    hidden, final = [], []
    n = 0
    for batch in batches:
        features, kept = all_blocks(backbone, batch), batch.targets != IGNORE
        hidden.append(torch.stack([h[kept] for h in features.exits]))
        final.append(features.final[kept])
        n += len(final[-1])
        if n >= limit:
            break
    return torch.cat(hidden, dim=1)[:, :limit], torch.cat(final)[:limit]


@torch.no_grad()
def final_log_probs(backbone: Backbone, final: Tensor) -> Tensor:
    """log p_L [N, V], float32, of the full model, from its final normed features [N, D]."""
    return F.log_softmax(backbone.lm_head(final).float(), dim=-1)


def lens_divergence(backbone: Backbone, lens: TunedLens, k: int, hidden: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL(p_L || p_k) in nats of block ``k``'s states [N, D]; ``wanted``: log p_L [N, V]."""
    read = F.log_softmax(backbone.lm_head(backbone.final_norm(lens.translate(k, hidden))).float(), dim=-1)
    return F.kl_div(read, wanted, reduction="batchmean", log_target=True)


def train_tuned_lens(
    backbone: Backbone,
    hidden: Tensor,
    final: Tensor,
    *,
    steps: int,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> TunedLens:
    """Train all translators for ``steps`` steps on states [L, N, D] and final features [N, D]; the backbone stays as it is."""
    lens = TunedLens(backbone.n_blocks, hidden.shape[-1]).to(hidden.device)
    optimizer = torch.optim.Adam(lens.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=max(1, steps))
    draws = _draws(len(final), seed)
    for _ in progress(range(steps)):
        rows = next(draws).to(hidden.device)
        wanted = final_log_probs(backbone, final[rows])
        optimizer.zero_grad()
        for k in range(1, backbone.n_blocks):  # one block's logits at a time; translators do not share weights
            lens_divergence(backbone, lens, k, hidden[k - 1, rows], wanted).backward()
        optimizer.step()
        schedule.step()
    return lens.eval().requires_grad_(False)


def _draws(n: int, seed: int) -> Iterator[Tensor]:
    """Numbers of the tokens of a step, epoch after epoch in new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order.split(min(BATCH, n))
