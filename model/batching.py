"""Images with different numbers of regions as one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from model.caption import Regions


def stack_regions(batch: Sequence[Regions]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features `(B, R, F)`, boxes `(B, R, 4)` and mask `(B, R)`, padded to the most regions of the batch."""
    most = max(len(regions.boxes) for regions in batch)
    features = np.zeros((len(batch), most, batch[0].features.shape[1]), dtype=np.float32)
    boxes = np.zeros((len(batch), most, 4), dtype=np.float32)
    mask = np.zeros((len(batch), most), dtype=bool)
    for row, regions in enumerate(batch):
        count = len(regions.boxes)
        features[row, :count], boxes[row, :count], mask[row, :count] = regions.features, regions.boxes, True
    return torch.from_numpy(features), torch.from_numpy(boxes), torch.from_numpy(mask)
