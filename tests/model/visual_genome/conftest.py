"""A narrow, short detector on small photos, and a file of made-up weights for it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from model.bottom_up.visual_genome.config import DetectorConfig
from model.bottom_up.visual_genome.detector import Detector
from model.bottom_up.visual_genome.weights import read_weights
from tests.model.visual_genome.made_up import NARROW, Blobs, caffe_blobs


@pytest.fixture(scope="session")
def config() -> DetectorConfig:
    return NARROW


@pytest.fixture(scope="session")
def blobs() -> Blobs:
    """By the layers' names; tests that change them copy them first."""
    return caffe_blobs(NARROW)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, blobs: Blobs) -> Path:
    """A pickle of Caffe's layers."""
    path = tmp_path_factory.mktemp("weights") / "caffe.pkl"
    path.write_bytes(pickle.dumps(blobs, protocol=2))
    return path


@pytest.fixture(scope="session")
def detector(weights: Path) -> Detector:
    return read_weights(weights, NARROW).detector


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """uint8 `(120, 150, 3)`: rectangles and noise."""
    random = np.random.default_rng(3)
    pixels = random.integers(0, 60, (120, 150, 3))
    for _ in range(12):
        y, x = random.integers(0, 100, 2)
        pixels[y : y + random.integers(10, 60), x : x + random.integers(10, 60)] += random.integers(0, 190, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8)
