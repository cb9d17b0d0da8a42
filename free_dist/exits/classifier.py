"""Feature classifiers: discriminators, one per exit or one for all, that tell real from fake by token features.

Real is the normed final-layer feature, fake the normed exit feature (FREE, section 3).  Discarded at inference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAK = 0.2
"""Negative slope of the hidden LeakyReLU."""


class FeatureClassifiers(nn.Module):
    """K independent MLPs D -> hidden -> 1, with stacked weights so that all run in two batched products; or one for all K."""

    def __init__(self, n_exits: int, feature_size: int, hidden_size: int, *, shared: bool = False) -> None:
        """``shared``: one MLP judges the features of every exit."""
        super().__init__()
        n_exits = 1 if shared else n_exits
        self.weight_in = nn.Parameter(torch.empty(n_exits, feature_size, hidden_size))
        self.bias_in = nn.Parameter(torch.zeros(n_exits, 1, hidden_size))
        self.weight_out = nn.Parameter(torch.empty(n_exits, hidden_size, 1))
        self.bias_out = nn.Parameter(torch.zeros(n_exits, 1, 1))
        for k in range(n_exits):
            nn.init.kaiming_uniform_(self.weight_in[k].T, a=LEAK)
            nn.init.xavier_uniform_(self.weight_out[k].T)

    def forward(self, features: Tensor) -> Tensor:
        """[K, N, D] -> logits [K, N]; positive means real."""
        weight_in, weight_out = (weight.expand(len(features), -1, -1) for weight in (self.weight_in, self.weight_out))
        hidden = F.leaky_relu(torch.baddbmm(self.bias_in, features, weight_in), LEAK)
        return torch.baddbmm(self.bias_out, hidden, weight_out).squeeze(-1)
