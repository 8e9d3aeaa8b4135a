"""The sample photos: few, small, whole, and each with its source and licence written down."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

SAMPLES = Path(__file__).parents[1] / "samples"
PHOTOS = sorted(SAMPLES.glob("*.jpg"))


def test_there_are_one_to_four():
    assert 1 <= len(PHOTOS) <= 4


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.name)
def test_a_sample_is_small_whole_and_accounted_for(path):
    assert path.stat().st_size <= 100_000
    with Image.open(path) as image:
        image.load()
        assert max(image.size) <= 640
        assert not image.getexif()  # nothing about a camera or a place travels with it
    (row,) = [line for line in (SAMPLES / "README.md").read_text().splitlines() if f"`{path.name}`" in line]
    assert "CC0" in row or "Public domain" in row
