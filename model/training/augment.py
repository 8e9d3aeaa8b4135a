"""What a batch is changed by, drawn anew each time: zooming into kept features of photos, and hiding their regions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def draw_windows(count: int, smallest: float, random: np.random.Generator) -> np.ndarray:
    """Parts of photos to zoom into: float64 `(count, 4)` of x0, y0, x1, y1 relative to the photo.

    Each side is `smallest` to 1 of the photo's, drawn evenly, and so is its place.
    """
    size = random.uniform(smallest, 1.0, (count, 2))
    start = random.random((count, 2)) * (1.0 - size)
    return np.concatenate((start, start + size), 1)


def zoom(features: Tensor, windows: np.ndarray) -> Tensor:
    """Feature maps `(B, C, H, W)` -> what their windows show, interpolated to the same size."""
    start, end = torch.from_numpy(windows).float().chunk(2, 1)
    # Coordinates of `affine_grid` go from -1 to 1 over the map.
    theta = torch.zeros(len(windows), 2, 3)
    theta[:, [0, 1], [0, 1]] = end - start
    theta[:, :, 2] = start + end - 1
    grid = F.affine_grid(theta.to(features.device), list(features.shape), align_corners=False)
    return F.grid_sample(features, grid, mode="bilinear", padding_mode="border", align_corners=False)


def zoom_boxes(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Boxes `(G, 4)` relative to a photo -> relative to its window `(4,)`, of which they may stick out."""
    start, size = np.tile(window[:2], 2), np.tile(window[2:] - window[:2], 2)
    return ((boxes - start) / size).astype(np.float32)


def hide_regions(mask: Tensor, most: float, random: np.random.Generator) -> Tensor:
    """The mask `(B, R)`, True where a region is, with a share of each photo's hidden: drawn evenly from 0 to `most`.

    A photo of which no region would stay keeps all.
    """
    rates = random.random((len(mask), 1)) * most
    kept = mask & torch.from_numpy(random.random(mask.shape) >= rates).to(mask.device)
    return torch.where(kept.any(1, keepdim=True), kept, mask)
