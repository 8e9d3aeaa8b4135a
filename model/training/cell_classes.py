"""What the trunk is asked besides while it learns from captions: which classes of things each cell of its grid shows.

6,000 photos with captions say little of what things look like; boxes of things, found in these photos and in others by
a detector, say more. The answers serve nothing else, and are not in the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.training.augment import zoom_boxes
from model.training.features import view_boxes
from model.training.given_boxes import GivenBoxes

RARE = 0.01  # chance that an untrained classifier gives a class, so that its first lessons are of what is there
SLIVER = 0.05  # of the part's side: about half of one of nine cells
ROUNDING = 1e-6  # of float32 boxes


@dataclass(frozen=True)
class SeenPart:
    """The part of a photo that the trunk saw."""

    name: str  # of the photo
    view: int
    seed: int  # that the view was drawn from
    window: np.ndarray  # (4,): what was zoomed into, relative to the view


class CellClasses(nn.Module):
    """A classifier of cells, and the boxes that it learns from."""

    def __init__(self, given: GivenBoxes, width: int) -> None:
        """`width`: numbers of a cell."""
        super().__init__()
        self.given = given
        self.classifier = nn.Linear(width, len(given.classes))
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.constant_(self.classifier.bias, math.log(RARE / (1 - RARE)))

    def loss(self, features: Tensor, parts: Sequence[SeenPart]) -> Tensor:
        """Of cells `(B, cells, width)` of B parts: mean over cells of the classes' summed cross-entropies, in nats.

        Parts of photos without given boxes are left out; 0 where all are.
        """
        known = [place for place, part in enumerate(parts) if part.name in self.given.of]
        if not known:
            return features.new_zeros(())
        boxes = [boxes_in(parts[place], self.given.of[parts[place].name]) for place in known]
        side = math.isqrt(features.shape[1])
        targets = cell_targets(boxes, side, len(self.given.classes)).to(features.device)
        logits = self.classifier(features[known]).float()
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1).mean()


def boxes_in(part: SeenPart, rows: np.ndarray) -> np.ndarray:
    """Boxes `(G, 6)` of the photo -> those that the part shows any of, as far as it does, relative to it.

    Of what a box holds, the cells that are left of it show as much as before. Where less than `SLIVER` is left of a
    side that was cut, no cell is, and the box is out of sight.
    """
    whole = zoom_boxes(view_boxes(rows[:, :4], part.view, part.seed), part.window)
    seen = whole.clip(0.0, 1.0)
    sides = seen[:, 2:] - seen[:, :2]
    there = (sides >= np.minimum(whole[:, 2:] - whole[:, :2], SLIVER) - ROUNDING).all(1)
    return np.concatenate((seen, rows[:, 4:]), 1)[there]


def cell_targets(photos: Sequence[np.ndarray], side: int, classes: int) -> Tensor:
    """Boxes of B photos, each `(G, 6)` of x0, y0, x1, y1, class and score -> `(B, side * side, classes)`, 0 to 1.

    A cell shows a class as surely as the surest of its boxes that the cell's centre is in. Along an axis on which a box
    is between two centres, it counts for the cell that its middle is in.
    """
    targets = np.zeros((len(photos), side, side, classes), np.float32)
    for photo, rows in zip(targets, photos, strict=True):
        for x0, y0, x1, y1, number, score in rows:
            shown = photo[_cells(y0, y1, side), _cells(x0, x1, side), int(number)]
            np.maximum(shown, score, out=shown)
    return torch.from_numpy(targets.reshape(len(photos), side * side, classes))


def _cells(low: float, high: float, side: int) -> slice:
    """Those whose centres are from `low` to `high`, of `side` from 0 to 1; at least one."""
    first, last = math.ceil(low * side - 0.5), math.floor(high * side - 0.5)
    if last < first:
        first = last = int((low + high) / 2 * side)
    return slice(max(0, min(first, side - 1)), max(0, min(last, side - 1)) + 1)
