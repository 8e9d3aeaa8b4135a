"""Overlaps of boxes `(..., 4)`: x0, y0, x1, y1, the far ends not included; and what of them stays."""

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


def suppress(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    """Greedy non-maximum suppression of `(N, 4)` with scores `(N,)`: rows that stay, best first, at most so many.

    A box goes where it overlaps a better one that stays by more than the threshold.
    """
    left = scores.argsort(descending=True, stable=True)
    kept: list[int] = []
    while len(left) and len(kept) < most:
        kept.append(int(left[0]))
        others = left[1:]
        left = others[pairwise_iou(boxes[left[:1]], boxes[others])[0] <= threshold]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)
