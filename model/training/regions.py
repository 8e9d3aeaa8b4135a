"""Regions of the training photos by row number: from the kept lower-trunk features, through the upper trunk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
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
from model.training.features import CROPPED_FLIPPED, FLIPPED, FULL, GRID, bottom_features, view_pixels
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

    def seed(self, row: int) -> int:
        """What the photo's crops were drawn from: its number within its data set."""
        return self._find(row)[1]

    def _one(self, row: int) -> np.ndarray:
        part, within = self._find(row)
        return part[within]

    def _find(self, row: int) -> tuple[np.ndarray, int]:
        for part in self.parts:
            if row < len(part):
                return part, row
            row -= len(part)
        raise IndexError("no such photo")


@dataclass(frozen=True)
class PhotoSource:
    """Where the pixels of a data set's photos are, and under what name their lower-trunk features are kept."""

    folder: Path
    names: tuple[str, ...]
    source: str = ""  # caption file or folder, as the configuration names it
    views: int = 1  # of each photo, that are kept


@dataclass(frozen=True)
class PhotoList:
    """Photos of several data sets as one list, of which nothing but regions is kept: their extractor does not learn."""

    sources: tuple[PhotoSource, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for told in self.sources for name in told.names)

    def views(self, row: int) -> int:
        """How many views of the photo there are."""
        for told in self.sources:
            if row < len(told.names):
                return told.views
            row -= len(told.names)
        raise IndexError("no such photo")


def kept_rows(trunk: Trunk, sources: Sequence[PhotoSource], features: Path) -> PhotoRows:
    """The kept lower-trunk features of all photos, computed where they are not in the folder `features` yet."""
    parts = []
    for told in sources:
        cache = features / f"{told.source.replace('/', '-').removesuffix('.json')}.npy"
        parts.append(bottom_features(trunk, told.folder, told.names, told.views, cache))
    return PhotoRows(tuple(name for told in sources for name in told.names), tuple(parts))


def mirrored(view: int) -> bool:
    """Whether left and right have changed places in this view."""
    return view in (FLIPPED, CROPPED_FLIPPED)


class KeptRegions:
    """Regions of every photo, whole and mirrored, kept in a file, for stages that leave the trunk alone."""

    def __init__(self, features: np.ndarray, boxes: np.ndarray, counts: np.ndarray) -> None:
        """float16 `(photos, 2, R, F)`, float32 `(photos, 2, R, 4)`, and how many of the R there are, `(photos, 2)`."""
        self.features, self.boxes, self.counts = features, boxes, counts

    @classmethod
    def through_trunk(cls, photos: PhotoRows, trunk: Trunk, folder: Path, batch: int = 32) -> KeptRegions:
        """Grid cells from the kept lower-trunk features, once for each trunk: the file in `folder` serves all runs."""

        def look(kept: KeptRegions) -> None:
            for view in (FULL, FLIPPED):
                having = [row for row in range(len(photos.names)) if photos.views(row) > view]
                for start in tqdm(range(0, len(having), batch), desc="regions, " + ("whole", "mirrored")[view]):
                    rows = having[start : start + batch]
                    bottom = photos.bottom(rows, [view] * len(rows))
                    with torch.inference_mode():
                        regions = cells(trunk.top(bottom.to(next(trunk.parameters()).device)))
                    kept.features[rows, view] = regions.cpu().numpy()
            kept.boxes[:] = grid_boxes(GRID // 2)
            kept.counts[:] = (GRID // 2) ** 2

        weights = [value.detach().cpu().numpy().tobytes() for value in trunk.state_dict().values()]
        return cls._made_once(photos, folder, b"".join(weights), ((GRID // 2) ** 2, HEAD_WIDTH), look)

    @classmethod
    def through_extractor(
        cls, photos: PhotoRows | PhotoList, sources: Sequence[PhotoSource], path: Path, folder: Path, threads: int
    ) -> KeptRegions:
        """As served: from the pixels, by the extractor in the file `path`, once for each such file.

        Raises `FileNotFoundError` for photos that are not there.
        """
        extractor = Extractor(path, "cpu", threads)

        def look(kept: KeptRegions) -> None:
            first = 0
            for source in sources:
                row_of = {name: row for row, name in enumerate(source.names, start=first)}
                first += len(source.names)
                found = iterate_photos(source.folder, set(source.names))
                for name, pixels in tqdm(found, total=len(source.names), desc=f"regions, {source.folder.name}"):
                    row = row_of[name]
                    views = [view_pixels(pixels, view, row) for view in (FULL, FLIPPED) if view < photos.views(row)]
                    for view, regions in enumerate(extractor.look_at_pixels(np.stack(views))):
                        count = len(regions.features)
                        kept.features[row, view, :count] = regions.features
                        kept.boxes[row, view, :count] = regions.boxes
                        kept.counts[row, view] = count

        views = json.dumps([[len(source.names), source.views] for source in sources]).encode()
        size = extractor.most_regions, extractor.feature_width
        return cls._made_once(photos, folder, path.read_bytes() + views, size, look)

    @classmethod
    def _made_once(
        cls,
        photos: PhotoRows | PhotoList,
        folder: Path,
        seen_by: bytes,
        size: tuple[int, int],
        look: Callable[[KeptRegions], None],
    ) -> KeptRegions:
        """`seen_by`: what the regions come from, beside the photos; `size`: R and F."""
        digest = hashlib.sha256(json.dumps(photos.names).encode() + seen_by).hexdigest()[:12]
        path = folder / f"regions-{digest}.npy"
        where = path.with_suffix(".npz")
        if not where.exists():  # written last: without it the other is not whole
            folder.mkdir(parents=True, exist_ok=True)
            most, width = size
            features = np.lib.format.open_memmap(
                path, "w+", dtype=np.float16, shape=(len(photos.names), 2, most, width)
            )
            boxes = np.zeros((len(photos.names), 2, most, 4), dtype=np.float32)
            made = cls(features, boxes, np.zeros((len(photos.names), 2), dtype=np.int64))
            look(made)
            features.flush()
            part = path.with_suffix(".part.npz")
            np.savez(part, boxes=made.boxes, counts=made.counts)
            part.rename(where)
        with np.load(where) as saved:
            return cls(np.load(path, mmap_mode="r"), saved["boxes"], saved["counts"])

    def __call__(self, rows: Sequence[int], views: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """float32 features `(B, R, F)`, boxes `(B, R, 4)` and mask `(B, R)`, none where all have as many."""
        at = list(rows), list(views)
        counts = self.counts[at]
        most = int(counts.max())
        features = torch.from_numpy(self.features[at][:, :most]).float()
        mask = torch.arange(most) < torch.from_numpy(counts)[:, None]
        return features, torch.from_numpy(self.boxes[at][:, :most]), None if bool(mask.all()) else mask


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
