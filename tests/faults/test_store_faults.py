"""Redis is killed or hangs, and comes back empty or with what it had: every accepted photo is answered exactly once."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.faults.cluster import QUEUE, WORKER_TIMEOUT, Cluster
from tests.faults.conftest import Books
from tests.faults.load import Load, assert_all_answered, codes

pytestmark = pytest.mark.anyio

RATE = 22
BURST = 60  # photos: twice as many as workers take at once
OUTAGE = 0.7  # seconds
LONG_OUTAGE = 2 * WORKER_TIMEOUT  # seconds in which no worker can beat
AWAY = ("unavailable", "no_worker")  # what new photos may be told until workers and store have found each other again


async def until_taken(cluster: Cluster, jobs: int) -> None:
    """Returns when the store has taken so many jobs since it began; fails where it holds too few of them by then."""
    for _ in range(500):
        held = cluster.store.xlen(f"{QUEUE}:interactive")
        if held + cluster.count("answered") >= jobs:
            assert held > 16, f"the store holds {held} jobs, no more than workers have in hand: the test shows nothing"
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the store took {held + cluster.count('answered')} of {jobs} jobs")


async def outage(cluster: Cluster, *, empty: bool) -> Load:
    async with Load(cluster.front.address) as load:
        await load.run(RATE, 0.5)
        await load.answers()
        answered = cluster.count("answered") - len(load.all)
        before = load.burst(BURST)
        # When all are in: answered, or with the store, where some wait that no worker has.
        await until_taken(cluster, answered + len(load.all))
        cluster.redis.kill()
        if empty:
            cluster.redis.wipe()
        await load.run(RATE, OUTAGE)
        cluster.redis.start()
        await load.run(RATE, 1.5)
    assert_all_answered(load.all, but=AWAY)
    assert_all_answered(before)
    refused = len(load.all) - codes(load.all)["ok"]
    assert refused <= RATE * (OUTAGE + 1.0), f"{refused} were refused, long after the store was back"
    return load


async def test_a_store_that_comes_back_with_what_it_had(cluster: Cluster, books: Books) -> None:
    load = await outage(cluster, empty=False)
    books.check(load.all)
    assert cluster.front.metrics().value("deecap_store_losses_total") > 0, "the front did not notice"


async def test_a_store_that_comes_back_empty(cluster: Cluster, books: Books) -> None:
    before = cluster.front.metrics().value("deecap_resubmissions_total")
    load = await outage(cluster, empty=True)
    books.check(load.all, store=False)
    resubmitted = cluster.front.metrics().value("deecap_resubmissions_total") - before
    assert resubmitted > 0, "the front submitted nothing again: the test shows nothing"


@pytest.mark.parametrize("how", ["hangs", "ends"])
async def test_a_long_outage_is_no_workers_death(cluster: Cluster, books: Books, how: str) -> None:
    """Else each such outage would be one of the tries of every photo in the workers' hands."""
    async with Load(cluster.front.address) as load:
        await load.run(RATE, 0.5)
        await load.answers()
        answered = cluster.count("answered") - len(load.all)
        before = load.burst(BURST)
        await until_taken(cluster, answered + len(load.all))
        if how == "hangs":
            cluster.redis.pause()
        else:
            cluster.redis.kill()
        await load.run(RATE, LONG_OUTAGE)
        slow = cluster.workers[0]  # to find its way back
        slow.signal(signal.SIGSTOP)
        try:
            if how == "hangs":
                cluster.redis.resume()
            else:
                cluster.redis.start()
            await load.run(RATE, WORKER_TIMEOUT / 2)
        finally:
            slow.signal(signal.SIGCONT)
        await load.run(RATE, 1.5)
    assert_all_answered(load.all, but=AWAY)
    assert_all_answered(before)
    books.check(load.all)
    assert (books.new_redelivered, books.new_dead) == (0, 0), "workers that could not beat were taken for dead"
