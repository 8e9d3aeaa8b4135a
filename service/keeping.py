"""Keeps what requests wait for with the broker, for as long as they wait: hears what it says, and reminds it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from service.broker.base import BrokerError, BrokerLostError, FrontBroker
from service.queue_watch import QueueWatch
from service.waiting import UnderWay, Waiting

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_BACKOFF, LAST_BACKOFF = 0.1, 2.0  # seconds
REFUSED_AGAIN_SECONDS = 0.5  # until the next try for a job that was in the queue once and finds it full or unserved
_PLACES = {"queued": "queue", "running": "worker"}


class Keeping:
    """One front's. All of it runs in one event loop."""

    def __init__(
        self,
        broker: FrontBroker,
        *,
        own_worker: bool,
        poll_seconds: float,
        remind_seconds: float,
        store_seconds: float,
    ) -> None:
        self.under_way = UnderWay()
        self.watch = QueueWatch(
            broker, self._remind_all, own_worker=own_worker, poll_seconds=poll_seconds, store_seconds=store_seconds
        )
        self.resubmitted = 0  # jobs submitted again, whole
        self.late: Counter[str] = Counter()  # deadlines missed, by where the job was: "front", "queue" or "worker"
        self._broker = broker
        self._poll_seconds = poll_seconds
        self._remind_seconds = remind_seconds
        self._store_seconds = store_seconds
        self._giving_up: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until it is cancelled. A store that is not there yet is waited for."""
        opened = False

        async def open_it() -> None:
            nonlocal opened
            try:
                await self._broker.open()
            except BrokerError as error:
                self.watch.mark_lost(error)
                raise
            opened = True

        await self._repeat(open_it, lambda: opened)
        async with asyncio.TaskGroup() as group:
            for step in (self._receive, self.watch.look, self._remind):
                group.create_task(self._repeat(step))

    async def in_time(self, call: Awaitable[T]) -> T:
        """What the broker says. Raises `BrokerLostError` also where it takes too long."""
        try:
            async with asyncio.timeout(self._store_seconds):
                return await call
        except TimeoutError as error:
            raise BrokerLostError("the store took too long") from error

    async def submit(self, waiting: Waiting) -> None:
        """From now on it is kept. Raises `QueueFullError`, `NoWorkerError`, `BrokerLostError`."""
        await self.in_time(self._broker.submit(waiting.job))
        waiting.due = time.monotonic() + self._remind_seconds

    def give_up(self, job_id: str, late: bool = False) -> None:
        """Tells the broker so, on its own: the request that ends must not wait for that, nor stop it.

        `late`: the deadline passed. Where the job was then, the broker knows.
        """

        async def tell() -> None:
            place = None
            try:
                async with asyncio.timeout(2 * self._store_seconds):  # it waits for the job's own submission
                    place = await self._broker.cancel(job_id)
            except (BrokerLostError, TimeoutError):
                log.debug("job %s is given up, and the store was not told", job_id)  # it is done for nobody at worst
            if late:
                self.late["front" if place is None else _PLACES[place]] += 1

        task = asyncio.create_task(tell())
        self._giving_up.add(task)
        task.add_done_callback(self._giving_up.discard)

    async def given_up(self) -> None:
        """Returns when the broker was told of all that was given up."""
        await asyncio.gather(*self._giving_up, return_exceptions=True)

    async def _repeat(self, step: Callable[[], Awaitable[None]], enough: Callable[[], bool] = lambda: False) -> None:
        """The step, again and again; where it fails, after a pause that grows while it does."""
        pause = FIRST_BACKOFF
        while not enough():
            try:
                await step()
                pause = FIRST_BACKOFF
                continue
            except (BrokerError, TimeoutError) as error:
                self.watch.doubt(error)
            except Exception:  # a fault of ours, or a reply that is none: the other requests must go on
                log.exception("the front failed at one thing and goes on with the next")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_BACKOFF)

    async def _receive(self) -> None:
        try:
            heard = await self._broker.replies()
        except BrokerLostError:
            self._remind_all()
            raise
        for said in heard:
            self.under_way.hear(said)

    def _remind_all(self) -> None:
        """Something was lost, and perhaps jobs: the broker is asked for each that it took."""
        for waiting in self.under_way:
            if waiting.due is not None:
                waiting.due = 0.0

    async def _remind(self) -> None:
        """Of those that are due. A job that the store does not know is submitted again."""
        for waiting in self.under_way:
            if self.watch.lost:
                break
            if waiting.due is not None and waiting.due <= time.monotonic() and not waiting.over:
                await self._remind_of(waiting)
        await asyncio.sleep(self._poll_seconds)

    async def _remind_of(self, waiting: Waiting) -> None:
        job_id = waiting.job.id
        waiting.due = time.monotonic() + self._remind_seconds
        try:
            if not await self.in_time(self._broker.remind(job_id)):
                await self.submit(waiting)
                self.resubmitted += 1
        except BrokerError as error:  # full, unserved or lost; it was accepted once: it has until its deadline
            waiting.due = time.monotonic() + REFUSED_AGAIN_SECONDS
            if isinstance(error, BrokerLostError):
                self.watch.doubt(error)
        if job_id not in self.under_way:
            self.give_up(job_id)  # its request ended meanwhile, and the job may be there again
