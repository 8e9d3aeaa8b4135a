"""RoI max pooling: a region of the grid becomes so many cells a side, each the largest value that lies in it.

Girshick, "Fast R-CNN" (ICCV 2015), 2.1, with the rounding of the Caffe layer, which ONNX's MaxRoiPool shares.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_regions(grid: Tensor, boxes: Tensor, scale: float, cells: int) -> Tensor:
    """Grid `(C, h, w)`, boxes `(R, 4)` in pixels, `scale` cells per pixel -> `(R, C, cells, cells)`.

    A cell that covers nothing is 0.
    """
    ends = torch.floor((boxes * scale).double() + 0.5).long()  # halves go up
    return torch.stack([_pool_one(grid, box, cells) for box in ends.tolist()])


def _pool_one(grid: Tensor, box: list[int], cells: int) -> Tensor:
    """The largest over rows first, then over columns: the cells are rectangles."""
    channels, height, width = grid.shape
    x0, y0, x1, y1 = box
    rows = torch.zeros(channels, cells, width)
    for index, (start, end) in enumerate(_spans(y0, y1, cells, height)):
        if end > start:
            rows[:, index] = grid[:, start:end].amax(1)
    pooled = torch.zeros(channels, cells, cells)
    for index, (start, end) in enumerate(_spans(x0, x1, cells, width)):
        if end > start:
            pooled[:, :, index] = rows[:, :, start:end].amax(2)
    return pooled


def _spans(first: int, last: int, cells: int, size: int) -> list[tuple[int, int]]:
    """Where each cell starts and ends (not included); in float32, whose rounding decides where cells share a row."""
    step = torch.tensor(max(last - first + 1, 1), dtype=torch.float32) / cells
    numbers = torch.arange(cells + 1, dtype=torch.float32) * step
    starts = (numbers[:-1].floor().long() + first).clamp(0, size)
    ends = (numbers[1:].ceil().long() + first).clamp(0, size)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
