"""One split of a captioned data set, looked at once by a bundle's extractor: what is evaluated and calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.caption import Regions
from model.captioner import Captioner
from model.training.data import read_captions
from model.training.photos import look_at


@dataclass(frozen=True)
class EvaluationSet:
    """Photos of a split with their regions and human captions, in the order of the caption file."""

    names: tuple[str, ...]
    regions: tuple[Regions, ...]
    references: tuple[Sequence[Sequence[str]], ...]  # photos x captions x words
    numbers: tuple[int | None, ...] = ()  # COCO's ids


def look_at_split(
    captioner: Captioner, captions: Path, photos: Path, split: str, limit: int | None = None
) -> EvaluationSet:
    """Raises `ValueError` for an unreadable caption file or a split without photos, `FileNotFoundError` for photos."""
    chosen = [photo for photo in read_captions(captions) if photo.split == split][:limit]
    if not chosen:
        raise ValueError(f"{captions} has no photos in the split {split!r}")
    names = tuple(photo.name for photo in chosen)
    regions = look_at(photos, names, captioner.look_at_pixels)
    return EvaluationSet(
        names,
        tuple(regions),
        tuple(photo.captions for photo in chosen),
        tuple(photo.number for photo in chosen),
    )
