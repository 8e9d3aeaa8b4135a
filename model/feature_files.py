"""Region features of photos in files, as captioning code expects them: an `.npz` per photo, or one HDF5 file.

`docs/regions.md` describes both. What is written says which extractor saw it, and is never mixed with another's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from model.bottom_up.detections import Detections
from model.caption import Regions
from model.training.readers.keys import photo_keys

FORMAT = 1
ABOUT = "features.json"  # beside the .npz files
FORMATS = ("npz", "hdf5")
HDF5_SUFFIXES = (".hdf5", ".h5")


class FeatureFilesError(ValueError):
    """What is there, or is to be written, cannot be: another extractor's features, files of others, equal names."""


class FeatureFiles(Protocol):
    """Where features go. Photos are known by their names."""

    def has(self, photo: Path) -> bool:
        """Whether the photo's features are there already, whole."""

    def write(self, photo: Path, regions: Regions, size: tuple[int, int]) -> None:
        """`size`: width and height of the upright photo in pixels. What was written is there whole, or not at all."""

    def close(self) -> None: ...


def open_feature_files(path: Path, kind: str, revision: str, photos: Sequence[Path]) -> FeatureFiles:
    """A folder of `.npz` or an HDF5 file for these photos, new or to be continued.

    Raises `FeatureFilesError` where it has features of another extractor, is something else, or where two photos would
    go by one name; `ModuleNotFoundError` for HDF5 without h5py.
    """
    names = hdf5_id if kind == "hdf5" else npz_name
    taken: dict[str, Path] = {}
    for photo in photos:
        other = taken.setdefault(names(photo), photo)
        if other != photo:
            raise FeatureFilesError(f"{other} and {photo} would both be {names(photo)}: extract them apart")
    return Hdf5Features(path, revision) if kind == "hdf5" else NpzFeatures(path, revision)


def npz_name(photo: Path) -> str:
    """`a/b.jpg` -> `b.npz`."""
    return f"{photo.stem}.npz"


def hdf5_id(photo: Path) -> str:
    """COCO's number where the name has it (`COCO_val2014_000000391895.jpg` -> `391895`), else the name's stem."""
    return photo_keys(photo.name)[-1]


def _about(revision: str) -> dict[str, Any]:
    return {"format": FORMAT, "extractor": revision}


def _check_about(found: dict[str, Any], revision: str, path: Path) -> None:
    if found.get("format") != FORMAT:
        raise FeatureFilesError(f"{path} has features of format {found.get('format')}; this version writes {FORMAT}")
    if found.get("extractor") != revision:
        raise FeatureFilesError(
            f"{path} has features of extractor {found.get('extractor')}, and this one is {revision}: write elsewhere"
        )


class NpzFeatures:
    """A folder with `<stem>.npz` per photo and `features.json`, which says what extractor they are of."""

    def __init__(self, folder: Path, revision: str) -> None:
        """Makes the folder. Raises `FeatureFilesError` for one with other features in it."""
        self._folder, self._revision = folder, revision
        about = folder / ABOUT
        if folder.exists() and not folder.is_dir():
            raise FeatureFilesError(f"{folder} is a file, not a folder")
        if about.exists():
            try:
                found = json.loads(about.read_text())
                assert isinstance(found, dict)
            except (ValueError, AssertionError) as error:
                raise FeatureFilesError(f"{about} is not what `deecap extract` writes") from error
            _check_about(found, revision, folder)
            return
        if any(folder.glob("*.npz")):
            raise FeatureFilesError(
                f"{folder} has .npz files but no {ABOUT}: nobody can say what extractor they are of"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(about, json.dumps(_about(revision), indent=1).encode() + b"\n")

    def has(self, photo: Path) -> bool:
        return (self._folder / npz_name(photo)).exists()

    def write(self, photo: Path, regions: Regions, size: tuple[int, int]) -> None:
        arrays = {
            "features": regions.features.astype(np.float32),
            "boxes": regions.boxes.astype(np.float32),
            "size": np.array(size, np.int32),
            "extractor": np.array(self._revision),
        }
        if isinstance(regions, Detections):
            arrays["classes"] = regions.classes.astype(np.int32)
            arrays["scores"] = regions.scores.astype(np.float32)
            if regions.attribute_probabilities is not None:
                arrays["attributes"] = np.argmax(regions.attribute_probabilities[:, 1:], 1).astype(np.int32)
                arrays["attribute_scores"] = np.max(regions.attribute_probabilities[:, 1:], 1).astype(np.float32)
        target = self._folder / npz_name(photo)
        unfinished = target.with_name(target.name + ".part")
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its one keyword of another type is not among these
        os.replace(unfinished, target)

    def close(self) -> None:
        pass


class Hdf5Features:
    """`<id>_features`, `<id>_boxes` in pixels, `<id>_size`, and `<id>_cls_prob` where the extractor names classes.

    The layout of M2's `coco_detections.hdf5` (Cornia et al. 2020). Format and extractor are attributes of the file.
    """

    def __init__(self, path: Path, revision: str) -> None:
        """Makes the file. Raises `FeatureFilesError` for another there."""
        try:
            import h5py
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("HDF5 needs h5py: pip install '.[train]', or write .npz files") from error
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file: Any = h5py.File(path, "a")
        except OSError as error:
            raise FeatureFilesError(f"{path} is no HDF5 file that can be continued: {error}") from error
        try:
            if new:
                self._file.attrs.update(_about(revision))
                self._file.flush()
            _check_about(dict(self._file.attrs), revision, path)
        except FeatureFilesError:
            self._file.close()
            raise

    def has(self, photo: Path) -> bool:
        return f"{hdf5_id(photo)}_features" in self._file

    def write(self, photo: Path, regions: Regions, size: tuple[int, int]) -> None:
        arrays = {
            "boxes": regions.boxes.astype(np.float32) * np.array([*size, *size], np.float32),
            "size": np.array(size, np.int32),
        }
        if isinstance(regions, Detections):
            arrays["cls_prob"] = regions.class_probabilities.astype(np.float32)
        arrays["features"] = regions.features.astype(np.float32)  # last: by them `has` knows that all are there
        for name, values in arrays.items():
            where = f"{hdf5_id(photo)}_{name}"
            if where in self._file:  # of a run that was stopped half-way
                del self._file[where]
            self._file.create_dataset(where, data=values)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
