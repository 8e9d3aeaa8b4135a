"""FCS and reliability against slow oracles that go through all pairs, and against cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from model.evaluation.fcs import calibration_error, consistency, reliability


def slow(confidence: np.ndarray, hard: np.ndarray) -> tuple[float, float]:
    """AUROC and FCS, pair by pair."""
    right = mixed = wrong = 0.0
    pairs = 0
    for i in range(len(hard)):
        for j in range(i):
            pairs += 1
            if hard[i] == hard[j]:
                continue
            easy, difficult = (j, i) if hard[i] else (i, j)
            mixed += 1
            gap = confidence[easy] - confidence[difficult]
            right += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
            wrong += 1.0 if gap < 0 else 0.5 if gap == 0 else 0.0
    return (right / mixed if mixed else math.nan), (1 - wrong / pairs if pairs else math.nan)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_what_going_through_all_pairs_gives(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 60))
    # Few values, so that there are ties of every kind; the first seeds none.
    confidence = random.random(count) if seed < 2 else random.integers(0, 5, count) / 4
    hard = random.random(count) < (0.1, 0.5, 0.9)[seed % 3]
    found = consistency(confidence, hard)
    assert (found.auroc, found.fcs) == pytest.approx(slow(confidence, hard), nan_ok=True)
    assert (found.tokens, found.hard) == (count, hard.sum())


def test_by_hand() -> None:
    # Easy at 0.9 and 0.3, hard at 0.5 and 0.3: pairs right, right, wrong, and a tie.
    found = consistency(np.array([0.9, 0.3, 0.5, 0.3]), np.array([False, False, True, True]))
    assert found.auroc == pytest.approx(2.5 / 4)
    assert found.fcs == pytest.approx(1 - 1.5 / 6)


def test_the_best_and_the_worst() -> None:
    hard = np.array([True] * 5 + [False] * 5)
    rising = np.arange(10) / 10
    assert consistency(rising, hard).auroc == consistency(rising, hard).fcs == 1.0
    worst = consistency(rising[::-1], hard)
    assert worst.auroc == 0.0
    assert worst.fcs == pytest.approx(1 - 25 / 45)


def test_only_the_order_of_confidence_matters() -> None:
    random = np.random.default_rng(3)
    confidence, hard = random.random(200), random.random(200) < 0.4
    assert consistency(confidence, hard) == consistency(np.log(confidence), hard)
    assert consistency(-confidence, hard).auroc == pytest.approx(1 - consistency(confidence, hard).auroc)


@pytest.mark.parametrize("hard", [[True, True], [False, False]])
def test_there_is_no_share_of_no_pairs(hard: list[bool]) -> None:
    found = consistency(np.array([0.2, 0.4]), np.array(hard))
    assert math.isnan(found.auroc)
    assert found.fcs == 1.0
    assert math.isnan(consistency(np.array([0.2]), np.array([True])).fcs)


def test_it_counts_exactly_where_floats_could_not() -> None:
    count = 200_000
    confidence = np.full(count, 0.5)
    assert consistency(confidence, np.arange(count) % 2 == 0).auroc == 0.5


@pytest.mark.parametrize("confidence", [[0.1], [0.1, math.nan], [[0.1, 0.2]]])
def test_what_is_no_confidence_is_refused(confidence: list[float]) -> None:
    with pytest.raises(ValueError, match="confidence"):
        consistency(np.array(confidence), np.array([True, False]))


def test_bins_hold_every_token_once() -> None:
    random = np.random.default_rng(0)
    confidence = np.concatenate([random.random(500), [0.0, 1.0, 0.1, 0.2]])
    hard = random.random(504) < 0.3
    bins = reliability(confidence, hard)
    assert sum(one.tokens for one in bins) == 504
    assert sum(one.tokens * one.accuracy for one in bins) == pytest.approx((~hard).sum())
    assert sum(one.tokens * one.confidence for one in bins) == pytest.approx(confidence.sum())
    assert [one.confidence for one in bins] == sorted(one.confidence for one in bins)


def test_the_calibration_error_by_hand() -> None:
    # Three at 0.95 of which one is wrong, one at 0.35 that is right.
    bins = reliability(np.array([0.95, 0.95, 0.95, 0.35]), np.array([True, False, False, False]))
    assert [(one.tokens, one.accuracy) for one in bins] == [(1, 1.0), (3, pytest.approx(2 / 3))]
    assert calibration_error(bins) == pytest.approx((0.65 + 3 * (0.95 - 2 / 3)) / 4)
    assert math.isnan(calibration_error(()))


def test_minus_an_entropy_is_no_probability() -> None:
    with pytest.raises(ValueError, match="probability"):
        reliability(np.array([-0.1]), np.array([True]))
