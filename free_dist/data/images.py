"""Encoded images -> pixels, without trusting them: only PNG and JPEG, only of sizes that a picture has.

Pillow's other formats include some that start programs (EPS) or have seldom-used decoders.  Where ``simplejpeg`` is installed
(``pip install '.[jpeg]'``) it decodes JPEGs, to the same pixels and 3.5 times as fast; what it does not like (CMYK, a warning
of the decoder) is left to Pillow.  Does not know what pixels are for.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from free_dist.data.quarantine import BadSample

try:
    import simplejpeg
except ImportError:  # optional: a matter of speed alone
    simplejpeg = None

FORMATS = ("JPEG", "PNG")
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error, Image.DecompressionBombError
)  # fmt: skip
"""What Pillow's decoders raise for files that are damaged, of no known format or absurdly large; its documentation and fuzzing
show them."""

MAX_PIXELS = 1 << 26
"""8192 x 8192: 200 MB as RGB; above it a small file may be a decompression bomb."""


def image_header(encoded: bytes) -> tuple[str, int, int]:
    """(format, width, height) as the header has it; raises BadSample for what is no PNG or JPEG, or of absurd size."""
    with _opened(encoded) as opened:
        return str(opened.format), opened.width, opened.height


def check_image(encoded: bytes) -> None:
    """Raise BadSample unless :func:`decode_image` would read the bytes; a JPEG in a third of its time."""
    with _opened(encoded) as opened:
        opened.draft("RGB", (1, 1))  # a JPEG is then read to its end, at an eighth of its size
        opened.load()


def decode_image(encoded: bytes) -> Image.Image:
    """The image as RGB; raises BadSample, whatever is wrong with the bytes."""
    with _opened(encoded) as opened:
        if simplejpeg is not None and opened.format == "JPEG" and opened.mode == "RGB":
            fast = _fast(encoded, opened.size)
            if fast is not None:
                return fast
        return opened.convert("RGB")


@contextmanager
def _opened(encoded: bytes) -> Iterator[Image.Image]:
    """The image, its header read; what goes wrong with it inside the block is a BadSample."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise BadSample("absurd size", f"an image of {opened.width} x {opened.height} pixels")
            yield opened
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("absurd size", str(error)) from error
    except UNREADABLE as error:
        raise BadSample("corrupt image", str(error)[:200]) from error


def _fast(encoded: bytes, size: tuple[int, int]) -> Image.Image | None:
    """The image by simplejpeg, or None where it, or its idea of the size, disagrees with Pillow."""
    try:
        if simplejpeg.decode_jpeg_header(encoded)[:2] != size[::-1]:
            return None
        return Image.fromarray(simplejpeg.decode_jpeg(encoded, colorspace="RGB", strict=True))
    except ValueError:
        return None
