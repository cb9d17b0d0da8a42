"""The learning-rate schedule of both stages."""

from __future__ import annotations

import math
from collections.abc import Callable


def warmup_cosine(*, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Step -> factor on the peak learning rate: linear warm-up, then a cosine to zero at ``max_steps``."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor
