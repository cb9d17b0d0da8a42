"""Encoded images -> pixels, without trusting them: only PNG and JPEG, only of sizes that a picture has.

Pillow's other formats include some that start programs (EPS) or have seldom-used decoders.  Does not know what pixels are for.
"""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

from free_dist.data.quarantine import BadSample

FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 1 << 26
"""8192 x 8192: 200 MB as RGB; above it a small file may be a decompression bomb."""


def decode_image(encoded: bytes) -> Image.Image:
    """The image as RGB; raises BadSample, whatever is wrong with the bytes."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise BadSample("absurd size", f"an image of {opened.width} x {opened.height} pixels")
            return opened.convert("RGB")
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("absurd size", str(error)) from error
    # What Pillow's decoders raise for damaged files, as its documentation and fuzzing show.
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error) as error:
        raise BadSample("corrupt image", str(error)[:200]) from error
