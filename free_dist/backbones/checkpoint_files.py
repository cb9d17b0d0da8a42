"""The weight files of a Hugging Face directory: which there are, and whether they are whole, told from their headers alone.

A safetensors file opens with a table of its tensors, so names, shapes and sizes of a checkpoint of any size are known in
milliseconds.  Knows files; does not know models, tokenizers or processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from free_dist.config import MissingFileError, UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

MAX_HEADER = 100_000_000
"""Bytes; the safetensors library reads no longer one."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types that checkpoints of language and vision models hold, by their names in a header."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, read when a torch function takes it as an argument and forgotten afterwards.

    ``load_state_dict`` takes it for a tensor, so a state dictionary of these never holds more than the tensor being copied.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: torch.Size

    is_meta = False
    """What ``load_state_dict`` asks a tensor: its values can be copied."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor itself, on the CPU; its file is mapped as long as it lives."""
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor

    def to(self, *arguments: Any, **options: Any) -> Tensor:
        """``read().to(...)``."""
        return self.read().to(*arguments, **options)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        """Called by torch in place of a function that was given one of these."""
        return function(
            *(argument.read() if isinstance(argument, cls) else argument for argument in arguments), **(options or {})
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of a directory, not read yet."""

    directory: Path
    tensors: dict[str, StoredTensor] | None
    """By name; None when the weights are a pickle, which cannot be looked into without reading it."""

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all weights, or what they take once floating-point ones are ``dtype``.  A pickle: its file size."""
        if self.tensors is None:
            return sum(path.stat().st_size for path in self.directory.glob("pytorch_model*.bin"))
        return sum(
            math.prod(tensor.shape) * dtype.itemsize
            if dtype is not None and tensor.dtype.is_floating_point
            else tensor.nbytes
            for tensor in self.tensors.values()
        )


def open_checkpoint(directory: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Find the weights of ``directory`` and check that every file is there and whole, without reading tensors.

    Raises MissingFileError without weights or with a shard missing, UserError for a damaged file or index, and for a pickle
    unless ``allow_pickle``.  Like transformers, prefers one safetensors file, then several with an index, then a pickle.
    """
    directory = Path(directory)
    if (directory / SINGLE).is_file():
        return Checkpoint(directory=directory, tensors=read_header(directory / SINGLE))
    if (directory / INDEX).is_file():
        return Checkpoint(directory=directory, tensors=_read_shards(directory / INDEX))
    pickles = [directory / name for name in PICKLES if (directory / name).is_file()]
    if not pickles:
        raise MissingFileError(f"backbone.path: {directory} has no {SINGLE} and no {INDEX}; copy the weights there too")
    if not allow_pickle:
        raise UserError(
            f"{pickles[0]} is a pickle, which is read only on request: save the model as safetensors, or set "
            "backbone.allow_pickle=true (--allow-pickle of launch/generate.py, allow_pickle=True in Python); it is then read "
            "with weights_only, which runs no code"
        )
    if pickles[0].suffix == ".json":
        _require_files(pickles[0], set(_weight_map(pickles[0]).values()))
    return Checkpoint(directory=directory, tensors=None)


def stored_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory's safetensors files by name; raises what :func:`open_checkpoint` raises, pickles included."""
    tensors = open_checkpoint(directory).tensors
    assert tensors is not None, "pickles are refused above"
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The table of one safetensors file: name -> tensor, none of them read.

    Raises UserError when the header cannot be read or the file's size is not the one that the header tells.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER:
            raise _damaged(path, "its first 8 bytes are not the length of a safetensors header")
        if size < 8 + length:
            raise _truncated(path, size, f"its header alone needs {8 + length:,}")
        header = file.read(length)
    try:
        table = json.loads(header)
        tensors = {
            name: _stored(path, name, entry["dtype"], entry["shape"], *entry["data_offsets"])
            for name, entry in table.items()
            if name != "__metadata__"
        }
        stop = max((entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # A UserError is a ValueError, and already says what is wrong.
        if isinstance(error, UserError):
            raise
        raise _damaged(path, f"its header cannot be read ({type(error).__name__})") from error
    if size < 8 + length + stop:
        raise _truncated(path, size, f"its header tells {8 + length + stop:,}")
    if size > 8 + length + stop:
        raise _damaged(path, f"it has {size:,} bytes, its header tells {8 + length + stop:,}")
    return tensors


def _stored(path: Path, name: str, dtype: str, shape: list[int], begin: int, end: int) -> StoredTensor:
    if dtype not in DTYPES:
        raise UserError(f"{path}: {name} has type {dtype}; want one of {', '.join(DTYPES)}")
    tensor = StoredTensor(path, name, DTYPES[dtype], torch.Size(shape))
    if end - begin != tensor.nbytes:
        raise _damaged(path, f"its header gives {name} {end - begin:,} bytes, its shape needs {tensor.nbytes:,}")
    return tensor


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = _weight_map(index)
    files = set(weight_map.values())
    _require_files(index, files)
    headers = {name: read_header(index.parent / name) for name in sorted(files)}
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise UserError(
                f"{index.parent / name} does not hold {tensor}, which {index.name} places there: the files are not of one "
                "checkpoint; copy them all again"
            )
    # transformers reads whole shards, whatever the index says of them.
    return {tensor: stored for header in headers.values() for tensor, stored in header.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(index, f"it is not a JSON object with a 'weight_map' ({type(error).__name__})") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise _damaged(index, "its 'weight_map' is not an object of file names")
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names {outside[0]!r}, which is not a file beside it")
    return weight_map


def _require_files(index: Path, names: Iterable[str]) -> None:
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise MissingFileError(f"{index} names files that are not there: {', '.join(missing)}; copy them beside it")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; copy or download it again")


def _truncated(path: Path, size: int, wanted: str) -> UserError:
    return UserError(f"{path} is truncated: it has {size:,} bytes, {wanted}; copy or download it again")
