"""Picture files as bytes: as encoded and known to decode, or laid on white.  Does not know records or data sets."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from free_dist.config import MissingFileError, UserError
from free_dist.data.images import FORMATS, UNREADABLE, check_image
from free_dist.data.quarantine import BadSample

LARGEST = 448
"""Pixels of the longer side of a re-encoded picture; vision networks read no more."""


def read_picture(path: Path) -> bytes:
    """The bytes of a PNG or JPEG file that decodes to its end; raises MissingFileError or UserError naming the file."""
    content = _read(path)
    try:
        check_image(content)
    except BadSample as error:
        raise UserError(f"{path} is no whole PNG or JPEG picture ({error}): download it again") from error
    return content


def on_white(path: Path) -> bytes:
    """The picture as encoded, or on white, and no larger than ``LARGEST``, where it has transparency.

    Raises as :func:`read_picture` does.
    """
    content = _read(path)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.mode in ("RGB", "L"):
                picture.load()
                return content
            drawn = picture.convert("RGBA")
    except UNREADABLE as error:
        raise UserError(f"{path} is not a PNG picture ({error}): install the package again") from error
    drawn.thumbnail((LARGEST, LARGEST))
    page = Image.new("RGBA", drawn.size, "white")
    page.alpha_composite(drawn)
    written = io.BytesIO()
    page.convert("RGB").save(written, "PNG")
    return written.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
