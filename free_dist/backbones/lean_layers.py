"""Linear maps and layer norms without the cost of a module call: what the lean blocks of all architectures share.

At batch 1 and small width a module call costs more time than the arithmetic.  Parameters are read directly, so every later
change of a weight is seen, but no forward hook fires and no sharded parameter is gathered.  Knows no architecture.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear(module: nn.Module | None, hidden: Tensor) -> Tensor:
    """A linear map [..., D] -> [..., N]; what is not exactly ``nn.Linear`` is called as the module it is."""
    assert module is not None
    if type(module) is not nn.Linear:  # a wrapper, such as a low-rank adapter, has arithmetic of its own
        return module(hidden)
    parameters = module._parameters
    return F.linear(hidden, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]


def layer_norm(module: nn.Module | None, hidden: Tensor) -> Tensor:
    """A layer norm [..., D] -> [..., D]."""
    assert isinstance(module, nn.LayerNorm)
    parameters = module._parameters
    return torch.layer_norm(hidden, module.normalized_shape, parameters["weight"], parameters["bias"], module.eps)
