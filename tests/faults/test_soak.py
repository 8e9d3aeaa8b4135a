"""Every fault again and again in random order, under a steady load, for minutes. `make test-long` runs it."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from tests.faults.cluster import WORKER_TIMEOUT, Cluster, Process
from tests.faults.conftest import Books
from tests.faults.load import Load, Sent, assert_all_answered, listed

pytestmark = [pytest.mark.anyio, pytest.mark.long]

SECONDS = 180
RATE = 15  # photos per second: one worker alone keeps up, and has something left for what was held up
EVERY = 6.0  # seconds from one fault to the next: the time to take over, to start a worker and to catch up
REFUSALS = ("unavailable", "no_worker", "overloaded")  # what a photo may be told at any moment here


class Faults:
    """Each method does one harm. What it does to the photos it sends itself, it checks itself."""

    def __init__(self, cluster: Cluster, load: Load, chance: random.Random) -> None:
        self._cluster, self._load, self._chance = cluster, load, chance
        self.poison: list[Sent] = []
        self.crowd: list[Sent] = []
        self.done: Counter[str] = Counter()

    async def one(self) -> None:
        every: tuple[Callable[[], Awaitable[None]], ...] = (
            self.kill, self.stop, self.end, self.hang, self.store, self.deadly, self.gone,
        )  # fmt: skip
        harm = self._chance.choice(every)
        self.done[harm.__name__] += 1
        await harm()

    async def kill(self) -> None:
        self._some().kill()

    async def stop(self) -> None:
        worker = self._some()
        worker.signal(signal.SIGSTOP)
        await asyncio.sleep(self._chance.uniform(0.2, 2 * WORKER_TIMEOUT))
        worker.signal(signal.SIGCONT)

    async def end(self) -> None:
        worker = self._some()
        worker.signal(signal.SIGTERM)
        status = await asyncio.to_thread(worker.ended, 20)
        assert status == 0, f"{worker.name} ended with {status} after SIGTERM:\n{worker.said[-3000:]}"

    async def hang(self) -> None:
        self._some().signal(signal.SIGUSR1)

    async def store(self) -> None:
        self._cluster.redis.kill()
        if self._chance.random() < 0.5:
            self._cluster.redis.wipe()
        await asyncio.sleep(self._chance.uniform(0.1, 1.5))
        await asyncio.to_thread(self._cluster.redis.start)

    async def deadly(self) -> None:
        self.poison.append(self._load.send("deadly"))

    async def gone(self) -> None:
        crowd = self._load.burst(60, priority="batch")
        self.crowd += crowd
        await asyncio.sleep(self._chance.uniform(0.1, 0.6))
        self._load.hang_up(crowd)

    def _some(self) -> Process:
        """One that works; while one starts there is the other, but for moments without any."""
        works = [worker for worker in self._cluster.workers if worker.alive and "works for the queue" in worker.said]
        return self._chance.choice(works or self._cluster.workers)


async def test_faults_without_end(cluster: Cluster, books: Books, capsys: pytest.CaptureFixture[str]) -> None:
    seed = time.time_ns() % 1000
    async with Load(cluster.front.address) as load:
        faults = Faults(cluster, load, random.Random(seed))
        end = time.monotonic() + SECONDS

        async def supervise() -> None:
            while True:
                cluster.supervise()
                await asyncio.sleep(0.1)

        async def harm() -> None:
            while time.monotonic() < end - 2 * EVERY:
                await asyncio.sleep(EVERY)
                await faults.one()

        supervising = asyncio.create_task(supervise())
        harming = asyncio.create_task(harm())
        while time.monotonic() < end:
            await load.run(RATE, 1.0)
        await harming
        await load.answers()
        supervising.cancel()
    good = [sent for sent in load.all if sent.kind == "good" and sent not in faults.crowd]
    answered = sum(sent.answered for sent in good)
    with capsys.disabled():
        print(f"\n  soak, seed {seed}: {answered} of {len(good)} answered, {dict(faults.done)}")
    # A good photo beside a deadly one is tried alone, and another fault can hit it then, and again: its three tries are
    # used up by chance, once in a long while. Nothing else may keep a photo from its caption but a refusal.
    unlucky = [sent for sent in good if sent.code == "poison"]
    assert len(unlucky) <= 2, listed(unlucky, f"good photos were given up (seed {seed})")
    assert_all_answered([sent for sent in good if sent not in unlucky], but=REFUSALS)
    assert answered > len(good) * 0.8, f"only {answered} of {len(good)} were answered (seed {seed})"
    survived = [sent for sent in faults.poison if sent.status == 200]
    assert not survived, listed(survived, "deadly photos have a caption")
    cluster.heal()
    books.check(load.all, front=True, store=False)
