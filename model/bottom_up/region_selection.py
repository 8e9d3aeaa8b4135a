"""From candidates to regions, in torch: the exported graph's reference.

A photo's regions are the best 10 to 36 candidates after non-maximum suppression, the surest first, and then a few large
cells that cover the photo, so that background is not lost. A region's vector is the trunk's last grid under it, the
pyramid's finest level under it, the chances of all classes, and of holding anything at all; a cell names nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.bottom_up.box_overlap import suppress
from model.bottom_up.grid import cells, grid_boxes
from model.bottom_up.region_head import Candidates
from model.bottom_up.region_limits import CONFIDENCE, LEAST, MOST, NMS_IOU, SAMPLES
from model.bottom_up.trunk import HEAD_WIDTH


def region_width(pyramid: int, classes: int) -> int:
    """F, the numbers of a region."""
    return HEAD_WIDTH + pyramid + classes + 1


def choose(boxes: Tensor, scores: Tensor) -> Tensor:
    """Candidates `(A, 4)` of one photo with their chances `(A,)` -> rows of its regions, the surest first."""
    kept = suppress(boxes, scores, NMS_IOU, MOST)
    count = max(LEAST, int((scores[kept] >= CONFIDENCE).sum()))
    return kept[:count]


def background(grid: Tensor, side: int) -> Tensor:
    """Means of `(B, C, S, S)` over side x side large cells -> `(B, side * side, C)`, row by row."""
    return cells(F.avg_pool2d(grid, grid.shape[-1] // side))


def roi_align(grid: Tensor, boxes: Tensor, samples: int = SAMPLES) -> Tensor:
    """RoIAlign (He et al., "Mask R-CNN", ICCV 2017) to one cell: mean of samples x samples points under each box.

    Grid `(C, H, W)`, boxes `(R, 4)` relative to the photo -> `(R, C)`; half-pixel coordinates, as ONNX's operator. The
    mean of bilinear samples on a lattice is a weight for each row times one for each column.
    """
    _, height, width = grid.shape
    rows = _weights(boxes[:, 1], boxes[:, 3], height, samples)  # (R, H)
    columns = _weights(boxes[:, 0], boxes[:, 2], width, samples)  # (R, W)
    return torch.einsum("chw,rh,rw->rc", grid, rows, columns)


def _weights(starts: Tensor, ends: Tensor, cells: int, samples: int) -> Tensor:
    """`(R,)` each, 0 to 1 -> `(R, cells)`: how much each cell counts along one axis."""
    within = (torch.arange(samples, device=starts.device) + 0.5) / samples
    points = (starts[:, None] + within * (ends - starts)[:, None]) * cells - 0.5  # (R, samples)
    points = points.clamp(0, cells - 1)
    apart = (points[..., None] - torch.arange(cells, device=starts.device)).abs()  # (R, samples, cells)
    return (1 - apart).clamp(min=0).mean(1)


class Parts(NamedTuple):
    """All of B photos that needs no choice, which is where the exported graph's two halves meet."""

    coarse: Tensor  # (B, 1280, 9, 9), the trunk's last grid
    pyramid: Tensor  # (B, P, 18, 18), the finest level
    boxes: Tensor  # (B, A, 4), candidates
    chances: Tensor  # (B, A), that one holds anything
    classes: Tensor  # (B, A, C), chances of each class
    around: Tensor  # (B, cells, F), the large cells


def parts_of(candidates: Candidates, coarse: Tensor, side: int) -> Parts:
    """`coarse (B, 1280, 9, 9)`: the trunk's last grid; `side`: large cells a side."""
    around = torch.cat((background(coarse, side), background(candidates.pyramid, side)), 2)
    around = F.pad(around, (0, candidates.classes.shape[2] + 1))  # names nothing
    chances, classes = candidates.objectness.sigmoid(), candidates.classes.sigmoid()
    return Parts(coarse, candidates.pyramid, candidates.boxes, chances, classes, around)


def regions_of(parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """Features `(R, F)` and boxes `(R, 4)` of each of B photos: regions first, then the large cells."""
    cell_boxes = torch.from_numpy(grid_boxes(math.isqrt(parts.around.shape[1]))).to(parts.coarse)
    found = []
    for coarse, pyramid, candidates, chances, classes, around in zip(*parts, strict=True):
        rows = choose(candidates, chances)
        boxes = candidates[rows]
        features = (roi_align(coarse, boxes), roi_align(pyramid, boxes), classes[rows], chances[rows, None])
        found.append((torch.cat((torch.cat(features, 1), around)), torch.cat((boxes, cell_boxes))))
    return found
