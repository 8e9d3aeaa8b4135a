"""The scenarios' arrival times, and the figures made of samples."""

from __future__ import annotations

import math

import pytest

from loadtests import measure, scenarios
from loadtests.answers import Verdict
from loadtests.measure import Sample
from loadtests.photos import never_sent, scenes
from loadtests.scenarios import World

WORLD = World([b"one", b"two", b"three", b"four", b"five"], layers=6)


def test_scenes_are_photos_and_no_two_sendings_are_alike() -> None:
    found = scenes()
    assert len(set(found)) == len(found) >= 8
    assert never_sent(found[0]) != never_sent(found[0])
    assert never_sent(found[0]).startswith(found[0])


def test_steady_is_steady() -> None:
    dues = [due for due, _ in scenarios.steady(WORLD, "fast", 10, 2)]
    assert dues == pytest.approx([number / 10 for number in range(20)])


def test_a_spike_is_four_times_as_many_in_the_middle() -> None:
    dues = [due for due, _ in scenarios.spike(WORLD, 10, 3)]
    assert dues == sorted(dues)
    assert [sum(part <= due < part + 1 for due in dues) for part in range(3)] == [10, 40, 10]


def test_hot_photos_are_the_same_bytes_again() -> None:
    bodies = [request.body for _, request in scenarios.hot(WORLD, 100, 10)]
    popular = [body for body in bodies if body in WORLD.photos]
    assert 0.75 < len(popular) / len(bodies) < 0.85
    assert set(popular) == set(WORLD.photos[:4])
    assert len(set(bodies)) == len(bodies) - len(popular) + 4


def test_mixed_asks_for_all_speeds() -> None:
    assert {request.name for _, request in scenarios.mixed(WORLD, 50, 4)} == set(scenarios.MIX)


def test_half_of_the_bad_clients_are_good() -> None:
    names = [request.name for _, request in scenarios.bad(WORLD, 50, 4)]
    assert names[::2] == ["balanced"] * len(names[::2])
    assert len(set(names[1::2])) == 10


def sample(due: float, seconds: float, outcome: str = "ok", late: float = 0.0) -> Sample:
    return Sample("fast", due, due + late, due + seconds, Verdict(outcome, same=True))


def test_a_step_counts_from_when_a_request_was_due() -> None:
    samples = [sample(number / 10, 0.1 + number / 1000) for number in range(100)]
    samples += [sample(9.9, 0.01, "refused"), sample(9.9, 1.0, "late"), sample(9.9, 0.1, "failed")]
    step = measure.step("fast", 10, samples)
    assert step.goodput == pytest.approx(100 / 10.9)
    assert (step.p50, step.p99) == pytest.approx((0.149, 0.198))
    assert step.refused == step.late == pytest.approx(1 / 103)
    assert (step.failed, step.same_caption, step.valid) == (1, 1.0, True)


def test_a_step_in_which_the_sender_was_late_is_in_doubt() -> None:
    assert not measure.step("fast", 10, [sample(0, 0.2, late=0.1)]).valid


def test_percentiles_are_values_that_were_there() -> None:
    assert [measure.percentile([1, 2, 3, 4], share) for share in (0.25, 0.5, 0.95, 1)] == [1, 2, 4, 4]
    assert math.isnan(measure.percentile([], 0.5))
