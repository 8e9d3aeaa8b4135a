"""Overlaps of boxes `(..., 4)`: x0, y0, x1, y1, the far ends not included."""

from __future__ import annotations

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """`(..., 4)` -> `(...)`."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each of `(..., N, 4)` with each of `(..., M, 4)` -> `(..., N, M)`; 0 of nothing."""
    starts = torch.maximum(boxes[..., :, None, :2], others[..., None, :, :2])
    ends = torch.minimum(boxes[..., :, None, 2:], others[..., None, :, 2:])
    shared = area(torch.cat((starts, ends), -1))
    union = area(boxes)[..., :, None] + area(others)[..., None, :] - shared
    return shared / union.clamp(min=1e-9)


def generalised_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Of boxes with others of the same shape, `(..., 4)` -> `(...)`, -1 to 1 (Rezatofighi et al., CVPR 2019)."""
    starts = torch.maximum(boxes[..., :2], others[..., :2])
    ends = torch.minimum(boxes[..., 2:], others[..., 2:])
    shared = area(torch.cat((starts, ends), -1))
    union = (area(boxes) + area(others) - shared).clamp(min=1e-9)
    around = torch.cat(
        (torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:])), -1
    )
    hull = area(around).clamp(min=1e-9)
    return shared / union - (hull - union) / hull
