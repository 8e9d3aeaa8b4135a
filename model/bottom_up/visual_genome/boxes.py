"""Box arithmetic as Caffe's Faster R-CNN does it: both ends of a box belong to it, so its width is x1 - x0 + 1.

Boxes are `(..., 4)`: x0, y0, x1, y1 in pixels of the scaled photo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.bottom_up import box_overlap
from model.bottom_up.box_overlap import pairwise_iou

# The exponent of a growing box: exp(4.1) times the smallest anchor is larger than any scaled photo, and stays finite.
LARGEST_GROWTH = math.log(1000 / 16)


def cell_anchors(stride: int, scales: Sequence[int], ratios: Sequence[float]) -> Tensor:
    """float32 `(ratios * scales, 4)`: the anchors of the first cell, all scales of a ratio before the next ratio.

    As the released weights were trained: sides are rounded to pixels for each ratio, then multiplied by the scales, and
    the centre is at (stride - 1) / 2.
    """
    centre = (stride - 1) / 2
    anchors = []
    for ratio in ratios:
        width = round(math.sqrt(stride * stride / ratio))
        height = round(width * ratio)
        for scale in scales:
            half_width, half_height = (width * scale - 1) / 2, (height * scale - 1) / 2
            anchors.append((centre - half_width, centre - half_height, centre + half_width, centre + half_height))
    return torch.tensor(anchors)


def grid_anchors(cell: Tensor, rows: int, columns: int, stride: int) -> Tensor:
    """Anchors `(A, 4)` of one cell -> `(rows * columns * A, 4)`, row by row."""
    y, x = torch.meshgrid(torch.arange(rows) * stride, torch.arange(columns) * stride, indexing="ij")
    shifts = torch.stack((x, y, x, y), -1).to(cell)  # (rows, columns, 4)
    return (shifts[:, :, None] + cell).reshape(-1, 4)


def decode(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Anchors `(N, 4)` moved and grown by deltas `(N, 4)` (dx, dy, log width, log height) -> boxes `(N, 4)`.

    Girshick et al. 2014, appendix C. As in Caffe, the far end is not brought back by the pixel that the width counts.
    """
    sizes = anchors[:, 2:] - anchors[:, :2] + 1  # (N, 2): width, height
    centres = anchors[:, :2] + 0.5 * sizes
    centres = centres + deltas[:, :2] * sizes
    sizes = sizes * deltas[:, 2:].clamp(max=LARGEST_GROWTH).exp()
    return torch.cat((centres - 0.5 * sizes, centres + 0.5 * sizes), 1)


def clip(boxes: Tensor, width: int, height: int) -> Tensor:
    """Boxes `(N, 4)` cut to the pixels 0..width-1, 0..height-1."""
    last = boxes.new_tensor([width - 1, height - 1, width - 1, height - 1])
    return torch.minimum(boxes.clamp(min=0), last)


def half_open(boxes: Tensor) -> Tensor:
    """`(..., 4)` with both ends included -> the same areas with the far ends left out."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes `(N, 4)` with others `(M, 4)` -> `(N, M)`."""
    return pairwise_iou(half_open(boxes), half_open(others))


def suppress(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    """`box_overlap.suppress` of boxes whose ends both belong to them."""
    return box_overlap.suppress(half_open(boxes), scores, threshold, most)


def suppress_per_class(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """`suppress` for each class on its own: scores `(N, C)` of the same boxes `(N, 4)` -> bool `(N, C)`, what stays."""
    too_close = overlaps(boxes, boxes) > threshold  # (N, N)
    order = scores.argsort(dim=0, descending=True, stable=True)  # (N, C): by rank, a box of each class
    stays = torch.ones_like(scores, dtype=torch.bool)
    rows, classes = torch.arange(len(scores))[:, None], torch.arange(scores.shape[1])
    for best in order:  # (C,)
        score = scores[best, classes]
        worse = (scores < score) | ((scores == score) & (rows > best))  # (N, C)
        stays &= ~(too_close[best].T & stays[best, classes] & worse)
    return stays
