"""From a photo to the pixels that the Visual Genome detector reads: scaled, blue first, less a mean colour."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.bottom_up.preprocess import to_rgb
from model.bottom_up.visual_genome.config import PIXEL_MEAN, DetectorConfig

SMALLEST_SIDE = 32  # pixels of the scaled photo: of thinner ones nothing would be left at a stride of 16


def to_photo(image: Image.Image, shorter_side: int) -> np.ndarray:
    """A Pillow image as upright RGB, uint8 `(H, W, 3)`, in its own proportions.

    A photo more than twice as large as the detector will scale it to is first shrunk by a whole factor, averaging:
    scaling takes the nearest four pixels and would leave out the others. Raises `OSError` for pixel data that cannot be
    decoded.
    """
    rgb = to_rgb(image)
    factor = min(rgb.size) // shorter_side
    return np.asarray(rgb.reduce(factor) if factor >= 2 else rgb)


def scaled_size(height: int, width: int, config: DetectorConfig) -> tuple[float, int, int]:
    """Scale, height and width: the shorter side as wanted, or less so that the longer one is not too long."""
    shorter, longer = min(height, width), max(height, width)
    scale = config.shorter_side / shorter
    if round(scale * longer) > config.longer_side:
        scale = config.longer_side / longer
    return scale, max(round(scale * height), SMALLEST_SIDE), max(round(scale * width), SMALLEST_SIDE)


def scale_photo(photo: Tensor, config: DetectorConfig) -> tuple[Tensor, float]:
    """uint8 `(H, W, 3)` -> float32 `(1, 3, h, w)`, and how many of its pixels a pixel of the photo has become."""
    scale, height, width = scaled_size(photo.shape[0], photo.shape[1], config)
    blue_first = photo.flip(-1).to(torch.float32) - torch.tensor(PIXEL_MEAN)
    x = blue_first.permute(2, 0, 1)[None]  # (1, 3, H, W)
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False), scale
