"""Regions kept as lines of base64, as the authors of bottom-up attention publish them: `*.tsv`, `*.tsv.0`, ..."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.caption import Regions
from model.training.readers.boxes import make_regions

COLUMNS = 6  # image_id, image_w, image_h, num_boxes, boxes, features; the last two base64 of float32


class TsvFiles:
    """One file or several. They are read through once, at the start, for where each photo's line is."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises `ValueError` for a line that does not begin with an id."""
        self._lines: dict[str, tuple[Path, int]] = {}
        for path in paths:
            with path.open("rb") as file:
                start = 0
                for number, line in enumerate(file, start=1):
                    key, tab, _ = line.partition(b"\t")
                    if not tab or not key or len(key) > 200:
                        raise ValueError(f"{path}, line {number}: not a line of tab-separated features")
                    self._lines[key.decode(errors="replace")] = (path, start)
                    start += len(line)

    def find(self, keys: Sequence[str]) -> str | None:
        """The first of the keys that there is a line for."""
        return next((key for key in keys if key in self._lines), None)

    def where(self, key: str) -> str:
        """The file and the photo's id, for messages."""
        return f"{self._lines[key][0]}, image_id {key}"

    def read(self, key: str) -> Regions:
        """Raises `ValueError` naming a line that does not hold what its columns say."""
        path, start = self._lines[key]
        with path.open("rb") as file:
            file.seek(start)
            columns = file.readline().rstrip(b"\r\n").split(b"\t")
        try:
            if len(columns) != COLUMNS:
                raise ValueError(f"{len(columns)} columns, not {COLUMNS}")
            width, height, count = (int(column) for column in columns[1:4])
            boxes = np.frombuffer(base64.b64decode(columns[4], validate=True), np.float32).reshape(count, 4)
            features = np.frombuffer(base64.b64decode(columns[5], validate=True), np.float32).reshape(count, -1)
            return make_regions(features, boxes, (width, height))
        except ValueError as error:
            raise ValueError(f"{self.where(key)}: {error}") from error
