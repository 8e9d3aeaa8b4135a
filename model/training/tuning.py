"""Regions from a trunk that learns: maps of photos, zoomed into, and what its cells are taught besides captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.bottom_up.grid import cells
from model.bottom_up.trunk import Trunk
from model.training.augment import draw_windows, zoom
from model.training.cell_classes import CellClasses, SeenPart
from model.training.regions import PhotoRows
from model.training.settings import StageSettings

WHOLE = (0.0, 0.0, 1.0, 1.0)


class TrunkTuning:
    """What a batch of photos becomes while the trunk learns."""

    def __init__(
        self, trunk: Trunk, photos: PhotoRows, cell_classes: CellClasses | None, beside: Sequence[int]
    ) -> None:
        """`beside`: rows of photos that may be shown for what their cells are taught alone."""
        self.trunk, self.photos, self.cell_classes = trunk, photos, cell_classes
        self.beside = beside

    def look(
        self, stage: StageSettings, rows: Sequence[int], views: Sequence[int], random: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Cells `(B, 81, 1280)` of the photos `rows`, each in its view, with gradients; and the loss of what they show.

        What is drawn depends on the stage alone: one that zooms into nothing and teaches no cells draws nothing.
        """
        seen, seen_views = list(rows), list(views)
        if stage.cell_class_photos:
            more = random.choice(self.beside, stage.cell_class_photos, replace=False).tolist()
            seen += more
            seen_views += [int(random.integers(self.photos.views(row))) for row in more]
        bottom = self.photos.bottom(seen, seen_views).to(next(self.trunk.parameters()).device)
        windows = np.tile(WHOLE, (len(seen), 1))
        if stage.smallest_window < 1:
            windows = draw_windows(len(seen), stage.smallest_window, random)
            bottom = zoom(bottom, windows).contiguous(memory_format=torch.channels_last)
        features = cells(self.trunk.top(bottom))
        loss = features.new_zeros(())
        if self.cell_classes is not None and stage.cell_classes:
            parts = [
                SeenPart(self.photos.names[row], view, self.photos.seed(row), window)
                for row, view, window in zip(seen, seen_views, windows, strict=True)
            ]
            loss = stage.cell_classes * self.cell_classes.loss(features, parts)
        return features[: len(rows)], loss
