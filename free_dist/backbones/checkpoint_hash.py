"""Which weights a backbone has, as a hash: of its checkpoint's files, or of its parameters where there are none.

The hash of files is the same however tensors are spread over them and whatever type they are loaded in, and a process that
holds one shard of the weights, or none, can compute it.  Does not know exits, or how a checkpoint becomes a model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from free_dist.backbones.base import Backbone
from free_dist.backbones.checkpoint_files import INDEX, SINGLE, StoredTensor, stored_tensors

FILES_PREFIX = "files:"
"""What a hash of files begins with, so that it is never taken for one of parameters."""

PROBED = 16
"""Elements per tensor that :func:`loaded_from` compares."""


def checkpoint_hash(directory: str | Path, *, without: tuple[str, ...] = ()) -> str:
    """``files:`` and the sha256 over name, type, shape and bytes of every stored tensor, in the order of their names.

    ``without``: beginnings of the names that do not count.  Costs one reading of the files and, where the processor has SHA
    instructions, about 1.5 s per GB and thread; up to eight threads.  Raises MissingFileError or UserError for files that are
    missing, damaged, or pickles.
    """
    stored = stored_tensors(directory)
    names = sorted(name for name in stored if not name.startswith(without))
    with _opened(stored) as read, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: hashlib.sha256(_bytes(read(name))).hexdigest(), names)  # outside Python's lock
        lines = [
            f"{name} {stored[name].dtype} {list(stored[name].shape)} {digest}\n"
            for name, digest in zip(names, digests, strict=True)
        ]
    return FILES_PREFIX + hashlib.sha256("".join(lines).encode()).hexdigest()


def parameters_hash(module: nn.Module) -> str:
    """sha256 over name, type, shape and bytes of every parameter, in the order of their names.

    Pass the ``Backbone`` itself; the same weights in another type have another hash.  Raises ValueError for a sharded module.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if not parameter.numel():
            raise ValueError(f"{name} is empty: a sharded model has no hash of its own, take that of its files")
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(_bytes(parameter.detach().cpu()))
    return digest.hexdigest()


def stored_dtype(directory: str | Path) -> str:
    """The type of most elements of a checkpoint, such as ``float32``; raises what :func:`checkpoint_hash` raises."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in stored_tensors(directory).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.shape.numel()
    return str(max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)).removeprefix("torch.")


def loaded_from(backbone: Backbone) -> Path | None:
    """The directory of the safetensors files whose weights a backbone holds, in whatever type; None where there is none.

    A transformers model remembers a directory, but so does an untrained one made of a loaded configuration, and one that was
    changed since: the first elements of every tensor are compared with the files.
    """
    models = [module for module in backbone.children() if isinstance(module, PreTrainedModel)]
    if len(models) != 1 or len(list(models[0].parameters())) != len(list(backbone.parameters())):
        return None  # composed of several: the files of one are not the whole
    directory = Path(models[0].name_or_path)
    if not models[0].name_or_path or not has_safetensors(directory):
        return None
    compared = list(_compare(models[0], stored_tensors(directory)))
    is_known = 2 * len(compared) >= len(list(models[0].parameters()))
    return directory if is_known and all(compared) else None


def has_safetensors(directory: Path) -> bool:
    """Whether a checkpoint's weights are safetensors files, the only ones that have a hash."""
    return any((directory / name).is_file() for name in (SINGLE, INDEX))


@contextmanager
def _opened(stored: dict[str, StoredTensor]) -> Iterator[Callable[[str], Tensor]]:
    """Inside, a function from names to tensors; every file is opened once, because opening one parses its whole header."""
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in {tensor.path for tensor in stored.values()}
        }
        yield lambda name: files[stored[name].path].get_tensor(name)


def _compare(model: PreTrainedModel, stored: dict[str, StoredTensor]) -> Iterator[bool]:
    """Whether the beginnings are equal, for every floating-point parameter that the files hold under its name."""
    with _opened(stored) as read:
        for name, parameter in model.named_parameters():
            if name not in stored or stored[name].shape != parameter.shape or not parameter.is_floating_point():
                continue
            held = parameter.detach().flatten()[:PROBED].cpu()
            filed = read(name).flatten()[:PROBED]
            # Through the half types as well: weights may have been in one on their way to the type they have now.
            yield any(torch.equal(filed.to(way), held.to(way)) for way in (held.dtype, torch.bfloat16, torch.float16))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
