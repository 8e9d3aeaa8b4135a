"""Which proposals become regions: the published rule, 10 to 100 of them by their confidence."""

from __future__ import annotations

import torch
from torch import Tensor

from model.bottom_up.visual_genome.boxes import suppress_per_class
from model.bottom_up.visual_genome.config import DetectorConfig


def confidences(boxes: Tensor, probabilities: Tensor, threshold: float) -> Tensor:
    """Boxes `(N, 4)` and class probabilities `(N, C)`, background first -> `(N,)`.

    The largest probability of an object class for which the box survived that class's non-maximum suppression; 0 where
    it survived none.
    """
    objects = probabilities[:, 1:]
    stays = suppress_per_class(boxes, objects, threshold)
    return torch.where(stays, objects, torch.zeros_like(objects)).amax(1)


def select(boxes: Tensor, probabilities: Tensor, config: DetectorConfig) -> Tensor:
    """Rows `(R,)` of the regions, most confident first.

    Those with a confidence of 0.2 or more, but no fewer than the 10 best and no more than the 100 best. The release
    picks the same ones; it gives them in the order of the proposals where their number is between the two.
    """
    confident = confidences(boxes, probabilities, config.class_nms)
    enough = int((confident >= config.confidence).sum())
    count = min(max(enough, config.least_regions), config.most_regions, len(boxes))
    return confident.argsort(descending=True, stable=True)[:count]
