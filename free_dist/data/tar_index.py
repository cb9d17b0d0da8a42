"""Where the members of a tar file begin and end, read strictly: what is not a plain sample is refused, never followed.

Nothing is ever extracted.  Understands ustar, the long names of GNU tar and pax headers, as tar, Python and webdataset write
them.  Does not know what members hold.

Own code and not ``tarfile``: offsets are wanted, every size is checked against the file before it is believed, and hostile
headers must end in one exception (format: POSIX.1-2017, pax, "ustar Interchange Format").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from free_dist.data.quarantine import BadSample

BLOCK = 512
MAX_HEADER_TEXT = 1 << 16
"""Longest pax header or long name, in bytes; a name needs a few hundred."""
MAX_MEMBER = 1 << 28
"""Largest member, in bytes."""
MAX_NAME = 512
PICKLES = {"pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill"}
"""Suffixes of files that run code when they are read."""

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
"""As webdataset has it: the key ends at the first dot of the file name."""

ReadAt = Callable[[int, int], bytes]
"""(offset, size) -> that many bytes, or fewer at the end of the file."""


@dataclass(kw_only=True)
class TarSample:
    """Consecutive members of one key."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Suffix in lower case -> (offset, size) of its content, in bytes."""
    fault: BadSample | None = None
    """Why it cannot be used, if so."""


def tar_samples(read_at: ReadAt, file_size: int) -> Iterator[TarSample]:
    """The samples of a tar file in order; raises BadSample where the file itself is not sound, after what came before it."""
    sample: TarSample | None = None
    try:
        for name, kind, offset, size in _members(read_at, file_size):
            fault = _refusal(name, kind, size)
            match = _NAME.fullmatch(name)
            if fault is None and (kind == b"5" or match is None):
                continue  # a directory, or a name without a suffix, which webdataset passes over too
            key, suffix = (name[:MAX_NAME], "") if match is None else (match[1], match[2].lower())
            if sample is None or sample.key != key or suffix in sample.members:
                if sample is not None:
                    yield sample
                sample = TarSample(key=key)
            sample.members[suffix] = (offset, size)
            sample.fault = sample.fault or fault
    except BadSample:
        if sample is not None:
            yield sample
        raise
    if sample is not None:
        yield sample


def _refusal(name: str, kind: bytes, size: int) -> BadSample | None:
    parts = name.split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\\" in name or re.match(r"[A-Za-z]:", name):
        return BadSample("unsafe name", f"{name!r} leaves the directory")
    if not name or len(name) > MAX_NAME or not name.isprintable():
        return BadSample("unsafe name", f"{name[:80]!r}")
    if kind not in (b"0", b"\0", b"5"):
        return BadSample("not a plain file", f"{name!r} is a link, device or sparse file (type {kind!r})")
    if name.rpartition(".")[2].lower() in PICKLES:
        return BadSample("pickled member", f"{name!r}: pickles can run code and are not read")
    if size > MAX_MEMBER:
        return BadSample("absurd size", f"{name!r} has {size} bytes")
    return None


def _members(read_at: ReadAt, file_size: int) -> Iterator[tuple[str, bytes, int, int]]:
    """(name, type, offset, size) of every member that is no header of another one."""
    at = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while at + BLOCK <= file_size:
        header = read_at(at, BLOCK)
        if header == bytes(BLOCK):
            if read_at(at + BLOCK, BLOCK) not in (bytes(BLOCK), b""):
                raise BadSample("damaged tar", f"an empty header at byte {at} before the end")
            return
        name, kind, size = _header(header, at)
        offset = at + BLOCK
        if kind not in (b"x", b"g", b"L", b"K") and "size" in pax:
            size = _decimal(pax["size"], at)
        at = offset + -(-size // BLOCK) * BLOCK
        if offset + size > file_size:
            raise BadSample("truncated tar", f"{name!r} ends at byte {offset + size} of {file_size}")
        if kind in (b"x", b"g", b"L", b"K"):
            if size > MAX_HEADER_TEXT:
                raise BadSample("damaged tar", f"a header of {size} bytes at byte {offset}")
            content = read_at(offset, size)
            if kind == b"x":
                pax = _pax(content, offset)
            elif kind == b"L":
                long_name = _text(content.split(b"\0")[0], offset)
            continue
        yield pax.get("path", name if long_name is None else long_name), kind, offset, size
        long_name, pax = None, {}
    raise BadSample("truncated tar", f"no end after {file_size} bytes")


def _header(block: bytes, at: int) -> tuple[str, bytes, int]:
    stored = _octal(block[148:156], at)
    if stored != sum(block[:148]) + sum(block[156:]) + 8 * ord(" "):
        raise BadSample("damaged tar", f"the header at byte {at} has a wrong checksum")
    raw = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        raw = block[345:500].split(b"\0")[0] + b"/" + raw
    name, kind = _text(raw, at), block[156:157]
    # Links and devices have no content, whatever their size field says.
    return name, kind, 0 if kind in b"123456" else _octal(block[124:136], at)


def _octal(field_: bytes, at: int) -> int:
    if field_[0] == 0x80:  # GNU's numbers above 8 GiB
        return int.from_bytes(field_[1:], "big")
    text = field_.split(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*", text):
        raise BadSample("damaged tar", f"the header at byte {at} has the number {text!r}")
    return int(text or b"0", 8)


def _decimal(text: str, at: int) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise BadSample("damaged tar", f"the pax header before byte {at} has the size {text[:40]!r}")
    return int(text)


def _pax(content: bytes, at: int) -> dict[str, str]:
    """``"LENGTH KEYWORD=VALUE\\n"`` ... -> values by keyword."""
    found = {}
    while content:
        match = re.match(rb"([0-9]{1,6}) ([^=]+)=", content)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(content) or content[length - 1 : length] != b"\n":
            raise BadSample("damaged tar", f"a pax header at byte {at} that cannot be read")
        if match[2].startswith(b"GNU.sparse"):
            raise BadSample("damaged tar", f"a sparse file at byte {at}")
        if match[2] in (b"path", b"size"):
            found[match[2].decode()] = _text(content[match.end() : length - 1], at)
        content = content[length:]
    return found


def _text(raw: bytes, at: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BadSample("damaged tar", f"a name at byte {at} is not UTF-8") from error
