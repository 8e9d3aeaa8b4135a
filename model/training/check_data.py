"""What is wrong with a data folder, all of it, before training starts on it."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from model.training.data import Photo, coco_photos, is_coco
from model.training.from_bundle import read_start, with_new_words
from model.training.given_boxes import count_with_boxes, read_boxes
from model.training.photos import SUFFIXES, photo_names
from model.training.readers.keys import photo_keys
from model.training.readers.open_regions import RegionStore, open_regions
from model.training.settings import TrainSettings
from model.vocabulary import SPECIAL, Vocabulary, tokenise

SPLITS = ("train", "restval", "val", "test")
TINY = (32, 32)  # pixels; a JPEG decoded this small is read to its end, at a fraction of the cost


@dataclass
class DataReport:
    """`problems` one line each, in the order in which they were found; `facts` what there is, for the reader."""

    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def check_data(settings: TrainSettings, data: Path, quick: bool = False) -> DataReport:
    """Looks at all that the settings would read of the folder `data`. Raises nothing for what is wrong there.

    With `quick` photos and features must be there, but are not opened.
    """
    report = DataReport()
    told = settings.data
    photos = _captions(data / told.captions, report)
    wanted = [photo for photo in photos if photo.split in ("train", "val")]
    extra: list[Photo] = []
    if told.extra_captions:
        extra = [photo for photo in _captions(data / told.extra_captions, report) if photo.split == "train"]
    _splits(settings, [*wanted, *extra], report)
    if told.region_features:
        _features(data / told.region_features, [*wanted, *extra], report, quick)
    else:
        _photos(data / told.photos, [photo.name for photo in wanted], report, quick)
        if extra:
            _photos(data / told.extra_photos, [photo.name for photo in extra], report, quick)
        if told.unlabelled_photos:
            _photos(data / told.unlabelled_photos, None, report, quick)
    if told.boxes:
        _boxes(settings, data, [*wanted, *extra], report)
    return report


def _boxes(settings: TrainSettings, data: Path, photos: Sequence[Photo], report: DataReport) -> None:
    path = data / settings.data.boxes
    try:
        given = read_boxes(path)
    except FileNotFoundError:
        report.problems.append(f"{path}: not there")
        return
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
        return
    known = count_with_boxes(given, [photo.name for photo in photos if photo.split in ("train", "restval")])
    if photos and not known:
        report.problems.append(f"{path}: boxes of none of the photos in the split train")
    report.facts.update(train_photos_with_boxes=known)
    wanted = max(stage.cell_class_photos for stage in settings.stages)
    if wanted and settings.data.unlabelled_photos:
        with suppress(FileNotFoundError):  # no photos at all are told of where they are looked for
            more = count_with_boxes(given, photo_names(data / settings.data.unlabelled_photos))
            if more < wanted:
                report.problems.append(
                    f"{path}: boxes of {more} photos without captions, cell_class_photos are {wanted}"
                )


# Captions ----------------------------------------------------------------------------------------------------------


def _captions(path: Path, report: DataReport) -> list[Photo]:
    """The photos of a caption file that can be read, whatever is wrong with the others."""
    try:
        told = json.loads(path.read_text())
        images = told["images"]
        if not isinstance(images, list):
            raise TypeError("`images` is no list")
        photos = coco_photos(told) if is_coco(told) else list(_karpathy(path, images, report))
    except FileNotFoundError:
        report.problems.append(f"{path}: not there")
        return []
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        report.problems.append(f"{path}: neither Karpathy's form nor COCO's: {error!r}")
        return []
    if not photos:
        report.problems.append(f"{path}: no photos")
    _names(path, photos, report)
    for photo in photos:
        if photo.split != "test" and not photo.captions:
            report.problems.append(f"{path}: {photo.name} has no captions")
        for number, caption in enumerate(photo.captions, start=1):
            if not caption:
                report.problems.append(f"{path}: {photo.name}, caption {number} is empty")
    return photos


def _karpathy(path: Path, images: Sequence[Any], report: DataReport) -> Iterator[Photo]:
    for number, image in enumerate(images, start=1):
        where = f"{path}: image {number}"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str) or not image["filename"]:
            report.problems.append(f"{where} has no filename")
            continue
        name, split = image["filename"], image.get("split", "train")
        if split not in SPLITS:
            report.problems.append(f"{where}, {name}: split {split!r} is none of {', '.join(SPLITS)}")
            continue
        captions = []
        sentences = image.get("sentences")
        for place, sentence in enumerate(sentences if isinstance(sentences, list) else [], start=1):
            words = _words(sentence)
            if words is None:
                report.problems.append(f"{where}, {name}: caption {place} has neither tokens, a list of words, nor raw")
            else:
                captions.append(words)
        yield Photo(name, "train" if split == "restval" else split, tuple(captions), image.get("cocoid"))


def _words(sentence: Any) -> tuple[str, ...] | None:
    if not isinstance(sentence, dict):
        return None
    tokens = sentence.get("tokens")
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        return tuple(token.lower() for token in tokens)
    raw = sentence.get("raw")
    return tuple(tokenise(raw)) if isinstance(raw, str) and tokens is None else None


def _names(path: Path, photos: Iterable[Photo], report: DataReport) -> None:
    """Photos are found by file name, and features by its stem: both must be one photo's alone."""
    times = Counter(photo.name for photo in photos)
    splits: dict[str, set[str]] = {}
    for photo in photos:
        splits.setdefault(photo.name, set()).add(photo.split)
    for name, count in times.items():
        if count > 1:
            both = f", in the splits {' and '.join(sorted(splits[name]))}" if len(splits[name]) > 1 else ""
            report.problems.append(f"{path}: {name} is there {count} times{both}")
    stems: dict[str, str] = {}
    for name in times:
        other = stems.setdefault(Path(name).stem, name)
        if other != name:
            report.problems.append(f"{path}: {other} and {name} differ in their endings alone")


