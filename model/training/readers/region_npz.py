"""Regions kept as one `.npz` per photo, ours or those of the bottom-up attention repositories."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.caption import Regions
from model.training.readers.boxes import make_regions

FEATURES, BOXES = ("features", "x", "feat"), ("boxes", "bbox")


class NpzFolder:
    """`<stem>.npz` or `<COCO id>.npz` with `features (R, F)` and `boxes (R, 4)`; or, from bottom-up attention, `x`
    (also `(F, R)`, as its Caffe version writes it), `bbox` in pixels, `image_w`, `image_h`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, keys: Sequence[str]) -> str | None:
        """The first of the keys that there is a file for."""
        return next((key for key in keys if (self.folder / f"{key}.npz").exists()), None)

    def where(self, key: str) -> str:
        """The file, for messages."""
        return str(self.folder / f"{key}.npz")

    def read(self, key: str) -> Regions:
        """Raises `ValueError` naming a file that does not hold features and boxes."""
        path = self.folder / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as kept:
                names = set(kept.files)
                features = kept[next(name for name in FEATURES if name in names)]
                boxes = kept[next(name for name in BOXES if name in names)]
                size = (float(kept["image_w"]), float(kept["image_h"])) if {"image_w", "image_h"} <= names else None
            if features.ndim == 2 and len(features) != len(boxes) == features.shape[1]:
                features = features.T
            return make_regions(features, boxes, size)
        except StopIteration:
            raise ValueError(f"{path} does not hold features and boxes: it has {', '.join(sorted(names))}") from None
        except (LookupError, TypeError, ValueError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold features and boxes: {error}") from error
