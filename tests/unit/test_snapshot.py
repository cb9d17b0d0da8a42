"""A snapshot's file against the safetensors library: whatever the tensors' memory looks like, and again after they changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from free_dist.training.checkpoint_files import GAP, Snapshot


def stretches(flat: Tensor, lengths: list[int], gap: int) -> list[Tensor]:
    """Neighbours in one storage with ``gap`` elements between them."""
    starts = [sum(lengths[:index]) + gap * index for index in range(len(lengths))]
    return [flat.narrow(0, start, length) for start, length in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("gap", [0, 3, GAP // 4 + 1])
def test_file_holds_the_tensors_as_they_were_taken(gap: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lengths = [5, 1, 700, 0, 33]
    flats = [torch.randn(sum(lengths) + 5 * gap) for _ in range(3)]
    # Names in another order than memory, types whose size does not divide the others' ends, shapes, one tensor twice.
    tensors = {
        f"{9 - i}/{j}": part for i, flat in enumerate(flats) for j, part in enumerate(stretches(flat, lengths, gap))
    }
    tensors |= {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "doubles": torch.randn(3, 2, dtype=torch.float64),
        "half": torch.randn(5).half(),
        "integers": torch.arange(4),
        "again": flats[1][2:9],
        "scalar": torch.tensor(3.0),
    }
    snapshot = Snapshot()
    for number in range(4):
        if number == 2:  # the optimizer put its state elsewhere
            tensors["9/2"] = torch.randn(700)
        if number == 3:
            del tensors["half"]
            tensors["9/0"].data = torch.randn(6)
        for tensor in tensors.values():
            tensor.copy_(torch.randint(0, 200, tensor.shape))
        snapshot.choose(tensors)
        for tensor in tensors.values():
            tensor.add_(1)  # before the copy
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        snapshot.copy()
        for tensor in tensors.values():
            tensor.zero_()  # training goes on
        path = tmp_path / f"{number}.safetensors"
        record = snapshot.write(path)
        found = load_file(path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (number, name)
        content = path.read_bytes()
        assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_transposed_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        Snapshot().choose({"a": torch.zeros(2, 3).T})
