"""Made-up pictures as bytes: good ones of every kind, and broken ones."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (48, 32)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(size: tuple[int, int] = SIZE) -> Image.Image:
    """Red on the left, blue on the right, with noise so that it cannot compress to nothing."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (200, 20, 20)
    pixels[:, width // 2 :] = (20, 20, 200)
    pixels += np.random.default_rng(0).integers(0, 30, pixels.shape, np.uint8)
    return Image.fromarray(pixels)


def jpeg(**options: object) -> bytes:
    return encode(photo(), "JPEG", **options)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares this size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    """A lossy WebP that declares this size (at most 16383 a side) over the data of a small one."""
    data = encode(photo(), "WEBP")
    at = data.index(b"\x9d\x01\x2a") + 3
    return data[:at] + struct.pack("<HH", width, height) + data[at + 4 :]


def rotated(orientation: int, kind: str = "JPEG") -> bytes:
    """The photo, lying as a camera stores it, with the EXIF orientation that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180, 8: Image.Transpose.ROTATE_270}[orientation]
    return encode(photo().transpose(lying), kind, exif=exif)


def truncated() -> dict[str, bytes]:
    """One picture per format, cut in the middle of its pixels."""
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    whole = {kind: encode(photo((96, 96)), kind) for kind in kinds}
    return {kind: data[: len(data) // 2] for kind, data in whole.items()}


def good() -> dict[str, bytes]:
    """The photo in every form that must caption: formats, colour modes, depths, animation, rotation."""
    rgb = photo()
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(SIZE))
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    other = Image.new("RGB", SIZE, "green")
    animated = {"save_all": True, "append_images": [other], "duration": 50}
    return {
        "jpeg": encode(rgb, "JPEG"),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg grey": encode(rgb.convert("L"), "JPEG"),
        "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "jpeg mpo": encode(rgb, "MPO", save_all=True, append_images=[other]),
        "jpeg rotated 6": rotated(6),
        "jpeg rotated 3": rotated(3),
        "jpeg broken exif": encode(rgb, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"),
        "png": encode(rgb),
        "png alpha": encode(alpha),
        "png grey alpha": encode(alpha.convert("LA")),
        "png palette": encode(palette),
        "png palette transparent": encode(palette, transparency=0),
        "png rgb transparent": encode(rgb, transparency=(0, 0, 0)),
        "png one bit": encode(rgb.convert("1")),
        "png 16 bit": encode(deep),
        "png animated": encode(rgb, "PNG", **animated),
        "png rotated 8": rotated(8, "PNG"),
        "webp": encode(rgb, "WEBP"),
        "webp lossless alpha": encode(alpha, "WEBP", lossless=True),
        "webp animated": encode(rgb, "WEBP", **animated),
        "gif": encode(rgb, "GIF"),
        "gif animated": encode(rgb, "GIF", **animated),
        "bmp": encode(rgb, "BMP"),
        "tiff": encode(rgb, "TIFF"),
        "tiff 16 bit": encode(deep, "TIFF"),
        "tiff float": encode(Image.fromarray(np.asarray(rgb.convert("L"), np.float32) / 255), "TIFF"),
        "tiff cmyk lzw": encode(rgb.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "tiff rotated 6": rotated(6, "TIFF"),
    }
