"""From a decoded picture to the pixels that the extractor reads: one path for training and serving."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

PHOTO_SIZE = 224  # the training photos are 224x224 with their aspect ratio squashed: so are the served ones
INPUT_SIZE = 288  # what the trunk sees: nine cells of 32 pixels a side
SUFFICIENT_SIDE = 2 * PHOTO_SIZE  # of a photo's sides: a JPEG reduced to no less differs by a few levels at most
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as upright RGB: EXIF rotation applied, transparency on white, 16-bit scaled to 8.

    Of an animated image the current frame is taken. Raises `OSError` for pixel data that cannot be decoded.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale to 8 bits; Pillow's own `convert` clips these instead of scaling."""
    values = np.asarray(image).astype(np.float32)  # one copy, then in place: the image may be large
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    top = 65535.0 if image.mode.startswith("I") else 1.0
    if values.max(initial=0.0) > top or values.min(initial=0.0) < 0.0:  # not in the usual range: stretch it
        values -= values.min()
        top = float(values.max()) or 1.0
    values *= 255.0 / top
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def to_pixels(image: Image.Image) -> np.ndarray:
    """A Pillow image as uint8 `(224, 224, 3)`, squashed to a square as the training photos were."""
    rgb = to_rgb(image)
    if rgb.size != (PHOTO_SIZE, PHOTO_SIZE):
        rgb = rgb.resize((PHOTO_SIZE, PHOTO_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 `(B, 224, 224, 3)` -> float `(B, 3, 288, 288)` as the trunk wants it: bilinear, (x - 127) / 128.

    It is the first part of the exported graph, so that every provider sees the same pixels.
    """
    x = pixels.to(torch.float32).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
    return (x - 127.0) / 128.0
