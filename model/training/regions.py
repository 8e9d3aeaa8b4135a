"""Regions of the training photos by row number: from the kept lower-trunk features, through the upper trunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.bottom_up.grid import cells, grid_boxes
from model.bottom_up.trunk import HEAD_WIDTH, Trunk
from model.training.features import CROPPED_FLIPPED, FLIPPED, FULL, GRID


@dataclass(frozen=True)
class PhotoRows:
    """Kept lower-trunk features of several data sets, read as one list of photos."""

    names: tuple[str, ...]
    parts: tuple[np.ndarray, ...]  # each float16 (photos, views, 120, 18, 18)

    def __post_init__(self) -> None:
        if len(self.names) != sum(len(part) for part in self.parts):
            raise ValueError("a name for every photo")

    def bottom(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """float32 `(len(rows), 120, 18, 18)`."""
        found = [self._one(row)[view] for row, view in zip(rows, views, strict=True)]
        return torch.from_numpy(np.stack(found)).float().to(memory_format=torch.channels_last)

    def _one(self, row: int) -> np.ndarray:
        for part in self.parts:
            if row < len(part):
                return part[row]
            row -= len(part)
        raise IndexError("no such photo")


def mirrored(view: int) -> bool:
    """Whether left and right have changed places in this view."""
    return view in (FLIPPED, CROPPED_FLIPPED)


class KeptRegions:
    """float16 region features of every photo, whole and mirrored, for stages that leave the trunk alone."""

    def __init__(self, photos: PhotoRows, trunk: Trunk, views: int, batch: int = 32) -> None:
        views = min(views, 2)
        width = (GRID // 2) ** 2
        self.features = np.empty((len(photos.names), views, width, HEAD_WIDTH), dtype=np.float16)
        for start in range(0, len(photos.names), batch):
            rows = range(start, min(start + batch, len(photos.names)))
            for view in (FULL, FLIPPED)[:views]:
                with torch.inference_mode():
                    regions = cells(trunk.top(photos.bottom(rows, [view] * len(rows))))
                self.features[rows.start : rows.stop, view] = regions.numpy()

    def __call__(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """float32 `(len(rows), 81, 1280)`."""
        return torch.from_numpy(self.features[list(rows), list(views)]).float()


def boxes_for(images: int) -> Tensor:
    """`(images, 81, 4)`: the cells' boxes, the same for every photo."""
    return torch.from_numpy(grid_boxes(GRID // 2)).expand(images, -1, -1)
