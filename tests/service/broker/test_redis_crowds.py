"""The Redis broker in a crowd: calls cancelled at random moments, workers that die at random moments."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from contextlib import AsyncExitStack, suppress

import pytest
from redis.asyncio import Redis

from service.broker.redis import RedisBroker
from service.broker.redis_store import Store
from service.jobs import Answer
from tests.service.broker.making import job, reply, worker_state
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio

FRONTS, WORKERS, JOBS = 16, 48, 20  # JOBS of each front
WORKER_TIMEOUT = 0.5  # seconds


async def test_no_cancelled_call_leaves_its_answer_to_another(
    redis_server: RedisServer, closing: AsyncExitStack
) -> None:
    """redis-py #2624 and #2665: hundreds of calls, each asking for something else, half of them cancelled."""
    names = [f"{uuid.uuid4().hex}:{i}" for i in range(600)]
    async with Redis.from_url(redis_server.url) as raw:
        for name in names:
            await raw.xadd(name, {"name": name})
            await raw.set(f"{name}:key", f"value of {name}")
    store = Store(redis_server.url)
    await store.open()
    closing.push_async_callback(store.close)
    rng = random.Random(3)
    answered = cancelled = 0

    async def ask(name: str) -> None:
        nonlocal answered
        ((_, fields),), value = await store.safely(store.read_on(name, "0-0", 1, f"{name}:key"))
        assert (fields[b"name"].decode(), (value or b"").decode()) == (name, f"value of {name}")
        answered += 1

    async def ask_or_be_cancelled(name: str) -> None:
        nonlocal cancelled
        asking = asyncio.create_task(ask(name))
        if rng.random() < 0.5:
            for _ in range(rng.randint(0, 40)):
                await asyncio.sleep(0)
            cancelled += asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking

    for begin in range(0, len(names), 100):
        await asyncio.gather(*(ask_or_be_cancelled(name) for name in names[begin : begin + 100]))
    assert cancelled > 100
    assert answered == len(names) - cancelled


class Crowd:
    """Fronts and workers of one queue, each with connections of its own."""

    def __init__(self, server: RedisServer, stack: AsyncExitStack) -> None:
        self._server = server
        self._stack = stack
        self.queue = uuid.uuid4().hex
        self._born = 0
        self.deaths: Counter[str] = Counter()
        self.confirmed: list[str] = []  # jobs whose answer was accepted
        self.refused = 0  # answers that came too late
        self.replies: list[str] = []

    async def broker(self) -> RedisBroker:
        depths = {"interactive": 1000, "batch": 1000}
        broker = RedisBroker(self._server.url, self.queue, depths, WORKER_TIMEOUT, tries=1000)
        await broker.open()
        self._stack.push_async_callback(broker.close)
        return broker

    async def front(self, broker: RedisBroker, number: int) -> None:
        """Submits its jobs and returns when each has been answered with its own data."""
        rng = random.Random(number)
        open_jobs = {f"front{number}-job{i}" for i in range(JOBS)}

        async def submit() -> None:
            for name in sorted(open_jobs):
                await broker.submit(job(name, rng.choice(("interactive", "batch")), broker.clock() + 60))
                await asyncio.sleep(rng.uniform(0, 0.02))

        async with asyncio.TaskGroup() as group:
            group.create_task(submit())
            while open_jobs:
                for each in await broker.replies():
                    assert isinstance(each.outcome, Answer), each
                    assert each.outcome.caption.text == each.job_id
                    open_jobs.remove(each.job_id)  # KeyError: another front's, or the second time
                    self.replies.append(each.job_id)

    async def worker(self, broker: RedisBroker, number: int, beating: asyncio.Event) -> None:
        """Lives, dies and is born again until it is cancelled."""
        rng = random.Random(1000 + number)
        while True:
            self._born += 1
            name = f"worker{self._born}"
            heart = asyncio.create_task(self._beat(broker, name, beating))
            try:
                fate = await self._live(broker, name, rng, heart)
            finally:
                heart.cancel()
            self.deaths[fate] += 1

    async def _beat(self, broker: RedisBroker, name: str, beating: asyncio.Event) -> None:
        while True:
            await broker.beat(worker_state(name))
            beating.set()
            await asyncio.sleep(WORKER_TIMEOUT / 4)

    async def _live(self, broker: RedisBroker, name: str, rng: random.Random, heart: asyncio.Task[None]) -> str:
        while True:
            fate = "live"
            for delivery in await broker.take(name, rng.randint(1, 4), 0.2):
                if fate == "live":
                    fate = rng.choices(["live", "die", "freeze", "give back"], [88, 4, 4, 4])[0]
                if fate == "die":
                    return fate  # with what it has in hand
                if fate == "give back":
                    await broker.give_back(name, [delivery])
                    fate = "live"
                    continue
                if fate == "freeze" and heart.cancel():
                    await asyncio.sleep(WORKER_TIMEOUT * 1.5)
                await asyncio.sleep(rng.uniform(0, 0.005))
                if await broker.answer(name, delivery, reply(delivery.job, name)):
                    self.confirmed.append(delivery.job.id)
                else:
                    self.refused += 1
            if fate == "freeze":
                return fate


async def test_every_job_is_answered_once_while_workers_die(redis_server: RedisServer, closing: AsyncExitStack) -> None:
    crowd = Crowd(redis_server, closing)
    fronts = [await crowd.broker() for _ in range(FRONTS)]
    workers = [await crowd.broker() for _ in range(WORKERS)]
    beating = asyncio.Event()
    working = [asyncio.create_task(crowd.worker(broker, i, beating)) for i, broker in enumerate(workers)]
    await beating.wait()
    async with asyncio.timeout(20):
        await asyncio.gather(*(crowd.front(broker, i) for i, broker in enumerate(fronts)))
    everything = sorted(f"front{number}-job{i}" for number in range(FRONTS) for i in range(JOBS))
    async with asyncio.timeout(5):  # a front has its reply before the worker hears that it was taken
        while len(crowd.confirmed) < len(everything):
            await asyncio.sleep(0.01)
    for task in working:
        task.cancel()
    ended = await asyncio.gather(*working, return_exceptions=True)
    assert {type(each) for each in ended} == {asyncio.CancelledError}
    assert sorted(crowd.replies) == everything
    assert sorted(crowd.confirmed) == everything
    state = await fronts[0].state()
    assert (state.answered, state.dead, sum(state.waiting.values())) == (len(everything), 0, 0)
    async with Redis.from_url(redis_server.url) as raw:
        assert await raw.keys(f"*{crowd.queue}*:line:*") == []  # nobody waits, and nobody is said to
    assert min(crowd.deaths["die"], crowd.deaths["freeze"], crowd.refused, state.redelivered) > 0
