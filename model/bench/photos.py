"""The photos that are captioned in a measurement, as the bytes of their files."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image

from model.training.photos import SUFFIXES


def read_photos(folder: Path, count: int) -> list[bytes]:
    """The first `count` photos, by name, of the image files and tar archives in and below a folder.

    Fewer where there are no more. Raises `FileNotFoundError` for a folder without any, `ValueError` for a file that
    cannot be read as what its name says.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    photos: list[bytes] = []
    for name, data in _files(folder):
        try:
            with Image.open(BytesIO(data)) as image:
                image.load()
        except Exception as error:  # Pillow's plugins raise what they like
            raise ValueError(f"{name} cannot be read as a photo: {error}") from error
        photos.append(data)
        if len(photos) == count:
            break
    if not photos:
        raise FileNotFoundError(f"no photo in {folder} ({', '.join(sorted(SUFFIXES))}, or such in a .tar)")
    return photos


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            yield str(path), path.read_bytes()
        elif path.suffix.lower() == ".tar" and path.is_file():
            try:
                with tarfile.open(path) as archive:
                    for member in archive:
                        stream = archive.extractfile(member) if Path(member.name).suffix.lower() in SUFFIXES else None
                        if stream is not None:
                            yield f"{path}: {member.name}", stream.read()
            except tarfile.TarError as error:
                raise ValueError(f"{path} cannot be read as a tar archive: {error}") from error
