"""What shows, at a logged step, whether exits are healthy: collapse, drift from the full model, calibration, length bias.

Measured on some of a batch's answer positions, over all ranks.  Does not know thresholds of alarms, nor what was measured
before (``free_dist.training.alarms``).

Shape letters: K exits, N answer positions of this rank's micro-batch, M of them that are looked at, D model width, V
vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from free_dist.distributed import all_reduce_sum
from free_dist.exits import ExitBank

POSITIONS = 256
"""Most answer positions of a rank that are looked at, evenly spread."""

BINS = 10
"""Bins of equal width of the expected calibration error."""


class ExitHealth:
    """Measures exits against the full model at one step."""

    def __init__(self, *, threshold: float, eos_token_id: int) -> None:
        """``threshold``: the confidence above which an exit emits; ``eos_token_id`` ends an answer."""
        self._threshold = threshold
        self._eos = eos_token_id

    @torch.no_grad()
    def measure(self, bank: ExitBank, fake: Tensor, final: Tensor) -> dict[str, Tensor]:
        """Exit features [K, N, D] and the full model's [N, D] -> values over all ranks, the same on every one.

        Per exit, [K]: ``kl_to_full``, KL(p_L || p_k); ``calibration_error`` of its confidence against agreement with the full
        model, and ``confidence_gap``, mean confidence less agreement; ``exit_share``, tokens that leave there at the threshold;
        ``eos_excess``, share of tokens at which it alone ends the text, less those at which the full model alone does;
        ``token_entropy_ratio`` and ``feature_rank_ratio``, entropy of its most likely tokens and participation ratio of its
        centred features over those of the full model; and, of several exits, ``cosine_to_nearest_exit``.  Scalar:
        ``exit_share_full``.  A ratio is NaN where the full model itself has nearly one token or direction.
        """
        count = min(final.shape[0], POSITIONS)
        chosen = torch.linspace(0, final.shape[0] - 1, count, device=final.device).long()
        fake, final = fake[:, chosen], final[chosen]
        target = F.log_softmax(bank.logits(final).float(), dim=-1)  # [M, V]
        full_tokens = target.argmax(-1)  # [M]
        kl, confidence, tokens = [], [], []
        for index, features in enumerate(fake):  # one exit's logits at a time: they are the largest tensor
            log_p = F.log_softmax(bank.logits_of(index, features).float(), dim=-1)
            kl.append((target.exp() * (target - log_p)).sum())
            best, token = log_p.max(-1)
            confidence.append(best.exp())
            tokens.append(token)
        sure, said = torch.stack(confidence), torch.stack(tokens)  # [K, M]
        agree = (said == full_tokens).float()
        sums = {
            "count": sure.new_tensor([float(count)]),
            "kl": torch.stack(kl),
            "bins": _bins(sure, agree),
            "leaving": _leaving(sure > self._threshold),
            "eos": ((said == self._eos).float() - (full_tokens == self._eos).float()).sum(-1),
            "tokens": torch.stack([_histogram(row, target.shape[-1]) for row in (*said, full_tokens)]),
            "rank": count * torch.stack([_participation_ratio(rows) for rows in (*fake, final)]),
            "cosine": count * _cosine_to_nearest(fake),
        }
        total = _summed_over_ranks(sums)
        number = total["count"]
        entropy = _entropy(total["tokens"])  # [K + 1]
        rank = total["rank"] / number
        gaps = (total["bins"][..., 1] - total["bins"][..., 2]) / number  # [K, bins]
        report = {
            "kl_to_full": total["kl"] / number,
            "calibration_error": gaps.abs().sum(-1),
            "confidence_gap": gaps.sum(-1),
            "exit_share": total["leaving"][:-1] / number,
            "exit_share_full": total["leaving"][-1] / number[0],
            "eos_excess": total["eos"] / number,
            "token_entropy_ratio": entropy[:-1] / _or_nan(entropy[-1], 0.1),
            "feature_rank_ratio": rank[:-1] / _or_nan(rank[-1], 1.1),
        }
        if len(fake) > 1:
            report["cosine_to_nearest_exit"] = total["cosine"] / number
        return report


def _bins(confidence: Tensor, agree: Tensor) -> Tensor:
    """[K, M] each -> [K, BINS, 3]: number, summed confidence and summed agreement of the positions in each bin."""
    place = (confidence.nan_to_num(0.0) * BINS).long().clamp_(0, BINS - 1)
    member = F.one_hot(place, BINS).float()  # [K, M, bins]
    return torch.stack([member.sum(1), *(torch.einsum("kmb,km->kb", member, x) for x in (confidence, agree))], dim=-1)


def _leaving(confident: Tensor) -> Tensor:
    """[K, M] bool -> number of positions that leave at each exit, and at none, [K + 1]."""
    here = torch.cat([confident, torch.ones_like(confident[:1])]).float()
    return (here.cumsum(0) == 1).float().mul(here).sum(-1)


def _histogram(tokens: Tensor, size: int) -> Tensor:
    return torch.bincount(tokens, minlength=size).float()


def _entropy(counts: Tensor) -> Tensor:
    """[..., V] counts -> entropy in nats, [...]."""
    return torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1)


def _participation_ratio(features: Tensor) -> Tensor:
    """[M, D] -> (sum of eigenvalues)^2 / sum of squared eigenvalues of their covariance: how many directions they fill."""
    centred = features.float() - features.float().mean(0)
    gram = centred @ centred.T
    return gram.diagonal().sum() ** 2 / gram.square().sum().clamp(min=1e-30)


def _cosine_to_nearest(fake: Tensor) -> Tensor:
    """[K, M, D] -> per exit its largest mean cosine with another exit's features, [K]; 0 for a single exit."""
    unit = F.normalize(fake.float(), dim=-1)
    cosines = torch.einsum("kmd,jmd->kj", unit, unit) / fake.shape[1]
    cosines.fill_diagonal_(-1.0)
    return cosines.max(-1).values if len(fake) > 1 else cosines.new_zeros(1)


def _or_nan(value: Tensor, least: float) -> Tensor:
    return torch.where(value >= least, value, torch.full_like(value, float("nan")))


def _summed_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    # One collective for all: each would cost a synchronisation of its own.
    flat = all_reduce_sum(torch.cat([value.reshape(-1).double() for value in values.values()]))
    parts = flat.split([value.numel() for value in values.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}
