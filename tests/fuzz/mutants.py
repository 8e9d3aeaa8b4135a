"""Broken, lying and hostile pictures: each is made from its seed alone, so that a failure can be made again.

`mutant(seed)` is the same picture wherever the same Pillow encodes it.
"""

from __future__ import annotations

import base64
import functools
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.service import pictures

FORMS = ("raw", "multipart", "json")
# Where sizes, counts and offsets go wrong: nothing, one, the signs' and the widths' edges.
EDGES = (0, 1, 2, 7, 8, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
Making = Callable[[random.Random], bytes]


@dataclass(frozen=True)
class Mutant:
    """A picture that was broken on purpose, or only looks like one."""

    seed: int
    recipe: str
    data: bytes

    def __str__(self) -> str:
        return f"mutant({self.seed}) {self.recipe}, {len(self.data)} bytes"


def mutant(seed: int) -> Mutant:
    """The mutant of this seed. The recipes come in turn, so that a few hundred seeds hold each of them."""
    rng = random.Random(seed)
    recipe, make = RECIPES[seed % len(RECIPES)]
    return Mutant(seed, recipe, make(rng))


def request(data: bytes, form: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers that send this picture in one of `FORMS`."""
    if form == "raw":
        return data, {"Content-Type": "application/octet-stream"}
    if form == "json":
        body = json.dumps({"image": base64.b64encode(data).decode()}).encode()
        return body, {"Content-Type": "application/json"}
    boundary = b"-a-boundary-that-no-mutant-holds-"
    head = b'Content-Disposition: form-data; name="image"; filename="a"\r\nContent-Type: image/jpeg\r\n\r\n'
    body = b"--" + boundary + b"\r\n" + head + data + b"\r\n--" + boundary + b"--\r\n"
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"}


@functools.cache
def originals() -> tuple[tuple[str, bytes], ...]:
    """Whole pictures to break: every good one, and kinds that are rare."""
    rgb = pictures.photo()
    grey = np.asarray(rgb.convert("L"))
    wide = np.random.default_rng(1).integers(0, 65536, (32, 48), np.uint16)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a text"
    rare = {
        "png interlaced rgba": _interlaced_png(),
        "jpeg exif": pictures.encode(rgb, "JPEG", exif=exif),
        "jpeg icc": pictures.encode(rgb, "JPEG", icc_profile=bytes(3_000)),
        "webp exif": pictures.encode(rgb, "WEBP", exif=exif, icc_profile=bytes(500)),
        "tiff int32": pictures.encode(Image.fromarray(grey.astype(np.int32) * 70_000), "TIFF"),
        "tiff infinite": pictures.encode(Image.fromarray(np.full((32, 48), np.inf, np.float32)), "TIFF"),
        "tiff 16 bit noise": pictures.encode(Image.fromarray(wide), "TIFF"),
        "tiff lab": pictures.encode(Image.merge("LAB", rgb.split()), "TIFF"),
        "tiff palette": pictures.encode(rgb.convert("P"), "TIFF"),
        "tiff deflate": pictures.encode(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": pictures.encode(rgb, "TIFF", compression="jpeg"),
        "tiff group4": pictures.encode(rgb.convert("1"), "TIFF", compression="group4"),
        "tiff pages": pictures.encode(rgb, "TIFF", save_all=True, append_images=[rgb] * 5),
        "bmp palette": pictures.encode(rgb.convert("P"), "BMP"),
        "bmp one bit": pictures.encode(rgb.convert("1"), "BMP"),
        "bmp alpha": pictures.encode(rgb.convert("RGBA"), "BMP"),
        "gif interlaced": pictures.encode(rgb.convert("P"), "GIF", interlace=True),
        "gif transparent": pictures.encode(rgb.convert("P"), "GIF", transparency=3),
    }
    return tuple(sorted((pictures.good() | rare).items()))


def _of(rng: random.Random, kind: str = "") -> bytes:
    """One of the originals; with `kind`, one whose name begins so."""
    return rng.choice([data for name, data in originals() if name.startswith(kind)])


def _edge(rng: random.Random) -> int:
    return rng.choice(EDGES) if rng.random() < 0.8 else rng.randrange(2**32)


def _place(rng: random.Random, length: int) -> int:
    """An index below `length`, mostly in the head: that is where the structure is."""
    return int(length * rng.random() ** rng.choice((1, 4)))


# Damage that knows nothing of formats.


def _truncated(rng: random.Random) -> bytes:
    data = _of(rng)
    return data[: rng.randrange(1, len(data))]


def _bits_flipped(rng: random.Random) -> bytes:
    data = bytearray(_of(rng))
    for _ in range(rng.choice((1, 2, 8, 64))):
        data[_place(rng, len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _runs_replaced(rng: random.Random) -> bytes:
    data = bytearray(_of(rng))
    for _ in range(rng.choice((1, 3))):
        at, length = _place(rng, len(data)), rng.choice((2, 4, 16, 200))
        run = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
        data[at : at + length] = run[: len(data) - at]
    return bytes(data)


def _runs_cut_or_added(rng: random.Random) -> bytes:
    data = _of(rng)
    at, length = _place(rng, len(data)), rng.choice((1, 2, 4, 50))
    if rng.random() < 0.5:
        return data[:at] + data[at + length :]
    return data[:at] + rng.choice((rng.randbytes(length), data[:length])) + data[at:]


def _numbers_lie(rng: random.Random) -> bytes:
    """Edges of 16 and 32 bits, of either byte order, written anywhere."""
    data = bytearray(_of(rng))
    for _ in range(rng.choice((1, 2, 4))):
        width, order = rng.choice((2, 4)), rng.choice(("little", "big"))
        at = min(_place(rng, len(data)), len(data) - width)
        data[at : at + width] = (_edge(rng) % 256**width).to_bytes(width, order)
    return bytes(data)


def _wrong_header(rng: random.Random) -> bytes:
    """The head of one format before the body of another."""
    head, body = _of(rng), _of(rng)
    at = rng.choice((2, 3, 4, 8, 12, 26, 54))
    return head[:at] + body[rng.choice((0, at)) :]


def _spliced(rng: random.Random) -> bytes:
    one, other = _of(rng), _of(rng)
    return one[: rng.randrange(1, len(one))] + other[rng.randrange(len(other)) :]


def _concatenated(rng: random.Random) -> bytes:
    parts = [_of(rng) for _ in range(rng.choice((2, 3)))]
    return rng.choice((b"", b"\x00", b"\r\n", rng.randbytes(100))).join(parts)


def _polyglot(rng: random.Random) -> bytes:
    """A picture that is also something else, or something else that is also a picture."""
    data = _of(rng)
    script = b"<script>alert(1)</script><?php system('id'); ?>"
    archive = b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18)
    kind = rng.randrange(6)
    if kind == 0:
        return data + rng.choice((script, archive, b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF"))
    if kind == 1:
        return rng.choice((script, archive, b"%PDF-1.7\n", b"\x00", b"\r\n", b"\xef\xbb\xbf")) + data
    if kind == 2:  # a GIF whose size is the beginning of a comment of JavaScript
        return b"GIF89a/*" + _of(rng, "gif")[8:] + b"*/=1;alert(1)"
    if kind == 3:  # a JPEG with another picture in its comment
        inner = _of(rng, "png")[:60_000]
        jpeg = _of(rng, "jpeg")
        return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(inner) + 2) + inner + jpeg[2:]
    if kind == 4:
        return PNG_MAGIC + _chunk(b"IHDR", b"<svg xmlns='http") + script
    return b"BM" + struct.pack("<I", len(data)) + data


# Damage that keeps the format's own checks content, and so gets further in.


def _chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    declared = len(data) if length is None else length
    return struct.pack(">I", declared % 2**32) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _ihdr(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", width % 2**32, height % 2**32, depth, colour, 0, 0, interlace))


def _chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 8 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def _interlaced_png() -> bytes:
    """Pillow writes none: each of the seven passes, with all its pixels."""
    raw = b""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    for x, y, dx, dy in passes:
        row = b"\x00" + b"\xc8\x14\x14\xff" * len(range(x, 48, dx))
        raw += row * len(range(y, 32, dy))
    return PNG_MAGIC + _ihdr(48, 32, 8, 6, 1) + _chunk(b"IDAT", zlib.compress(raw)) + _chunk(b"IEND", b"")


def _png_chunks(rng: random.Random) -> bytes:
    """Chunks changed, doubled, dropped, shuffled or with lengths that lie; the checksums are right."""
    chunks = _chunks_of(_of(rng, "png"))
    lies: dict[int, int] = {}
    for _ in range(rng.choice((1, 2, 3))):
        at = rng.randrange(len(chunks))
        kind, data = chunks[at]
        what = rng.randrange(7)
        if what == 0:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
        elif what == 1 and len(chunks) > 1:
            del chunks[at]
        elif what == 2:
            rng.shuffle(chunks)
        elif what == 3:
            lies[at] = _edge(rng)
        elif what == 4:
            names = (b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"eXIf", b"pHYs")
            junk = rng.randbytes(rng.choice((0, 1, 3, 8, 26, 300)))
            chunks.insert(rng.randrange(len(chunks) + 1), (rng.choice(names), junk))
        elif what == 5 and data:
            broken = bytearray(data)
            broken[rng.randrange(len(broken))] = rng.randrange(256)
            chunks[at] = kind, bytes(broken)
        else:
            chunks[at] = kind, data[: rng.randrange(len(data) + 1)]
    return PNG_MAGIC + b"".join(_chunk(kind, data, lies.get(at)) for at, (kind, data) in enumerate(chunks))


def _png_modes(rng: random.Random) -> bytes:
    """Every depth, colour type and interlacing, allowed or not, over data of any length; palettes too short."""
    width, height = rng.choice((8, 9, 48)), rng.choice((8, 33))
    depth, colour = rng.choice((1, 2, 4, 8, 16, rng.randrange(18))), rng.choice((0, 2, 3, 4, 6, rng.randrange(8)))
    row = b"\x00" + rng.randbytes((width * depth * {2: 3, 4: 2, 6: 4}.get(colour, 1) + 7) // 8)
    raw = row * (height + rng.choice((0, 0, 0, 5, -1)))
    body = _ihdr(width, height, depth, colour, rng.choice((0, 0, 1, 2)))
    if rng.random() < 0.7:
        body += _chunk(b"PLTE", rng.randbytes(rng.choice((0, 1, 3, 6, 768, 1000))))
    if rng.random() < 0.7:
        body += _chunk(b"tRNS", rng.randbytes(rng.choice((0, 1, 2, 6, 256, 300))))
    return PNG_MAGIC + body + _chunk(b"IDAT", zlib.compress(raw)) + _chunk(b"IEND", b"")


def _jpeg_segments(rng: random.Random) -> bytes:
    """Segments changed, doubled or dropped: frame sizes, sampling, tables, restart intervals, lengths."""
    data = _of(rng, "jpeg")
    head: list[bytes] = []
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        head.append(data[at : at + 2 + length])
        at += 2 + length
    scan = data[at:]
    for _ in range(rng.choice((1, 2))):
        i = rng.randrange(len(head))
        segment = bytearray(head[i])
        what = rng.randrange(6)
        if what == 0:
            head.insert(rng.randrange(len(head) + 1), head[i])
        elif what == 1 and len(head) > 1:
            del head[i]
        elif what == 2:
            segment[2:4] = (_edge(rng) % 65536).to_bytes(2, "big")
            head[i] = bytes(segment)
        elif what == 3:
            frames = [j for j, each in enumerate(head) if each[1] in (0xC0, 0xC1, 0xC2)]
            if frames:
                frame = bytearray(head[frames[0]])
                where = rng.choice(range(4, len(frame)))
                frame[where] = rng.choice((0, 1, 8, 12, 0x11, 0x44, 0x7F, 0xFF))
                head[frames[0]] = bytes(frame)
        elif what == 4 and len(segment) > 4:
            segment[rng.randrange(4, len(segment))] = rng.randrange(256)
            head[i] = bytes(segment)
        else:
            junk = rng.randbytes(rng.choice((0, 12, 2_000)))
            marker = rng.choice((0xDD, 0xC4, 0xDB, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xC3, 0xCC, 0xD8, 0xD9))
            head.insert(rng.randrange(len(head) + 1), bytes((0xFF, marker)) + struct.pack(">H", len(junk) + 2) + junk)
    return data[:2] + b"".join(head) + scan


def _tiff_entries(rng: random.Random) -> bytes:
    """Tags, types, counts and values of the directory lie; or the directories go round in circles."""
    data = bytearray(_of(rng, "tiff"))
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, directory)
    for _ in range(rng.choice((1, 2, 4))):
        entry = directory + 2 + 12 * rng.randrange(count)
        what = rng.randrange(6)
        if what == 0:
            tags = (254, 256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 338, 339, 347, 700)
            struct.pack_into(order + "H", data, entry, rng.choice(tags))
        elif what == 1:
            struct.pack_into(order + "H", data, entry + 2, rng.choice((0, 1, 2, 3, 4, 5, 7, 11, 12, 13, 16, 99)))
        elif what == 2:
            struct.pack_into(order + "I", data, entry + 4, _edge(rng))
        elif what == 3:
            struct.pack_into(order + "I", data, entry + 8, _edge(rng))
        elif what == 4:
            struct.pack_into(order + "HH", data, entry + 8, rng.choice((0, 1, 2, 3, 5, 6, 7, 8, 32, 34712, 50001)), 0)
        else:
            struct.pack_into(order + "I", data, directory + 2 + 12 * count, rng.choice((directory, 4, _edge(rng))))
    return bytes(data)


def _tiff(entries: list[tuple[int, int, int, int]], data: bytes) -> bytes:
    """A little-endian TIFF of these (tag, type, count, value), whose data begins after the directory."""
    body = b"".join(struct.pack("<HHII", tag, kind, count, value % 2**32) for tag, kind, count, value in entries)
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + data


def _gif_blocks(rng: random.Random) -> bytes:
    """The screen, the first frame and the code size of a GIF lie."""
    data = bytearray(_of(rng, "gif"))
    at = data.find(b"\x2c", 13)
    for _ in range(rng.choice((1, 2))):
        where = rng.choice((6, 8, at + 1, at + 3, at + 5, at + 7))
        struct.pack_into("<H", data, where, _edge(rng) % 65536)
    if rng.random() < 0.5:
        data[rng.choice((10, 11, at + 9, min(at + 10, len(data) - 1)))] = rng.randrange(256)
    return bytes(data)


def _bmp_header(rng: random.Random) -> bytes:
    """Every field of the two headers: sizes, negative heights, depths, compressions, offsets, colours."""
    data = bytearray(_of(rng, "bmp"))
    for _ in range(rng.choice((1, 2, 3))):
        kind, where = rng.choice((("<I", 2), ("<I", 10), ("<i", 18), ("<i", 22), ("<H", 26), ("<H", 28), ("<I", 30),
                                  ("<I", 34), ("<I", 46), ("<I", 50)))  # fmt: skip
        small = rng.choice((-1, 0, 1, 2, 3, 4, 8, 16, 24, 32, 64))
        size = struct.calcsize(kind)
        number = small if rng.random() < 0.6 else _edge(rng)
        data[where : where + size] = (number % 256**size).to_bytes(size, "little")
    return bytes(data)


def _webp_chunks(rng: random.Random) -> bytes:
    """The sizes, the canvas, the flags and the frames of a WebP lie."""
    data = bytearray(_of(rng, "webp"))
    what = rng.randrange(4)
    if what == 0:
        struct.pack_into("<I", data, rng.choice((4, 16)), _edge(rng))
    elif what == 1:
        data[20] = rng.randrange(256)
    elif what == 2:
        at = rng.choice((24, 27))
        data[at : at + 3] = rng.choice((b"\xff\xff\xff", b"\x00\x00\x00", b"\x07\x00\x00"))
    else:
        for name in (b"ANMF", b"VP8 ", b"VP8L", b"ALPH", b"EXIF"):
            at = data.find(name)
            if at > 0:
                data[at + 4 : at + 8] = (_edge(rng)).to_bytes(4, "little")
                break
    return bytes(data)


# Bombs: little to send, much to do.


def _declared_size(rng: random.Random) -> tuple[int, int]:
    """Sizes far beyond any cap, sizes that no cap refuses, and none at all."""
    return rng.choice(
        ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (65_535, 65_535), (65_535, 8), (8, 65_535), (1_900, 2_000), (0, 0),
         (0, 64), (64, 0), (1, 1), (2**16, 2**16), (2**32 - 1, 8), (16_383, 16_383), (1_900, 2_100))
    )  # fmt: skip


def _huge_png(rng: random.Random) -> bytes:
    width, height = _declared_size(rng)
    rows = zlib.compress(bytes(rng.choice((0, 100, 2_000_000))))
    end = rng.choice((b"", _chunk(b"IEND", b"")))
    header = _ihdr(width, height, *rng.choice(((8, 2), (16, 6), (1, 0), (8, 3))), rng.choice((0, 1)))
    return PNG_MAGIC + header + _chunk(b"IDAT", rows) + end


def _huge_tiff(rng: random.Random) -> bytes:
    """As strips or tiles, of any compression, as many as it declares or one that is all."""
    width, height = _declared_size(rng)
    compression = rng.choice((1, 5, 7, 8, 32773, 4, 34925, 50000))
    data = rng.choice((bytes(100), zlib.compress(bytes(2_000_000)), b"\x80\x00" * 50))
    size = 2**31 - 1 if rng.random() < 0.3 else len(data)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, rng.choice((1, 8, 16, 32, 64))),
               (259, 3, 1, compression), (262, 3, 1, rng.choice((0, 1, 2, 3, 5, 6)))]  # fmt: skip
    count = 9 if rng.random() < 0.5 else 10
    start = 8 + 2 + 12 * count + 4
    if count == 9:
        entries += [(273, 4, 1, start), (277, 3, 1, rng.choice((1, 3, 4))), (278, 4, 1, height), (279, 4, 1, size)]
    else:
        side = rng.choice((16, 2**16, 2**30, 0))
        entries += [(277, 3, 1, 1), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, start), (325, 4, 1, size)]
    return _tiff(entries, data)


def _huge_webp(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return pictures.webp_header(rng.choice((16_383, 1_900, 0, 8)), rng.choice((16_383, 2_000, 0, 8)))
    canvas = rng.choice((2**24 - 1, 16_383, 1_900)).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + bytes((rng.choice((0x02, 0x10, 0x2C, 0xFF)), 0, 0, 0)) + canvas * 2
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body + _of(rng, "webp")[12:]


def _huge_gif(rng: random.Random) -> bytes:
    """A huge screen with a small frame, a small screen with a huge or far away frame, or code that never ends."""
    side = rng.choice((65_535, 1_900, 48, 0))
    frame = rng.choice((65_535, 1_900, 8, 0))
    x = rng.choice((0, 65_535))
    screen = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, rng.choice((0, 255)), 0) + b"\x00\x00\x00\xff\xff\xff"
    block = b"\x2c" + struct.pack("<HHHHB", x, x, frame, frame, rng.choice((0, 0x40)))
    code = bytes((rng.choice((2, 8, 12, 0)),)) + b"\xff" + rng.randbytes(255) + rng.choice((b"\x00;", b""))
    return screen + block + code


def _huge_bmp(rng: random.Random) -> bytes:
    width, height = _declared_size(rng)
    depth, compression = rng.choice(((24, 0), (8, 1), (4, 2), (32, 3), (1, 0)))
    header = struct.pack("<IIIHHIIIIII", 40, width, height, 1, depth, compression, 0, 0, 0, rng.choice((0, 2**31)), 0)
    # Run-length code in which every pair says 255 pixels, or jumps far away.
    return b"BM" + struct.pack("<IHHI", 1_000, 0, 0, 54) + header + rng.choice((b"\xff\x00", b"\x00\x02\xff\xff")) * 500


def _huge_jpeg(rng: random.Random) -> bytes:
    """A frame that declares much before a scan that holds little; or scan after scan over it."""
    data = bytearray(rng.choice((pictures.jpeg(), pictures.jpeg(progressive=True))))
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    height, width = rng.choice(((65_535, 65_535), (1_900, 2_000), (0, 48), (32, 0), (8, 65_500)))
    struct.pack_into(">HH", data, at + 5, height, width)
    scan = data.find(b"\xff\xda")
    return bytes(data[:-2]) + bytes(data[scan:-2]) * rng.choice((0, 1, 8, 60)) + b"\xff\xd9"


def _many_frames(rng: random.Random) -> bytes:
    frames = [Image.new("P", (16, 16), n % 256) for n in range(rng.choice((100, 400)))]
    whole = pictures.encode(frames[0], rng.choice(("GIF", "PNG", "WEBP")), save_all=True, append_images=frames[1:])
    return whole if rng.random() < 0.5 else whole[: rng.randrange(len(whole) // 2, len(whole))]


def _many_blocks(rng: random.Random) -> bytes:
    """As many as there is room for of the smallest block that says nothing."""
    kind, at, block = rng.choice(
        (("jpeg", 2, b"\xff\xfe\x00\x02"), ("jpeg", 2, b"\xff"), ("jpeg", 2, b"\xff\xe1\x00\x02"),
         ("png", 33, _chunk(b"tEXt", b"a\x00b")), ("png", 33, _chunk(b"abCd", b"")), ("png", 33, _chunk(b"IDAT", b"")))
    )  # fmt: skip
    data = _of(rng, kind)
    return data[:at] + block * (100_000 // len(block)) + data[at:]


def _with_exif(rng: random.Random, exif: bytes) -> bytes:
    """A good picture with this TIFF structure as its EXIF."""
    kind = rng.choice(("JPEG", "PNG", "WEBP"))
    prefix = b"Exif\x00\x00" if kind == "JPEG" else b""
    return pictures.encode(pictures.photo(), kind, exif=prefix + exif)


def _deep_exif(rng: random.Random) -> bytes:
    """Directories in directories, in circles, or with more entries than there is room for."""
    what = rng.randrange(3)
    if what == 0:
        depth = 2_000
        tag = rng.choice((0x8769, 0x8825, 0xA005, 0x014A))
        ifds = b"".join(struct.pack("<HHHIII", 1, tag, 4, 1, 8 + 18 * (n + 1), 0) for n in range(depth))
        return _with_exif(rng, b"II*\x00" + struct.pack("<I", 8) + ifds)
    if what == 1:
        circle = struct.pack("<HHHIIHHIII", 2, 0x8769, 4, 1, 8, 0x0112, 3, 1, 6, 8)
        return _with_exif(rng, b"II*\x00" + struct.pack("<I", 8) + circle)
    entry = struct.pack("<HHII", rng.randrange(65536), rng.choice((1, 2, 5, 12)), _edge(rng), _edge(rng))
    return _with_exif(rng, b"II*\x00" + struct.pack("<IH", 8, rng.choice((5_000, 65_535))) + entry * 5_000)


def _orientation(rng: random.Random) -> bytes:
    """The one tag that is used, with values, types and counts that are not allowed."""
    order = rng.choice("<>")
    kind, count = rng.choice((0, 1, 2, 3, 4, 5, 7, 9, 10, 11, 12, 13, 99)), rng.choice((0, 1, 1, 1, 2, 2**31))
    number = rng.choice((0, 1, 5, 6, 7, 8, 9, 255, 65_535, 2**32 - 1))
    head = (b"II*\x00" if order == "<" else b"MM\x00*") + struct.pack(order + "IH", 8, 1)
    tags = struct.pack(order + "HHII", 0x0112, kind, count, number)
    return _with_exif(rng, head + tags + bytes(4) + rng.choice((b"", bytes(64), rng.randbytes(64))))


def _xmp_orientation(rng: random.Random) -> bytes:
    """Pillow reads the orientation of XMP too, where EXIF has none."""
    value = rng.choice(("6", "99", "-1", "", "६", "9" * 5_000, "6\x00"))
    entities = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;">]>' if rng.random() < 0.3 else ""
    xmp = f'{entities}<x:xmpmeta><rdf:Description tiff:Orientation="{value}"/></x:xmpmeta>' * rng.choice((1, 300))
    kind = rng.choice(("JPEG", "WEBP"))
    return pictures.encode(pictures.photo(), kind, xmp=xmp.encode()[:65_000])


def _huge_profile(rng: random.Random) -> bytes:
    """Colour profiles and texts that are long, or that unpack to much more than they are."""
    what = rng.randrange(4)
    if what == 0:
        return pictures.encode(pictures.photo(), "JPEG", icc_profile=bytes(rng.choice((70_000, 3_000_000))))
    if what == 1:
        return pictures.encode(pictures.photo(), "WEBP", icc_profile=rng.randbytes(100_000))
    packed = zlib.compress(bytes(30_000_000), 9)
    chunk = rng.choice((_chunk(b"iCCP", b"x\x00\x00" + packed), _chunk(b"zTXt", b"x\x00\x00" + packed),
                        _chunk(b"iTXt", b"x\x00\x01\x00\x00\x00" + packed)))  # fmt: skip
    data = pictures.encode(pictures.photo())
    return data[:33] + chunk * rng.choice((1, 5)) + data[33:]


def _really_large(rng: random.Random) -> bytes:
    """Nothing lies here: a few kilobytes that are truly some million pixels."""
    size = rng.choice(((1_900, 2_000), (60_000, 60), (8, 200_000)))
    mode = rng.choice(("1", "L", "P", "RGB"))
    kind = rng.choice(("PNG", "GIF", "TIFF"))
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}
    if kind == "GIF":
        size = min(size[0], 60_000), min(size[1], 60_000)
    return pictures.encode(Image.new(mode, size), kind, **options)


# Each damage of no format stands twice: there are more ways in it.
_ANY: tuple[Making, ...] = (_truncated, _bits_flipped, _runs_replaced, _runs_cut_or_added, _numbers_lie)
_MAKINGS: tuple[Making, ...] = (
    *_ANY, _wrong_header, _spliced, _concatenated, _polyglot,
    *_ANY, _png_chunks, _png_modes, _jpeg_segments, _tiff_entries, _gif_blocks, _bmp_header, _webp_chunks,
    _huge_png, _huge_tiff, _huge_webp, _huge_gif, _huge_bmp, _huge_jpeg, _many_frames, _many_blocks,
    _deep_exif, _orientation, _xmp_orientation, _huge_profile, _really_large,
)  # fmt: skip
RECIPES: tuple[tuple[str, Making], ...] = tuple((make.__name__.strip("_").replace("_", " "), make) for make in _MAKINGS)
