"""Where shards come from: a directory, an fsspec URL (``s3://bucket/coco``) or a command (``pipe:ssh host cat /data/{}``).

What is not a local file is copied to a cache once, under the name of its sha256, because a stream that is resumed by seeking
needs to seek.  Does not know manifests or what files hold.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import fsspec

from free_dist.atomic import replaced_file
from free_dist.config import UserError
from free_dist.data.quarantine import BadSample

PIPE = "pipe:"
CHUNK = 1 << 20


def is_local(root: str) -> bool:
    """Whether a root is a directory of this machine."""
    return not root.startswith(PIPE) and "://" not in root


def cache_directory(configured: str | None) -> Path:
    """``data.cache``, or the user's cache directory."""
    if configured is not None:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "free_dist"


def read_remote(root: str, relative: str, *, limit: int, timeout: float) -> bytes:
    """A whole small file; raises what :func:`fetch` raises."""
    with tempfile.TemporaryDirectory() as directory:
        return fetch(root, relative, Path(directory) / "file", limit=limit, timeout=timeout).read_bytes()


def fetch(root: str, relative: str, target: Path, *, limit: int, timeout: float) -> Path:
    """Copy ``relative`` of a remote root to ``target``, which appears when it is whole.

    Raises BadSample if there is no such file, it has more than ``limit`` bytes or nothing arrives for ``timeout`` seconds.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(target) as file:
        if root.startswith(PIPE):
            _from_command(root.removeprefix(PIPE).replace("{}", relative), file, limit, timeout)
        else:
            _from_url(f"{root.rstrip('/')}/{relative}", file, limit, timeout)
    return target


def _from_command(command: str, file: BinaryIO, limit: int, timeout: float) -> None:
    # A session of its own, so that a shell's children end with it.
    process = subprocess.Popen(command, shell=True, stdout=file, stdin=subprocess.DEVNULL, start_new_session=True)

    def ended(seconds: float) -> bool:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    try:
        _watch(file, ended, limit, timeout, repr(command))
    except BadSample:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        raise BadSample("missing shard", f"{command!r} ended with code {process.returncode}")


def _from_url(url: str, file: BinaryIO, limit: int, timeout: float) -> None:
    """In a thread of its own, which is left alone where it hangs: few backends have a timeout, and none the same."""
    errors: list[Exception] = []

    def copy() -> None:
        try:
            with fsspec.open(url, "rb") as source:
                while content := source.read(CHUNK):
                    file.write(content)
                    file.flush()
                    if file.tell() > limit:
                        return
        except Exception as error:  # noqa: BLE001 - every backend raises errors of its own
            errors.append(error)

    thread = threading.Thread(target=copy, daemon=True, name="free_dist-fetch")
    thread.start()

    def ended(seconds: float) -> bool:
        thread.join(seconds)
        return not thread.is_alive()

    _watch(file, ended, limit, timeout, url)
    if errors and isinstance(
        errors[0], (ImportError, ValueError)
    ):  # an unknown protocol, or its package is not installed
        raise UserError(f"data.root: {url}: {errors[0]}") from errors[0]
    if errors:
        raise BadSample("missing shard", f"{url}: {errors[0]!r}") from errors[0]


def _watch(file: BinaryIO, ended: Callable[[float], bool], limit: int, timeout: float, source: str) -> None:
    """Wait until ``ended(seconds)``; raises BadSample for a file above ``limit``, or one that stops growing for ``timeout``."""
    size, since = 0, time.monotonic()
    while not ended(min(1.0, timeout / 4)):
        grown = os.fstat(file.fileno()).st_size
        if grown > limit:
            break
        if grown > size:
            size, since = grown, time.monotonic()
        elif time.monotonic() - since > timeout:
            raise BadSample("stalled reader", f"{grown} bytes came from {source}, then none for {timeout} s")
    if os.fstat(file.fileno()).st_size > limit:
        raise BadSample("absurd size", f"{source} gives more than the {limit} bytes that it should have")
