"""How many of the given boxes regions find: recall at an intersection over union of 0.5."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.bottom_up.box_overlap import pairwise_iou
from model.bottom_up.detections import Detections
from model.bottom_up.extractor import Extractor
from model.bottom_up.extractor_kinds import REGIONS
from model.training.data import read_captions
from model.training.given_boxes import GivenBoxes
from model.training.photos import in_batches, iterate_photos
from model.training.region_loss import SURE

OVERLAP = 0.5  # from which a region has found a given box
FEW = 10  # regions


@dataclass
class Recall:
    """Of the sure boxes of all photos that were added."""

    photos: int = 0
    regions: int = 0
    boxes: int = 0
    by_few: int = 0
    by_all: int = 0

    def add(self, given: np.ndarray, regions: Tensor) -> None:
        """One photo: boxes `(G, 6)` as `GivenBoxes` has them, and regions `(R, 4)`, the surest first."""
        sure = torch.from_numpy(given[given[:, 5] >= SURE, :4]).to(regions.device)
        hit = pairwise_iou(sure, regions) >= OVERLAP  # (G, R)
        self.photos += 1
        self.regions += len(regions)
        self.boxes += len(sure)
        self.by_few += int(hit[:, :FEW].any(1).sum())
        self.by_all += int(hit.any(1).sum())

    def to_json(self) -> dict[str, float]:
        """Shares of the boxes that the first ten regions find, and all of them."""
        return {
            "recall_10": self.by_few / max(self.boxes, 1),
            "recall": self.by_all / max(self.boxes, 1),
            "boxes": self.boxes,
            "regions_per_photo": self.regions / max(self.photos, 1),
        }


def measure_extractor(extractor: Extractor, given: GivenBoxes, captions: Path, photos: Path, split: str) -> Recall:
    """Of the regions that an extractor gives the photos of a split, its cells left out.

    Raises `ValueError` where no photo of the split has boxes, or the extractor has no region head.
    """
    if extractor.kind != REGIONS:
        raise ValueError(f"an extractor of the kind {extractor.kind!r} has no region head")
    names = {photo.name for photo in read_captions(captions) if photo.split == split and photo.name in given.of}
    if not names:
        raise ValueError(f"no photo of the split {split!r} has boxes")
    recall = Recall()
    for batch in in_batches(iterate_photos(photos, names)):
        found = extractor.look_at_pixels(np.stack([pixels for _, pixels in batch]))
        for (name, _), regions in zip(batch, found, strict=True):
            assert isinstance(regions, Detections)
            recall.add(given.of[name], torch.from_numpy(regions.boxes[regions.named]))
    return recall
