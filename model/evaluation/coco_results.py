"""Captions as MS COCO's evaluation server takes them: a JSON list of `{"image_id", "caption"}`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def write_coco_results(
    path: Path, names: Sequence[str], numbers: Sequence[int | None], captions: Sequence[Sequence[str]]
) -> None:
    """`captions`: photos x words; `numbers`: COCO's ids. The server wants the whole split in one file, each id once.

    Raises `ValueError` for photos without an id, or with one that another photo has.
    """
    without = [name for name, number in zip(names, numbers, strict=True) if number is None]
    if without:
        raise ValueError(f"{len(without)} photos have no COCO id in the caption file: {without[0]}, ...")
    if len(set(numbers)) != len(numbers):
        raise ValueError("two photos have the same COCO id")
    results = [
        {"image_id": number, "caption": " ".join(words)} for number, words in zip(numbers, captions, strict=True)
    ]
    path.write_text(json.dumps(results) + "\n")
