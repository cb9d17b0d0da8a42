"""The optional fast JPEG decoder gives Pillow's pixels, and Pillow's refusals."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image

from free_dist.data import images
from free_dist.data.quarantine import BadSample

pytest.importorskip("simplejpeg", reason="the fast decoder is optional: pip install '.[jpeg]'")


def encoded(mode: str = "RGB", size: tuple[int, int] = (123, 77), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.merge("RGB", [Image.effect_noise(size, 40 + i) for i in range(3)]).convert(mode).save(
        buffer, "JPEG", **options
    )
    return buffer.getvalue()


def outcome(content: bytes) -> bytes | str:
    try:
        return images.decode_image(content).tobytes()
    except BadSample as fault:
        return fault.reason


def both(content: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes | str, bytes | str]:
    fast = outcome(content)
    with monkeypatch.context() as patch:
        patch.setattr(images, "simplejpeg", None)
        return fast, outcome(content)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pixels_are_pillows(mode: str, options: dict[str, object], monkeypatch) -> None:
    fast, slow = both(encoded(mode, **options), monkeypatch)
    assert isinstance(fast, bytes) and fast == slow


@pytest.mark.fuzz
def test_damaged_files_end_alike(monkeypatch) -> None:
    rng = random.Random(0)
    whole = encoded()
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
        del content[rng.choice([len(content), rng.randrange(len(content))]) :]
        fast, slow = both(bytes(content), monkeypatch)
        assert fast == slow
        refused += isinstance(fast, str)
    assert 30 < refused < 300
