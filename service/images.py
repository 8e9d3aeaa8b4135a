"""From a request's bytes to a picture: which format it is, whether its size is allowed, and all its pixels."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, ImageOps

from model.bottom_up.reduced_jpeg import reduce_jpeg
from service.errors import Problem

FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF")
# Header lengths that BMP files declare at offset 14. "BM" alone would take much plain text for a picture.
_BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}
# Each scan of a JPEG goes over all its pixels, and takes some bytes to ask for. Real ones have about ten; libtiff takes
# as many as this from a JPEG within a TIFF.
_MAX_SCANS = 100
# A marker that a length follows; the others are fill, stuffed zero, TEM, restarts and SOI (ITU-T T.81, B.1).
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)
# What the event loop looks at itself: a JPEG of up to 64 kB whose tables are short and few, as those of the web are, in
# 0.03 ms and at worst 1. A thread and back takes 0.1 ms alone, and its turn among others. Made-up tables take 100 ms.
_INLINE_BYTES, _INLINE_TABLES, _INLINE_SEGMENTS = 65_536, 8_192, 32
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF 6.0, section 15


@dataclass(frozen=True)
class ImageLimits:
    """What pictures are let in; checked on the header, before any pixel is decoded."""

    max_pixels: int  # width x height
    min_side: int  # pixels


def sniff(data: bytes) -> str | None:
    """The Pillow name of the format that the first bytes say, None for none of `FORMATS`.

    The bytes decide and never the declared type: clients get that wrong, and Pillow knows formats we do not want.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):  # the last two: BigTIFF
        return "TIFF"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    return None


def check_header(data: bytes, limits: ImageLimits) -> None:
    """Raises `Problem` unless this is an image of a known format and an allowed size. Decodes no pixels."""
    _open(data, limits).close()


async def check_header_aside(data: bytes, limits: ImageLimits) -> None:
    """`check_header`, in a thread unless it takes less time than the way there and back."""
    if _is_quick(data):
        check_header(data, limits)
    else:
        await asyncio.to_thread(check_header, data, limits)


def decode(data: bytes, limits: ImageLimits, sufficient_side: int = 0) -> Image.Image:
    """All pixels of the picture, upright; of an animated one the first frame. Its mode is the file's own.

    `sufficient_side`: pixels of each side that will do, 0 for all there are. A large JPEG is then decoded at a half, a
    quarter or an eighth of its size, whichever is the least that is not less: in a fraction of the time and memory.
    Of the metadata only `info["transparency"]` is kept, so that nothing later has to parse the rest.
    Raises `Problem`: `not_an_image`, `too_many_pixels`, `image_too_small`, `undecodable_image`.
    """
    image = _open(data, limits)
    try:
        reduce_jpeg(image, sufficient_side)
        image.load()
    except Exception as error:  # Pillow's plugins raise what they like here: OSError, SyntaxError, struct.error, ...
        raise _undecodable() from error
    return _plain(image)


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    """The picture with its header read. Raises as `decode` does."""
    found = sniff(data)
    if found is None:
        raise Problem("not_an_image", f"The first bytes are of no known image format; known: {', '.join(FORMATS)}.")
    try:
        image = Image.open(BytesIO(data), formats=[found])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Problem("too_many_pixels", f"The image has more than {limits.max_pixels:,} pixels.") from error
    except Exception as error:  # as in `decode`: a bad header comes as any of a dozen exceptions
        raise _undecodable() from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise Problem(
            "too_many_pixels", f"The image is {width} x {height} pixels; at most {limits.max_pixels:,} are taken."
        )
    if min(width, height) < limits.min_side:
        raise Problem(
            "image_too_small",
            f"The image is {width} x {height} pixels; each side must be at least {limits.min_side}.",
        )
    if found == "TIFF":
        _check_tile(image, limits)
    if found == "JPEG" and _scans(data) > _MAX_SCANS:
        raise _undecodable()
    return image


def _check_tile(image: Image.Image, limits: ImageLimits) -> None:
    """Raises `Problem` for a TIFF whose tiles are too large: one is decoded whole, however little of it is used."""
    tags = getattr(image, "tag_v2", {})
    try:
        width, length = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    except Exception as error:  # a value is parsed when it is asked for
        raise _undecodable() from error
    if not isinstance(width, int) or not isinstance(length, int):
        raise _undecodable()
    if width * length > limits.max_pixels:
        raise Problem(
            "too_many_pixels", f"The tiles are {width} x {length} pixels; at most {limits.max_pixels:,} are taken."
        )


def _scans(data: bytes) -> int:
    """How many scans a JPEG has, counted to its end or just beyond `_MAX_SCANS`."""
    scans, at = 0, 2
    while scans <= _MAX_SCANS and (marker := _JPEG_MARKER.search(data, at)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _is_quick(data: bytes) -> bool:
    """Whether it is a small JPEG with an ordinary header."""
    if len(data) > _INLINE_BYTES or sniff(data) != "JPEG":
        return False
    at = 2
    for _ in range(_INLINE_SEGMENTS):
        marker = _JPEG_MARKER.search(data, at, _INLINE_TABLES)
        if marker is None:
            return False
        if marker[1] == b"\xda":
            return True
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return False


def _plain(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says, without the metadata."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # broken EXIF: the pixels are fine, so the picture is taken as it lies
        image = image.copy()  # a copy forgets what was parsed so far
    transparency = image.info.get("transparency")
    if isinstance(transparency, bytes):
        transparency = transparency[:256]  # one for each colour; Pillow reads more from a PNG, and then fails on them
    image.info = {} if transparency is None else {"transparency": transparency}
    return image


def _undecodable() -> Problem:
    return Problem("undecodable_image", "The image is broken or incomplete: its pixels cannot be decoded.")
