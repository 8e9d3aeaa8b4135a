"""Retry-After: from how fast a queue that is not empty drains, and never out of bounds."""

from __future__ import annotations

import pytest

from service.retry_after import DrainRate


def watched(*seen: tuple[float, int, int]) -> DrainRate:
    """A rate that saw (time, answered, waiting)."""
    rate = DrainRate()
    for each in seen:
        rate.saw(*each)
    return rate


def steady(per_second: float, seconds: float, start: float = 0.0, waiting: int = 5) -> list[tuple[float, int, int]]:
    turns = range(int(seconds * 4) + 1)
    return [(start + turn / 4, int((start + turn / 4) * per_second), waiting) for turn in turns]


@pytest.mark.parametrize("per_second", [2, 40, 300])
def test_a_steady_rate_is_found(per_second: int) -> None:
    rate = watched(*steady(per_second, 20))
    assert rate.per_second == pytest.approx(per_second, rel=0.05)
    assert rate.retry_after(10 * per_second) in (10, 11)


def test_an_idle_queue_says_nothing_of_how_fast_it_could_be() -> None:
    busy = steady(40, 20)
    idle = [(20 + turn / 4, 800, 0) for turn in range(1, 400)]
    assert watched(*busy, *idle).per_second == pytest.approx(watched(*busy).per_second, rel=0.05)


def test_a_queue_that_stands_still_is_slow_soon() -> None:
    stuck = [(20 + turn / 4, 800, 5) for turn in range(1, 41)]
    rate = watched(*steady(40, 20), *stuck)
    assert rate.per_second < 10
    assert watched(*steady(40, 20), *stuck, *[(30 + turn / 4, 800, 5) for turn in range(1, 400)]).retry_after(64) == 60


def test_a_store_that_lost_its_count_does_not_count() -> None:
    before = watched(*steady(40, 20)).per_second
    assert watched(*steady(40, 20), (20.25, 0, 5)).per_second == before
    assert watched(*steady(40, 20), (20.25, 0, 5), (21.25, 40, 5)).per_second == pytest.approx(40, rel=0.05)


def test_bounds_and_the_first_guess() -> None:
    assert DrainRate().retry_after(64) == 7
    assert DrainRate().retry_after(0) == 1
    assert DrainRate().retry_after(1) == 1
    assert DrainRate().retry_after(10**9) == 60
