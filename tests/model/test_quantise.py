"""The extractor in int8: near the float one, half as large, and the same where bytes cannot be multiplied safely."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import model.bottom_up.extractor
from model.bottom_up.extractor import Extractor
from model.bottom_up.quantise import quantise_extractor
from model.bundle import EXTRACTOR
from tests.model.conftest import RandomBundle


def photos(count: int, seed: int) -> np.ndarray:
    """Blocks of colour: uint8 `(count, 224, 224, 3)`."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, 14, 14, 3), dtype=np.uint8)
    return blocks.repeat(16, axis=1).repeat(16, axis=2)


def features(extractor: Extractor, pixels: np.ndarray) -> np.ndarray:
    return np.stack([regions.features for regions in extractor.look_at_pixels(pixels)])


@pytest.fixture(scope="module")
def quantised(random_bundle: RandomBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / EXTRACTOR
    quantise_extractor(random_bundle.folder / EXTRACTOR, path, photos(12, seed=0))
    return path


def test_it_sees_nearly_the_same_in_half_the_bytes(random_bundle: RandomBundle, quantised: Path) -> None:
    source = random_bundle.folder / EXTRACTOR
    seen = photos(3, seed=1)
    exact, near = features(Extractor(source), seen), features(Extractor(quantised), seen)
    assert near.shape == exact.shape
    # Random weights swell the noise three times as much as trained ones do; features of another photo are 1 away.
    assert 0.0 < np.linalg.norm(near - exact) < 0.6 * np.linalg.norm(exact)
    assert np.linalg.norm(near[1] - exact[0]) > 0.6 * np.linalg.norm(exact[0])
    assert quantised.stat().st_size < 0.6 * source.stat().st_size


def test_one_photo_does_not_depend_on_its_neighbours(quantised: Path) -> None:
    extractor, seen = Extractor(quantised), photos(3, seed=2)
    together = features(extractor, seen)
    for photo, expected in zip(seen, together, strict=True):
        np.testing.assert_array_equal(features(extractor, photo[None])[0], expected)


def test_where_products_of_bytes_overflow_it_runs_in_float_and_is_as_near(
    random_bundle: RandomBundle, quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the same numbers: a sum between two steps may be rounded either way, and that goes on to later layers.

    Where products of bytes do overflow, the one in bytes may be much further off; that in float may not.
    """
    seen, found = photos(2, seed=3), {}
    for in_float in (False, True):
        monkeypatch.setattr(model.bottom_up.extractor, "saturates", lambda in_float=in_float: in_float)
        found[in_float] = features(Extractor(quantised), seen)
    exact = features(Extractor(random_bundle.folder / EXTRACTOR), seen)
    assert (found[True] != found[False]).any()
    error = {in_float: np.linalg.norm(one - exact) / np.linalg.norm(exact) for in_float, one in found.items()}
    assert error[True] < 1.2 * error[False]
