"""Opens region features in whichever form they are kept, told by what the path is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from model.caption import Regions
from model.training.readers.region_hdf5 import Hdf5File
from model.training.readers.region_npz import NpzFolder
from model.training.readers.region_tsv import TsvFiles

_TSV = re.compile(r".*\.tsv(\.\d+)?")


class RegionStore(Protocol):
    """Regions of photos by key (`photo_keys`)."""

    def find(self, keys: Sequence[str]) -> str | None:
        """The first of the keys that there are regions for."""

    def where(self, key: str) -> str:
        """Where they are, for messages."""

    def read(self, key: str) -> Regions:
        """Raises `ValueError` naming the place for what is not regions."""


def open_regions(path: Path) -> RegionStore:
    """A folder of `.npz`, an HDF5 file, a `.tsv`, or a folder with `.tsv` files in it.

    Raises `FileNotFoundError` for a path that is not there, `ValueError` for one of another kind.
    """
    if path.is_dir():
        lines = sorted(entry for entry in path.iterdir() if _TSV.fullmatch(entry.name))
        return TsvFiles(lines) if lines else NpzFolder(path)
    if not path.exists():
        raise FileNotFoundError(f"there are no region features at {path}")
    if path.suffix.lower() in (".hdf5", ".h5"):
        return Hdf5File(path)
    if _TSV.fullmatch(path.name):
        return TsvFiles([path])
    raise ValueError(f"{path} is no folder of .npz, no .hdf5 and no .tsv")
