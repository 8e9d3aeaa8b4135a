"""Arrays as people keep them -> `Regions`: boxes relative to the photo, shapes checked."""

from __future__ import annotations

import numpy as np

from model.caption import Regions

LARGEST_RELATIVE = 1.5  # boxes whose coordinates all are below are relative already; pixels go far beyond


def make_regions(features: np.ndarray, boxes: np.ndarray, size: tuple[float, float] | None = None) -> Regions:
    """`features (R, F)` and `boxes (R, 4)`, x0 y0 x1 y1 -> regions with relative boxes, float32, in the same order.

    Boxes in pixels are divided by `size`, the photo's width and height. Where the source does not tell it (M2's
    HDF5 does not), by the right-most and lowest edge of any box, which in bottom-up features is within a few pixels
    of the photo's. Raises `ValueError` for other shapes, no regions, or numbers that are not finite.
    """
    features, boxes = np.asarray(features, np.float32), np.asarray(boxes, np.float32)
    if features.ndim != 2 or boxes.shape != (len(features), 4):
        raise ValueError(f"features must be (R, F) and boxes (R, 4), not {features.shape} and {boxes.shape}")
    if not features.size:
        raise ValueError("no regions")
    if not (np.isfinite(features).all() and np.isfinite(boxes).all()):
        raise ValueError("features or boxes hold numbers that are not finite")
    if boxes.max() > LARGEST_RELATIVE:
        width, height = size or (boxes[:, 2].max(), boxes[:, 3].max())
        if not (width > 0 and height > 0):
            raise ValueError(f"a photo of {width} x {height} pixels")
        boxes = boxes / np.array([width, height, width, height], np.float32)
    return Regions(np.clip(boxes, 0.0, 1.0), features)
