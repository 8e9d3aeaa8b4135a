"""The front is told to end while it serves, and crowds of clients hang up."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter

import pytest

from tests.faults.cluster import Cluster, Process
from tests.faults.conftest import Books
from tests.faults.load import Load, assert_all_answered, assert_in_order, codes, listed

pytestmark = pytest.mark.anyio

CROWD = 200
CROWD_MS = 100  # of the model for each of the crowd's photos: ten seconds of two workers for all


async def until_in(front: Process, before: Counter[str], load: Load) -> None:
    """Returns when all photos are in the front, with many of them not answered yet."""
    for _ in range(300):
        metrics = front.metrics()
        under_way = metrics.value("deecap_captions_under_way")
        if under_way + (metrics.answers() - before)["ok"] >= len(load.all):
            assert under_way >= 20, f"only {under_way:.0f} captions are under way: the test shows nothing"
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{under_way:.0f} captions are under way, of {len(load.all)} that were asked for")


async def test_sigterm_of_the_front_answers_what_it_took(cluster: Cluster) -> None:
    front = cluster.front
    answered, before = cluster.count("answered"), front.metrics().answers()
    async with Load(front.address) as load:
        await load.run(30, 0.5)
        load.burst(40, ms=CROWD_MS // 10)  # two seconds of work for two workers
        await until_in(front, before, load)
        taken, signalled = list(load.all), time.monotonic()
        front.signal(signal.SIGTERM)
        await load.run(30, 1.5)
        status = await asyncio.to_thread(front.ended, 15)
    assert status == 0, f"exit status {status}:\n{front.said[-2000:]}"
    assert "Traceback" not in front.said, front.said[-3000:]
    assert_all_answered(taken)
    later = [sent for sent in load.all if sent.at > signalled]
    # New ones are refused while it drains; then nobody listens any more.
    told = [sent for sent in later if not sent.error]
    assert codes(told)["stopping"] > 0, f"no new photo was told that the front stops: {dict(codes(later))}"
    assert_all_answered(told, but=("stopping",))
    asked = [sent for sent in later if sent.error and "Connect" not in sent.error]
    assert len(asked) <= 5, listed(asked, "new photos were cut off without a word")
    cluster.heal()  # with another front, which has no part in what was before
    assert cluster.count("answered") - answered == codes(load.all)["ok"], "answers that nobody got, or more than one"


async def test_a_crowd_that_hangs_up_frees_its_places_and_only_those(cluster: Cluster, books: Books) -> None:
    async with Load(cluster.front.address) as load:
        crowd = load.burst(CROWD, ms=CROWD_MS // 10, priority="batch")
        until = time.monotonic() + 5
        while cluster.front.metrics().value("deecap_captions_under_way") < CROWD * 0.9:
            assert time.monotonic() < until, f"the crowd is not let in: {dict(codes(crowd))}"
            await load.run(10, 0.1)
        stay = load.burst(8)
        load.hang_up(crowd)
        gone = time.monotonic()
        stay += load.burst(8)
        await load.run(10, 0.3)
        await load.answers()
        cluster.settle()
        took = time.monotonic() - gone
    assert_all_answered([sent for sent in load.all if sent not in crowd])
    hung_up = [sent for sent in crowd if sent.hung_up]
    assert len(hung_up) > CROWD // 2, f"the crowd was answered before it could hang up: {dict(codes(crowd))}"
    # Had they been worked on after all, this would have taken `needed`; half of that is room for a slow machine.
    needed = len(hung_up) * CROWD_MS / 1000 / 2
    assert took < needed / 2, f"the places of {len(hung_up)} who left were not freed: {took:.1f} s of {needed:.1f} s"
    books.check(load.all, store=False)
    told = (cluster.front.metrics().answers() - books.answers)["client_gone"]
    assert told > 0.8 * len(hung_up), f"{len(hung_up)} hung up, 8 in 10 of them in the front, which counted {told}"
    for sent in load.all:
        if not sent.hung_up:
            assert_in_order(sent)
