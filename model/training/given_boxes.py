"""Given boxes of photos, read from a file and turned with the view of the photo that is trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.training.features import view_boxes
from model.training.region_loss import Given

SMALLEST_REST = 0.4  # of a box's area that a crop must leave for it still to be taught


@dataclass(frozen=True)
class GivenBoxes:
    """`of[name]`: float32 `(G, 6)` rows of x0, y0, x1, y1 relative to the photo, class number, score."""

    classes: tuple[str, ...]
    of: dict[str, np.ndarray]


def read_boxes(path: Path) -> GivenBoxes:
    """`{"classes": [...], "boxes": {"folder/name.jpg": [[x0, y0, x1, y1, class, score], ...]}}`.

    Photos are known by their file name alone. Raises `ValueError` saying what is wrong with the file,
    `FileNotFoundError` when it is not there.
    """
    try:
        told = json.loads(path.read_text())
        classes = tuple(str(name) for name in told["classes"])
        of = {Path(name).name: np.array(rows, dtype=np.float32).reshape(-1, 6) for name, rows in told["boxes"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of boxes: {error!r}") from error
    for name, rows in of.items():
        numbers = rows[:, 4]
        if not np.isfinite(rows).all() or (rows[:, :4] < 0).any() or (rows[:, [0, 1, 5]] > 1).any():
            raise ValueError(f"{path}: boxes of {name} are not within the photo, or scores not from 0 to 1")
        if (rows[:, 2:4] <= rows[:, :2]).any():
            raise ValueError(f"{path}: a box of {name} ends before it begins, or holds nothing")
        if (numbers != numbers.round()).any() or (numbers < 0).any() or (numbers >= len(classes)).any():
            raise ValueError(f"{path}: a box of {name} is of no class from 0 to {len(classes) - 1}")
    return GivenBoxes(classes, of)


def count_with_boxes(given: GivenBoxes, names: Iterable[str]) -> int:
    """How many of the photos have boxes. Not every photo needs some, but a file of none is another data set's."""
    return sum(name in given.of for name in names)


def pad_boxes(found: Sequence[np.ndarray]) -> Given:
    """Boxes of several photos, each `(G, 6)` -> one batch, padded to the most of them, at least one."""
    most = max(1, *(len(rows) for rows in found))
    padded = np.zeros((len(found), most, 6), dtype=np.float32)
    for photo, rows in enumerate(found):
        padded[photo, : len(rows)] = rows
    whole = torch.from_numpy(padded)
    return Given(whole[..., :4].clamp(0, 1), whole[..., 4].long(), whole[..., 5])


def in_view(rows: np.ndarray, view: int, seed: int) -> np.ndarray:
    """`(G, 6)` of a photo -> those of which enough is seen in its view, as far as they are seen there."""
    whole = view_boxes(rows[:, :4], view, seed)
    seen = whole.clip(0.0, 1.0)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (seen, whole)]
    return np.concatenate((seen, rows[:, 4:]), 1)[areas[0] >= SMALLEST_REST * areas[1]]
