"""Fixtures of the parity tests: LAVIS's small models as committed in ``reference``, imported once per kind.

``reference`` was made by ``make_lavis_reference.py`` with the real salesforce-lavis; nothing here needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from free_dist.backbones.lavis import LavisFiles, import_lavis
from tests.parity.committed import REFERENCE, Reference, read_reference


@pytest.fixture(scope="session")
def opt() -> Reference:
    return read_reference(REFERENCE / "blip2_opt")


@pytest.fixture(scope="session")
def t5() -> Reference:
    return read_reference(REFERENCE / "blip2_t5")


@pytest.fixture(scope="session", params=["blip2_opt", "blip2_t5"])
def reference(request: pytest.FixtureRequest) -> Reference:
    """LAVIS's ``Blip2OPT`` and ``Blip2T5``."""
    return read_reference(REFERENCE / request.param)


@pytest.fixture(scope="session")
def imported(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory made of ``reference``."""
    return import_lavis(reference.files, tmp_path_factory.mktemp("imported") / "model").directory


@pytest.fixture
def changed(opt: Reference, tmp_path: Path) -> Callable[..., LavisFiles]:
    """``changed(change)``: the OPT model's files, with ``change`` applied to the tensors of its checkpoint."""

    def make(change: Callable[[dict[str, Tensor]], Any]) -> LavisFiles:
        content = torch.load(opt.folder / "checkpoint.pth", weights_only=True)
        change(content["model"])
        torch.save(content, tmp_path / "changed.pth")
        return replace(opt.files, checkpoints=(tmp_path / "changed.pth",))

    return make
