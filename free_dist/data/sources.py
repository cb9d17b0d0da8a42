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
from pathlib import Path

import fsspec

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
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        if root.startswith(PIPE):
            _from_command(root.removeprefix(PIPE).replace("{}", relative), temporary, limit, timeout)
        else:
            _from_url(f"{root.rstrip('/')}/{relative}", temporary, limit)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _from_command(command: str, target: Path, limit: int, timeout: float) -> None:
    # A session of its own, so that a shell's children end with it.
    with target.open("wb") as file:
        process = subprocess.Popen(command, shell=True, stdout=file, stdin=subprocess.DEVNULL, start_new_session=True)
        size = -1
        while True:
            try:
                code = process.wait(timeout)
                break
            except subprocess.TimeoutExpired:
                grown = target.stat().st_size
                if size < grown <= limit:
                    size = grown
                    continue
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                words = "absurd size" if grown > limit else "stalled reader"
                raise BadSample(words, f"{grown} bytes came from {command!r}, then none for {timeout} s") from None
    if code:
        raise BadSample("missing shard", f"{command!r} ended with code {code}")
    if target.stat().st_size > limit:
        raise BadSample("absurd size", f"{command!r} gave {target.stat().st_size} bytes, want at most {limit}")


def _from_url(url: str, target: Path, limit: int) -> None:
    try:
        with fsspec.open(url, "rb") as source, target.open("wb") as file:
            while content := source.read(CHUNK):
                file.write(content)
                if file.tell() > limit:
                    raise BadSample("absurd size", f"{url} has more than {limit} bytes")
    except OSError as error:
        raise BadSample("missing shard", f"{url}: {error}") from error
    except (ImportError, ValueError) as error:  # an unknown protocol, or one whose package is not installed
        raise UserError(f"data.root: {url}: {error}") from error
