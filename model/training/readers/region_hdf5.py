"""Regions kept in one HDF5 file, as M2 (Cornia et al. 2020) publishes them: `coco_detections.hdf5`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.caption import Regions
from model.training.readers.boxes import make_regions


class Hdf5File:
    """Data sets `<id>_features (R, F)` and `<id>_boxes (R, 4)`, the boxes in pixels; `<id>` is COCO's, or the stem."""

    def __init__(self, path: Path) -> None:
        """Raises `ValueError` for a file that is no HDF5, `ModuleNotFoundError` without h5py."""
        try:
            import h5py
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("HDF5 features need h5py: pip install '.[train]'") from error
        self.path = path
        try:
            self._file: Any = h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path} is not an HDF5 file: {error}") from error

    def find(self, keys: Sequence[str]) -> str | None:
        """The first of the keys that the file has features of."""
        return next((key for key in keys if f"{key}_features" in self._file), None)

    def where(self, key: str) -> str:
        """The file and the data set, for messages."""
        return f"{self.path}, {key}_features"

    def read(self, key: str) -> Regions:
        """Raises `ValueError` naming what is not `(R, F)` and `(R, 4)`, or not there."""
        try:
            return make_regions(self._file[f"{key}_features"][()], self._file[f"{key}_boxes"][()])
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            raise ValueError(f"{self.where(key)}: {error}") from error
