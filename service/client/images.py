"""Whatever a caller has for a photo, as the bytes of an image file."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import PIL.Image

    Image = bytes | bytearray | memoryview | str | os.PathLike[str] | BinaryIO | PIL.Image.Image
else:
    Image = object


def image_bytes(image: Image) -> bytes:
    """Bytes as they are; a file by its path (`str` or `PathLike`); an open file from where it stands; a Pillow image
    encoded: RGB and grey as JPEG of quality 95, since a PNG of a camera's photo is larger than most services take, all
    else as PNG, so that transparency is kept.

    Raises `OSError` for a file that cannot be read, `TypeError` for anything else.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if hasattr(image, "read"):
        data = image.read()
        if isinstance(data, bytes):
            return data
        raise TypeError("the file must be open in binary mode")
    return _encoded(image)


def _encoded(image: object) -> bytes:
    import PIL.Image
    import PIL.ImageOps

    if not isinstance(image, PIL.Image.Image):
        raise TypeError(f"a photo is bytes, a path, an open file or a Pillow image, not {type(image).__name__}")
    upright = PIL.ImageOps.exif_transpose(image)  # what is encoded has no EXIF any more that would say how to turn it
    buffer = io.BytesIO()
    if upright.mode in ("RGB", "L"):
        upright.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        upright.save(buffer, "PNG")
    return buffer.getvalue()
