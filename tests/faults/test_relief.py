"""Twice as many photos as the workers can caption, and half of the clients allow more speed: fewer are refused."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest

from tests.faults.cluster import Cluster
from tests.faults.load import Load, Sent, assert_all_answered
from tests.faults.pulse import Pulse
from tests.service.fakes import LAYERS
from tests.service.redis_server import MISSING, find_binary

pytestmark = pytest.mark.anyio

LOOK, WORDS = 0.010, 0.060  # seconds at full depth
FULL, MOST = "full", 4.0  # what is asked for, and the SpeedUp that half of the clients allow
LOAD, CALM = 2.0, 0.4  # times what two workers can do at full depth
SECONDS = 8.0
TRIES = 3  # to measure what nothing else on this machine disturbs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Of its own: with a model whose words take less time at a higher speed."""
    if find_binary() is None:
        pytest.skip(MISSING)
    running = Cluster(
        tmp_path_factory.mktemp("relief"),
        STAND_IN_LOOK=LOOK,
        STAND_IN_WORDS=WORDS,
        STAND_IN_EARLY_EXIT=1,
        DEECAP_QUEUE_DEPTH=round(1 / (LOOK + WORDS)) * 2,  # one second's work of both
    )
    try:
        running.heal()
        yield running
    finally:
        running.close()


async def calm(cluster: Cluster, seconds: float) -> list[Sent]:
    """A load that two workers can bear, again where this machine held it up; the last try counts anyhow."""
    for _ in range(TRIES):
        with Pulse(cluster.redis.url) as pulse:
            those = await loaded(cluster, CALM, seconds, allowing=True)
        if not pulse.held_up:
            break
        cluster.settle()
    return those


async def loaded(cluster: Cluster, share: float, seconds: float, allowing: bool) -> list[Sent]:
    """`share` times the capacity for so long; every other client allows more speed, or none does."""
    async with Load(cluster.front.address) as load:
        allowed = {"max_speed": MOST} if allowing else {}
        await load.run(share * 2 / (LOOK + WORDS), seconds, every_other=allowed, speed=FULL)
    assert_all_answered(load.all, but=("overloaded",))
    return load.all


def refused(those: list[Sent]) -> float:
    """Share of those that came once the queue had had time to fill."""
    late = [sent for sent in those if sent.at - those[0].at > SECONDS / 4]
    return sum(sent.code == "overloaded" for sent in late) / len(late)


def depth(those: list[Sent], begin: float, end: float) -> float:
    """Mean exit layer of those that came between two parts (0 to 1) of the time."""
    first, length = those[0].at, those[-1].at - those[0].at
    return statistics.mean(sent.depth for sent in those if sent.answered and begin <= (sent.at - first) / length <= end)


async def test_fewer_are_refused_where_half_allow_more_speed(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    before = await calm(cluster, SECONDS / 2)
    allowed = await loaded(cluster, LOAD, SECONDS, allowing=True)
    cluster.settle()
    after = await calm(cluster, SECONDS)
    asked = await loaded(cluster, LOAD, SECONDS, allowing=False)
    depths = [depth(before, 0.5, 1), depth(allowed, 0.5, 1), depth(after, 0.75, 1)]
    with capsys.disabled():
        print(
            f"\n  overload: {refused(asked):.0%} refused, {refused(allowed):.0%} where half allow more speed; "
            f"mean exit layer {depths[0]:.2f} before, {depths[1]:.2f} under load, {depths[2]:.2f} after"
        )
    assert refused(asked) > 0.3, "the load was none"
    assert refused(allowed) < 0.8 * refused(asked)
    # The other half still leaves at the last layer.
    assert depths[0] > 0.95 * LAYERS
    assert depths[1] < 0.8 * LAYERS
    assert depths[2] > 0.95 * LAYERS
    fixed = [sent.depth for sent in allowed if sent.answered and not sent.may_be_faster]
    assert set(fixed) == {float(LAYERS)}, "who allows nothing gets the speed that was asked for"
