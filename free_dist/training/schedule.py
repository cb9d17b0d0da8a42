"""The learning-rate schedule of both stages."""

from __future__ import annotations

import math
from collections.abc import Callable

DEFAULT_WARMUP = 20
"""Steps of warm-up where a recipe names none."""


def warmup_cosine(*, warmup_steps: int | None, max_steps: int) -> Callable[[int], float]:
    """Step -> factor on the peak learning rate: linear warm-up, then a cosine to zero at ``max_steps``.

    ``warmup_steps`` None: 20, or all steps of a shorter run.
    """
    warmup = min(DEFAULT_WARMUP, max_steps) if warmup_steps is None else warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, max_steps - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor
