"""Grid cells as the first regions: the trunk's last grid, row by row, each cell with its box."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def cells(grid: Tensor) -> Tensor:
    """`(B, C, S, S)` -> `(B, S * S, C)`, rows of the image first."""
    return grid.flatten(2).transpose(1, 2)


def grid_boxes(side: int) -> np.ndarray:
    """float32 `(side * side, 4)`: x0, y0, x1, y1 of the cells, relative to the image, in the order of `cells`."""
    edges = np.linspace(0.0, 1.0, side + 1, dtype=np.float32)
    y, x = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    return np.stack((edges[x], edges[y], edges[x + 1], edges[y + 1]), axis=-1).reshape(-1, 4)
