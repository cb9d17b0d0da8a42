"""The state of every random number generator of this process, as tensors.  Knows Python, NumPy and torch; nothing else."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

NO_GAUSS = 0.0
"""What stands for "no number in store": Python and NumPy draw normal numbers in pairs and keep the second."""


def random_state() -> dict[str, Tensor]:
    """Name -> state: Python's, NumPy's, torch's and, where there is one, the current GPU's."""
    _, words, kept = random.getstate()
    legacy = np.random.get_state(legacy=False)
    numpy = np.append(legacy["state"]["key"], np.uint32(legacy["state"]["pos"]))
    states = {
        # Both generators have words of 32 bits, and files shall be small.
        "python": torch.from_numpy(np.array(words, dtype=np.uint32).view(np.uint8)),
        "numpy": torch.from_numpy(numpy.view(np.uint8)),
        "gauss": torch.tensor(
            [kept is not None, kept or NO_GAUSS, legacy["has_gauss"], legacy["gauss"]], dtype=torch.float64
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Put every generator back; the inverse of :func:`random_state`.  One that was not saved stays as it is."""
    python, numpy = (states[name].contiguous().view(torch.uint32).tolist() for name in ("python", "numpy"))
    has_kept, kept, has_gauss, gauss = states["gauss"].tolist()
    random.setstate((3, tuple(python), kept if has_kept else None))
    np.random.set_state(("MT19937", np.array(numpy[:-1], dtype=np.uint32), numpy[-1], int(has_gauss), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
