"""Tells a disk that is full, or closed to this user, from a defect: what a library raised, as one line for a person.

Imports no torch.  Does not know which files a program writes.
"""

from __future__ import annotations

import errno
import os
import re

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}

RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors names what the system said."""

TORCH = "PytorchStreamWriter failed writing"
"""How torch.save says that a write failed, for whatever reason."""


def disk_error(error: BaseException) -> str | None:
    """One line that says what is wrong and what to do, or None if ``error`` is no such thing."""
    number = error.errno if isinstance(error, OSError) else None
    named = RUST.search(str(error))
    if number is None and named:
        number = int(named[1])
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if number in FULL or TORCH in str(error):
        said = os.strerror(number) if number else "a write failed"
        return f"{where}{said}: the disk, a quota or a limit is full; make room, or choose another run_dir"
    if number in CLOSED:
        return f"{where}{os.strerror(number)}: change its permissions or owner, or choose another run_dir"
    return None
