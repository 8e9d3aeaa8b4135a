"""Small files that once cost gigabytes, minutes or a 500: found by fuzzing, and each kept in its smallest form."""

from __future__ import annotations

import struct
import time
import zlib

import pytest

from model.bottom_up.preprocess import to_rgb
from service.errors import Problem
from service.images import ImageLimits, check_header, decode
from tests.fuzz.mutants import PNG_MAGIC
from tests.service import pictures

LIMITS = ImageLimits(max_pixels=4_000_000, min_side=8)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return PNG_MAGIC + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def tiff(tags: dict[int, int], data: bytes) -> bytes:
    """One directory of 32-bit numbers, then the data."""
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\x00" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + data


def tiled(side: int) -> bytes:
    """Eight by eight grey pixels in one compressed tile of this side (up to 1024 it is truly that large)."""
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 134, 325: 0}
    assert 10 + 12 * len(tags) + 4 == tags[324]
    data = zlib.compress(bytes(min(side, 1_024) ** 2))
    return tiff({**tags, 325: len(data)}, data)


def scanned(scans: int) -> bytes:
    """A progressive JPEG that says it is 2000 x 1900 and repeats its first scan."""
    data = bytearray(pictures.jpeg(progressive=True))
    struct.pack_into(">HH", data, data.find(b"\xff\xc2") + 5, 1_900, 2_000)
    first = data.find(b"\xff\xda")
    scan = data[first : data.find(b"\xff\xc4", first)]
    return bytes(data[:first] + scan * scans + b"\xff\xd9")


def test_a_palette_with_more_transparencies_than_colours_there_can_be() -> None:
    header = struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)
    rows = zlib.compress(bytes(9) * 8)
    data = png(
        (b"IHDR", header), (b"PLTE", b"\xff\x00\x00" * 2), (b"tRNS", b"\xff" * 257), (b"IDAT", rows), (b"IEND", b"")
    )
    assert to_rgb(decode(data, LIMITS)).getpixel((0, 0)) == (255, 0, 0)


def test_a_tiff_whose_tile_is_larger_than_any_picture_may_be() -> None:
    """Pillow's libtiff fills the whole tile: 150 bytes took half a gigabyte, and could take two."""
    assert decode(tiled(16), LIMITS).size == (8, 8)
    assert decode(tiled(1_024), ImageLimits(1_024 * 1_024, 8)).size == (8, 8)
    for side in (2_016, 65_536, 2**31):
        with pytest.raises(Problem) as caught:
            check_header(tiled(side), LIMITS)
        assert caught.value.code == "too_many_pixels", side


@pytest.mark.parametrize("before", [b"", b"\xff\x01", b"\xff\xff\xff", b"\xff\xfe\x00\x06\xff\xda\xff\xd9"])
def test_a_jpeg_of_endless_scans(before: bytes) -> None:
    """Each goes over every pixel: megabytes of them would take hours."""
    data = scanned(5_000)
    first = data.find(b"\xff\xda")
    begin = time.monotonic()
    with pytest.raises(Problem) as caught:
        check_header(data[:first] + before + data[first:], LIMITS)
    assert caught.value.code == "undecodable_image"
    assert time.monotonic() - begin < 1.0


def test_jpegs_with_usual_scans_and_anything_after_their_end() -> None:
    """Phones put a film behind the photo: no byte of that is a scan."""
    for data in (pictures.jpeg(progressive=True), pictures.good()["jpeg mpo"], pictures.jpeg()):
        assert decode(data + b"\xff\xda" * 1_000, LIMITS).size == pictures.SIZE
