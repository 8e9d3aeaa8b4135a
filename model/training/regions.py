"""Regions of the training photos by row number: from the kept lower-trunk features, through the upper trunk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.batching import stack_regions
from model.bottom_up.extractor import Extractor
from model.bottom_up.grid import cells, grid_boxes
from model.bottom_up.trunk import HEAD_WIDTH, Trunk
from model.training.features import CROPPED_FLIPPED, FLIPPED, FULL, GRID, view_pixels
from model.training.photos import iterate_photos
from model.training.readers.keys import photo_keys
from model.training.readers.open_regions import open_regions
from model.training.readers.region_npz import NpzFolder


@dataclass(frozen=True)
class PhotoRows:
    """Kept lower-trunk features of several data sets, read as one list of photos."""

    names: tuple[str, ...]
    parts: tuple[np.ndarray, ...]  # each float16 (photos, views, 120, 18, 18)

    def __post_init__(self) -> None:
        if len(self.names) != sum(len(part) for part in self.parts):
            raise ValueError("a name for every photo")

    def bottom(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """float32 `(len(rows), 120, 18, 18)`."""
        found = [self._one(row)[view] for row, view in zip(rows, views, strict=True)]
        return torch.from_numpy(np.stack(found)).float().to(memory_format=torch.channels_last)

    def views(self, row: int) -> int:
        """How many views of the photo are kept."""
        return len(self._one(row))

    def _one(self, row: int) -> np.ndarray:
        for part in self.parts:
            if row < len(part):
                return part[row]
            row -= len(part)
        raise IndexError("no such photo")


@dataclass(frozen=True)
class PhotoSource:
    """Where the pixels of photos are."""

    folder: Path
    names: tuple[str, ...]


def mirrored(view: int) -> bool:
    """Whether left and right have changed places in this view."""
    return view in (FLIPPED, CROPPED_FLIPPED)


class KeptRegions:
    """float16 region features of every photo, whole and mirrored, for stages that leave the trunk alone."""

    def __init__(self, features: np.ndarray) -> None:
        """`(photos, 2, 81, 1280)`."""
        self.features = features

    @classmethod
    def through_trunk(cls, photos: PhotoRows, trunk: Trunk, folder: Path, batch: int = 32) -> KeptRegions:
        """From the kept lower-trunk features, once for each trunk: the file in `folder` serves all its runs."""
        path = folder / f"regions-{_fingerprint(photos, trunk)}.npy"
        if path.exists():
            return cls(np.load(path, mmap_mode="r"))
        part = path.with_suffix(".part")  # renamed when it is whole: an interrupted run leaves no half file behind
        kept = cls(np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=_shape(photos)))
        for view in (FULL, FLIPPED):
            having = [row for row in range(len(photos.names)) if photos.views(row) > view]
            for start in tqdm(range(0, len(having), batch), desc="regions, " + ("whole", "mirrored")[view]):
                rows = having[start : start + batch]
                bottom = photos.bottom(rows, [view] * len(rows))
                with torch.inference_mode():
                    regions = cells(trunk.top(bottom.to(next(trunk.parameters()).device)))
                kept.features[rows, view] = regions.cpu().numpy()
        part.rename(path)
        return kept

    @classmethod
    def through_extractor(cls, photos: PhotoRows, sources: Sequence[PhotoSource], extractor: Extractor) -> KeptRegions:
        """As served: from the pixels. Raises `FileNotFoundError` for photos that are not there."""
        kept = cls(np.zeros(_shape(photos), dtype=np.float16))
        row_of = {name: row for row, name in enumerate(photos.names)}
        for source in sources:
            found = iterate_photos(source.folder, set(source.names))
            for name, pixels in tqdm(found, total=len(source.names), desc=f"regions, {source.folder.name}"):
                row = row_of[name]
                views = [view_pixels(pixels, view, row) for view in (FULL, FLIPPED) if view < photos.views(row)]
                for view, regions in enumerate(extractor.look_at_pixels(np.stack(views))):
                    kept.features[row, view] = regions.features
        return kept

    def __call__(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """float32 `(len(rows), 81, 1280)`."""
        return torch.from_numpy(self.features[list(rows), list(views)]).float()


def _shape(photos: PhotoRows) -> tuple[int, ...]:
    return len(photos.names), 2, (GRID // 2) ** 2, HEAD_WIDTH


def _fingerprint(photos: PhotoRows, trunk: Trunk) -> str:
    """Of what the regions come from: the photos' names and the trunk's weights."""
    digest = hashlib.sha256(json.dumps(photos.names).encode())
    for name, value in trunk.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


class RegionFiles:
    """Regions extracted beforehand, by row of the photo; whichever form `open_regions` knows, `.npz` files first."""

    def __init__(self, path: Path, names: Sequence[str], numbers: Sequence[int | None] | None = None) -> None:
        """`numbers`: COCO's ids of the photos, for features filed by them.

        Raises `FileNotFoundError` naming photos without features, `ValueError` for a first file that is not one.
        """
        self.store = open_regions(path)
        numbered = zip(names, numbers or [None] * len(names), strict=True)
        keys = [(name, self.store.find(photo_keys(name, number))) for name, number in numbered]
        missing = [name for name, key in keys if key is None]
        if missing:
            first = f"{Path(missing[0]).stem}.npz" if isinstance(self.store, NpzFolder) else missing[0]
            raise FileNotFoundError(f"{len(missing)} photos have no features in {path}: {first}, ...")
        self.keys = [key for _, key in keys if key is not None]
        self.feature_width = int(self.store.read(self.keys[0]).features.shape[1])

    def __call__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Features `(B, R, F)`, boxes `(B, R, 4)` and mask `(B, R)` of photos, padded to the most regions."""
        return stack_regions([self.store.read(self.keys[row]) for row in rows])


def boxes_for(images: int) -> Tensor:
    """`(images, 81, 4)`: the cells' boxes, the same for every photo."""
    return torch.from_numpy(grid_boxes(GRID // 2)).expand(images, -1, -1)
