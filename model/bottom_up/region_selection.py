"""From candidates to regions, in torch: the exported graph's reference, and what training reads its regions through.

A photo's regions are the best 10 to 36 candidates after non-maximum suppression, the surest first, and then a few large
cells that cover the photo, so that background is not lost. A region's vector is the trunk's last grid under it, the
pyramid's finest level under it, the chances of all classes, and of holding anything at all; a cell names nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.bottom_up.box_overlap import pairwise_iou
from model.bottom_up.grid import cells, grid_boxes
from model.bottom_up.region_head import Candidates
from model.bottom_up.region_limits import BACKGROUND_SIDE, CONFIDENCE, LEAST, MOST, NMS_IOU, SAMPLES
from model.bottom_up.trunk import HEAD_WIDTH


def region_width(pyramid: int, classes: int) -> int:
    """F, the numbers of a region."""
    return HEAD_WIDTH + pyramid + classes + 1


def suppress(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    """Greedy non-maximum suppression of one photo: rows that stay, best first, at most so many."""
    near = pairwise_iou(boxes, boxes) > iou
    left = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    kept: list[int] = []
    for row in scores.argsort(descending=True, stable=True).tolist():
        if left[row]:
            kept.append(row)
            left &= ~near[row]
            if len(kept) == most:
                break
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


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


def regions_of(candidates: Candidates, coarse: Tensor, side: int = BACKGROUND_SIDE) -> list[tuple[Tensor, Tensor]]:
    """Features `(R, F)` and boxes `(R, 4)` of each of B photos; `coarse (B, 1280, 9, 9)` is the trunk's last grid.

    `side`: of the large cells.
    """
    chances, classes = candidates.objectness.sigmoid(), candidates.classes.sigmoid()
    around = torch.cat((background(coarse, side), background(candidates.pyramid, side)), 2)
    around = F.pad(around, (0, classes.shape[2] + 1))  # (B, side * side, F): names nothing
    around_boxes = torch.from_numpy(grid_boxes(side)).to(coarse)
    found = []
    for photo in range(len(coarse)):
        rows = choose(candidates.boxes[photo], chances[photo])
        boxes = candidates.boxes[photo, rows]
        grids = (roi_align(coarse[photo], boxes), roi_align(candidates.pyramid[photo], boxes))
        features = torch.cat((*grids, classes[photo, rows], chances[photo, rows, None]), 1)
        found.append((torch.cat((features, around[photo])), torch.cat((boxes, around_boxes))))
    return found
