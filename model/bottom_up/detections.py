"""Regions of a detector that also names what it sees: a probability for each object class and each attribute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.caption import Regions


@dataclass(frozen=True)
class Detections(Regions):
    """Regions with what the detector takes them for; class and attribute 0 are "none of these"."""

    class_probabilities: np.ndarray  # float32 (R, classes), background first
    attribute_probabilities: np.ndarray | None = None  # float32 (R, attributes), "no attribute" first

    @property
    def classes(self) -> np.ndarray:
        """int64 `(R,)`: the likeliest object of each region, 0 being the first line of the vocabulary."""
        return np.argmax(self.class_probabilities[:, 1:], axis=1)

    @property
    def scores(self) -> np.ndarray:
        """float32 `(R,)`: probabilities of `classes`."""
        return np.max(self.class_probabilities[:, 1:], axis=1)

    @property
    def named(self) -> np.ndarray:
        """bool `(R,)`: which name anything at all. The large cells that a region head adds have chances of zero."""
        return self.scores > 0
