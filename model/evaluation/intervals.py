"""How sure a mean over images is: bootstrap intervals of one system, and of the difference of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Student's t at 97.5%, by degrees of freedom from 1 on (any table of it); beyond, the last is a little too wide.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Interval(NamedTuple):
    """A mean, or a difference of means, in the unit of the values, with the ends of its interval."""

    estimate: float
    low: float
    high: float


def mean_interval(
    values: Sequence[float] | np.ndarray, samples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Mean of per-image `values` (images,) with its percentile bootstrap interval over images (Efron 1979).

    For CIDEr the document frequencies stay those of the whole set: a resampled set keeps each image's score, rather
    than scoring anew against resampled frequencies. So the interval tells of the choice of images, not of the corpus.

    Raises `ValueError` for values that are not one finite number per image.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError("an interval needs one finite number per image, and at least one image")
    if samples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError("an interval needs at least one sample and a confidence between 0 and 1")
    rng = np.random.default_rng(seed)
    # One sample at a time: samples x images at once would be gigabytes for large sets.
    means = [array[rng.integers(0, array.size, array.size)].mean() for _ in range(samples)]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(array.mean()), float(low), float(high))


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """mean(a) - mean(b) of two systems on the same images (images,) with its interval: (difference, low, high).

    Paired: each sample draws images and takes both systems' scores of them, so what makes an image easy for both
    cancels. An interval that excludes 0 is a difference at this confidence. For CIDEr see `mean_interval`.

    Raises `ValueError` for differing numbers of images, and as `mean_interval` does.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"scores of the same images are needed, not {first.shape} and {second.shape}")
    return mean_interval(first - second, samples, seed, confidence)


def seeds_interval(values: Sequence[float]) -> Interval:
    """Mean of one value per seed, with its 95% interval by Student's t: what another set of seeds might have given.

    Raises `ValueError` for fewer than two seeds, which tell nothing of others.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise ValueError("an interval over seeds needs one finite number of each, and at least two seeds")
    mean = float(array.mean())
    half = T_975[min(len(array) - 2, len(T_975) - 1)] * float(array.std(ddof=1)) / len(array) ** 0.5
    return Interval(mean, mean - half, mean + half)