def _splits(settings: TrainSettings, photos: Sequence[Photo], report: DataReport) -> None:
    counts = Counter(photo.split for photo in photos)
    report.facts.update(train_photos=counts["train"], val_photos=counts["val"])
    if not counts["val"]:
        report.problems.append(f"{settings.data.captions}: no photos in the split val, which chooses the best epoch")
    largest = max(stage.batch_images for stage in settings.stages)
    if counts["train"] < largest:
        report.problems.append(
            f"{settings.data.captions}: {counts['train']} photos in the split train, a batch has {largest}"
        )
    captions = [caption for photo in photos if photo.split == "train" for caption in photo.captions]
    vocabulary = Vocabulary.build(captions, settings.least_count)
    if settings.seen_through:
        try:
            start = read_start(settings.seen_through).vocabulary
        except (ValueError, FileNotFoundError) as error:
            report.problems.append(str(error))
        else:
            if settings.starts_from_bundle:
                vocabulary = with_new_words(start, captions, settings.least_count)
                report.facts.update(new_words=len(vocabulary) - len(start))
    known = set(vocabulary.words)
    words = [word for caption in captions for word in caption]
    report.facts.update(
        train_captions=len(captions),
        vocabulary=len(vocabulary),
        unknown_words=sum(word not in known for word in words) / len(words) if words else 0.0,
    )
    if captions and len(vocabulary) == len(SPECIAL):
        report.problems.append(f"{settings.data.captions}: no word is seen {settings.least_count} times")


# Photos ------------------------------------------------------------------------------------------------------------


def _photos(folder: Path, names: Sequence[str] | None, report: DataReport, quick: bool) -> None:
    """`names` of the photos that must be there; None: whichever there are, and at least one."""
    if not folder.is_dir():
        report.problems.append(f"{folder}: no such folder of photos")
        return
    wanted = None if names is None else set(names)
    found: dict[str, str] = {}
    for name, where, open_it in _image_files(folder, report):
        if wanted is not None and name not in wanted:
            continue
        if name in found:
            report.problems.append(f"{folder}: {name} is both in {found[name]} and in {where}")
            continue
        found[name] = where
        if not quick:
            _decode(where, open_it, report)
    if wanted is None and not found:
        report.problems.append(f"{folder}: no photos")
    for name in dict.fromkeys(names or ()):
        if name not in found:
            report.problems.append(f"{folder}: {name} is not there")


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


def _read_whole(stream: IO[bytes]) -> IO[bytes]:
    return io.BytesIO(stream.read())


def _image_files(folder: Path, report: DataReport) -> Iterator[tuple[str, str, Callable[[], IO[bytes]]]]:
    """Name, place and a way to open it, of each photo in files, sub-folders and archives."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            yield path.name, str(path), partial(_open, path)
        elif path.suffix == ".tar":
            try:
                with tarfile.open(path) as archive:
                    for member in archive:
                        name = Path(member.name).name
                        if member.isfile() and Path(name).suffix.lower() in SUFFIXES:
                            stream = archive.extractfile(member)
                            assert stream is not None  # it is a file
                            yield name, f"{path}, {member.name}", partial(_read_whole, stream)
            except (tarfile.TarError, OSError, EOFError) as error:
                report.problems.append(f"{path}: not a whole archive: {error}")


def _decode(where: str, open_it: Callable[[], IO[bytes]], report: DataReport) -> None:
    try:
        with open_it() as stream, Image.open(stream) as image:
            image.draft("RGB", TINY)
            image.load()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        report.problems.append(f"{where}: cannot be read as a photo: {error}")


# Features ----------------------------------------------------------------------------------------------------------


def _features(path: Path, photos: Sequence[Photo], report: DataReport, quick: bool) -> None:
    try:
        store = open_regions(path)
    except (FileNotFoundError, ValueError, ModuleNotFoundError) as error:
        report.problems.append(f"{error}")
        return
    widths: dict[int, str] = {}
    regions: list[int] = []
    for photo in photos:
        key = store.find(photo_keys(photo.name, photo.number))
        if key is None:
            report.problems.append(f"{path}: no features of {photo.name}")
        elif not quick:
            _one_feature(store, key, widths, regions, report)
    if regions:
        report.facts.update(regions_least=min(regions), regions_most=max(regions))
    if widths:
        report.facts.update(feature_width=next(iter(widths)))


def _one_feature(store: RegionStore, key: str, widths: dict[int, str], regions: list[int], report: DataReport) -> None:
    try:
        seen = store.read(key)
    except ValueError as error:
        report.problems.append(str(error))
        return
    where, width = store.where(key), int(seen.features.shape[1])
    regions.append(len(seen.features))
    widths.setdefault(width, where)
    first = next(iter(widths))
    if width != first:
        report.problems.append(f"{where}: {width} numbers per region, where {widths[first]} has {first}")
    if not np.any(seen.features):
        report.problems.append(f"{where}: all features are 0")
    if (seen.boxes[:, 2:] < seen.boxes[:, :2]).any():
        report.problems.append(f"{where}: a box ends before it begins; boxes are x0, y0, x1, y1")
