"""Jobs, replies and worker states for the brokers' tests, and what tests wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from model.caption import Caption, Word
from model.exits import ResolvedSpeed
from service.broker.base import Delivery, FrontBroker, WorkerBroker
from service.broker.redis import RedisBroker
from service.jobs import Answer, Job, ModelInfo, Priority, Progress, Refusal, Reply, Timings, WorkerState
from tests.service.fakes import LAYERS, SPEEDS
from tests.service.redis_server import RedisServer

MODEL = ModelInfo("fake", "0123456789ab", LAYERS, "cpu", SPEEDS, 3)


class Broker(FrontBroker, WorkerBroker, Protocol):
    """Both sides."""


class Open(Protocol):
    """Makes one more broker of a test's queue in Redis."""

    async def __call__(
        self, server: RedisServer, *, name: str = ..., worker_timeout: float = 30.0, tries: int = 3
    ) -> RedisBroker: ...


class Meet(Protocol):
    """Brings a front and workers together: makes a broker, opened."""

    async def __call__(
        self, *, depth: int = 100, batch_depth: int = 100, worker_timeout: float = 30.0, tries: int = 3
    ) -> Pair: ...


@dataclass(frozen=True)
class Pair:
    """The two sides of one queue."""

    front: FrontBroker
    worker: WorkerBroker

    async def submit(self, *ids: str, priority: Priority = "interactive", seconds: float = 60.0) -> None:
        for job_id in ids:
            await self.front.submit(job(job_id, priority, self.front.clock() + seconds))

    async def join(self, *workers: str) -> None:
        for worker in workers:
            await self.worker.beat(worker_state(worker))

    async def take(self, worker: str, count: int = 100, seconds: float = 0.0) -> Sequence[Delivery]:
        return await self.worker.take(worker, count, seconds)

    async def take_one(self, worker: str, seconds: float = 0.0) -> Delivery:
        (delivery,) = await self.worker.take(worker, 1, seconds)
        return delivery

    async def answer(self, worker: str, delivery: Delivery) -> bool:
        return await self.worker.answer(worker, delivery, reply(delivery.job, worker))

    async def heard(self, seconds: float = 0.06) -> list[str]:
        """The ids of all replies that come until none came for so long; refusals as `id: code`, words as `id+words`."""
        ids: list[str] = []
        while True:
            try:
                async with asyncio.timeout(seconds):
                    replies = await self.front.replies()
            except TimeoutError:
                return ids
            ids += [summary(each) for each in replies]

    async def heard_all(self, count: int, seconds: float = 5.0) -> list[Reply]:
        """So many replies, and no words."""
        replies: list[Reply] = []
        async with asyncio.timeout(seconds):
            while len(replies) < count:
                for each in await self.front.replies():
                    assert isinstance(each, Reply)
                    replies.append(each)
        return replies

    async def tell(self, worker: str, delivery: Delivery, begin: int, *words: str) -> None:
        await self.worker.tell(worker, [(delivery, progress(delivery, begin, *words))])

    async def live(self, seconds: float) -> None:
        """Lets that time pass, in which the store is there and somebody asks it."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.05))
            await self.front.state()


def progress(delivery: Delivery, begin: int, *words: str) -> Progress:
    told = tuple(Word(word, 2, 0.25, -0.5) for word in words)
    return Progress(delivery.job.id, delivery.attempt, begin, told)


def summary(said: Reply | Progress) -> str:
    if isinstance(said, Progress):
        return f"{said.job_id}+{' '.join(word.text for word in said.words)}"
    return f"{said.job_id}: {said.outcome.code}" if isinstance(said.outcome, Refusal) else said.job_id


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.job.id for delivery in deliveries]


def job(job_id: str, priority: Priority = "interactive", deadline: float = 0.0) -> Job:
    return Job(
        id=job_id,
        image=b"\x00\xff\r\n" + job_id.encode(),
        speed="fast",
        tau=None,
        beam=1,
        priority=priority,
        deadline=deadline or time.time() + 60,
        request_id=f"request-{job_id}",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


def reply(asked: Job, worker: str) -> Reply:
    """The caption says which image it is of."""
    steps = (Word(asked.image[4:].decode(), 3, 0.1 + 0.2, -0.1), Word("", 1, 1e-9, -0.5))
    caption = Caption(steps, ResolvedSpeed("fast", "fast", 2.0, 3.0), LAYERS)
    boxes = ((0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.75, 1.0))
    return Reply(asked.id, Answer(caption, boxes, Timings(0.1, 0.2, 0.3, 0.4), "fake", "0123456789ab"), worker)


def worker_state(worker: str, running: int = 0) -> WorkerState:
    return WorkerState(worker, MODEL, ready=True, slots=8, running=running, last_success=12.5)


async def until(happens: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
    """Returns once it is so."""
    async with asyncio.timeout(seconds):
        while not await happens():
            await asyncio.sleep(0.01)
