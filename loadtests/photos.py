"""Photos to send: pieces of the sample photos, and as many with other bytes as are wanted."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

from PIL import Image

SAMPLES = Path(__file__).parents[1] / "samples"
_numbers = itertools.count()


def scenes() -> list[bytes]:
    """Different photos, JPEG: each sample whole, and two pieces of it."""
    found = []
    for path in sorted(SAMPLES.glob("*.jpg")):
        found.append(path.read_bytes())
        with Image.open(path) as image:
            width, height = image.size
            for left, top in ((0, 0), (width // 4, height // 4)):
                piece = image.crop((left, top, left + 3 * width // 4, top + 3 * height // 4))
                buffer = io.BytesIO()
                piece.save(buffer, "JPEG", quality=85)
                found.append(buffer.getvalue())
    return found


def never_sent(photo: bytes) -> bytes:
    """The same pixels in other bytes, which no cache knows: a decoder stops at the end of the picture."""
    return photo + next(_numbers).to_bytes(8, "big")
