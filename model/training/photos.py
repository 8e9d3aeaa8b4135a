"""Photos of a data set, by name, from a folder of image files or of tar archives."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from model.bottom_up.preprocess import to_pixels
from model.caption import Regions

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
LOOK_BATCH = 16  # photos


def iterate_photos(folder: Path, names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields `(name, uint8 (224, 224, 3))` for each of `names` found in `folder`, plain files before archives.

    Raises `FileNotFoundError` at the end if any name was not found, naming the first few.
    """
    missing = set(names)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.suffix.lower() in SUFFIXES and path.name in missing:
            missing.discard(path.name)
            with Image.open(path) as image:
                yield path.name, to_pixels(image)
        elif path.suffix == ".tar":
            with tarfile.open(path) as archive:
                for member in archive:
                    name = Path(member.name).name
                    if not member.isfile() or name not in missing:
                        continue
                    missing.discard(name)
                    stream = archive.extractfile(member)
                    assert stream is not None  # it is a file
                    with Image.open(io.BytesIO(stream.read())) as image:
                        yield name, to_pixels(image)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise FileNotFoundError(f"{len(missing)} photos are not in {folder}: {some}, ...")


def in_batches(
    photos: Iterable[tuple[str, np.ndarray]], size: int = LOOK_BATCH
) -> Iterator[list[tuple[str, np.ndarray]]]:
    """The same in lists of `size`, the last perhaps shorter."""
    rest = iter(photos)
    while batch := list(islice(rest, size)):
        yield batch


def look_at(folder: Path, names: Sequence[str], look: Callable[[np.ndarray], Sequence[Regions]]) -> list[Regions]:
    """The regions of each of `names`, in their order. `look`: uint8 `(B, 224, 224, 3)` -> regions of B photos.

    Raises `FileNotFoundError` where a photo is not in `folder`.
    """
    found: dict[str, Regions] = {}
    for batch in in_batches(tqdm(iterate_photos(folder, set(names)), total=len(names), desc="looking")):
        of_batch = look(np.stack([pixels for _, pixels in batch]))
        found.update(zip([name for name, _ in batch], of_batch, strict=True))
    return [found[name] for name in names]


def photo_names(folder: Path) -> list[str]:
    """Names of all photos in a folder, its sub-folders and archives, sorted. `FileNotFoundError` when there is none."""
    names: set[str] = set()
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES:
            names.add(path.name)
        elif path.suffix == ".tar":
            with tarfile.open(path) as archive:
                names.update(Path(member.name).name for member in archive if member.isfile())
    names = {name for name in names if Path(name).suffix.lower() in SUFFIXES}
    if not names:
        raise FileNotFoundError(f"no photos in {folder}")
    return sorted(names)
