"""The photos that a command line means: files as they are named, folders as the photos within; and their pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from service.images import ImageLimits

PHOTO_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class UnreadableError(Exception):
    """A file of which no picture can be made; the message says why."""


def read_photo(path: Path, limits: ImageLimits, sufficient_side: int = 0) -> Image.Image:
    """The picture in the file, as `service.images.decode` gives it. Raises `UnreadableError`."""
    from service.errors import Problem
    from service.images import decode

    try:
        return decode(path.read_bytes(), limits, sufficient_side)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    except Problem as error:
        raise UnreadableError(str(error)) from error


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """Each photo once, in the order named and by name within a folder.

    A file is taken whatever its name; a folder gives the files in it and below it that end like a photo, hidden
    ones left out. Raises `FileNotFoundError`, with a message to show, for a path that does not exist and for
    folders without any photo.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        found.update(dict.fromkeys(_photos_below(path) if path.is_dir() else [path]))
    if not found:
        raise FileNotFoundError(f"no photo in {', '.join(map(str, paths))} ({', '.join(sorted(PHOTO_SUFFIXES))})")
    return list(found)


def _photos_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in PHOTO_SUFFIXES and not hidden and path.is_file():
            yield path
