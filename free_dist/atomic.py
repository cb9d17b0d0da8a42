"""Files and directories that are either whole or absent.  Knows nothing of what they hold."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name beside ``path`` to write into, which then takes the place of ``path``.

    It is on disk before it is renamed: a crash leaves the old file or the new one; an error inside leaves the old one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name beside ``path``, fsync, rename: a crash leaves the old file or the new one."""
    with replaced_file(path) as file:
        file.write(content)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside ``path`` to write into, which then takes the place of ``path``, whatever that held.

    It is on disk before it is renamed.  A crash leaves the old directory or the new one, but for the moment between two
    renames, when the old one is called ``.NAME.PID.old``.  An error inside leaves the old one, and nothing of the new one.
    """
    written, former = (path.with_name(f".{path.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        yield written
        synchronise(written)
        if path.exists():
            shutil.rmtree(former, ignore_errors=True)
            path.rename(former)
        written.rename(path)
    finally:
        shutil.rmtree(written, ignore_errors=True)
        if former.exists() and not path.exists():
            former.rename(path)
    _fsync(path.parent)
    shutil.rmtree(former, ignore_errors=True)


def synchronise(directory: Path) -> None:
    """Wait until everything below a directory is on disk: contents of files, and the names in directories."""
    for path in (*directory.rglob("*"), directory):
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
