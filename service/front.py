"""The front's side of the queue: jobs in, answers out, and what the front knows of workers and queue meanwhile.

A job belongs to the request that waits for it. It is kept until it is answered, and submitted again under its id when
the store does not know it any more, so an answer is late at worst. When the request ends without an answer, its job is
given up, and only its own. A job of `enqueue` belongs to the store alone.

The store counts as lost when it does not tell its state. What else fails there fails for one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from service.broker.base import BrokerError, BrokerLostError, Found, FrontBroker, NoWorkerError, QueueFullError
from service.errors import Problem
from service.jobs import PRIORITIES, Answer, Job, ModelInfo, Priority, Progress, QueueState, Reply
from service.keeping import Keeping
from service.queue_watch import no_worker, stopping, unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 0.25  # between two looks at workers and queue: soon enough for a probe, rare enough for the store
STORE_SECONDS = 2.0  # that the store may take for one call
REMIND_SECONDS = 5.0  # a store can lose a job and nobody hears of it
GOODBYE_SECONDS = 1.0  # that requests have to take notice that the front stops: a client may not read its stream


class Front:
    """One front. All of it runs in one event loop."""

    def __init__(
        self,
        broker: FrontBroker,
        *,
        own_worker: bool = False,
        poll_seconds: float = POLL_SECONDS,
        remind_seconds: float = REMIND_SECONDS,
        store_seconds: float = STORE_SECONDS,
    ) -> None:
        """`own_worker`: this process starts a worker too, so that having none yet means that it loads."""
        self._broker = broker
        self._store_seconds = store_seconds
        self._draining = False
        self._main: asyncio.Task[None] | None = None
        self._keeping = Keeping(
            broker,
            own_worker=own_worker,
            poll_seconds=poll_seconds,
            remind_seconds=remind_seconds,
            store_seconds=store_seconds,
        )
        self._watch = self._keeping.watch
        self._under_way = self._keeping.under_way

    @property
    def state(self) -> QueueState | None:
        """The queue at the last look; None before the first one, and while the store is lost."""
        return self._watch.state

    @property
    def info(self) -> ModelInfo | None:
        """The model that most workers serve, those that are ready first; the last known where there is no worker."""
        return self._watch.info

    @property
    def store_losses(self) -> int:
        """Times that the store was lost, since the start."""
        return self._watch.losses

    @property
    def resubmitted(self) -> int:
        """Jobs submitted again, whole, since the start."""
        return self._keeping.resubmitted

    @property
    def late(self) -> Mapping[str, int]:
        """Deadlines missed since the start, by where the job was: "front", "queue" or "worker"."""
        return self._keeping.late

    @property
    def under_way(self) -> int:
        """Captions that requests wait for."""
        return len(self._under_way)

    @property
    def started(self) -> bool:
        """Whether this front ever got to where it can be of use: its own model loaded, or the store reached."""
        return self._watch.started

    def check_ready(self) -> ModelInfo:
        """The model that captions would come from.

        Raises `Problem` `stopping`, `unavailable`, `no_worker` or `not_ready` where none would come.
        """
        if self._draining:
            raise stopping()
        return self._watch.check_ready()

    async def check_room(self, depths: Mapping[Priority, int], priority: Priority | None) -> None:
        """Before a photo is sent. Raises `Problem` `overloaded` where the queue takes none of that priority now, for
        None: of any, and `unavailable`.

        The store is asked only where the last look saw the queue full: a look is soon old.
        """
        state = self.state
        if state is None or not _full(state, depths, priority):
            return
        state = await self._ask(self._broker.state())
        if _full(state, depths, priority):
            raise self._problem(QueueFullError(state.waiting[priority or "interactive"]))

    def clock(self) -> float:
        """The broker's time, seconds since 1970: what a job's deadline is told in."""
        return self._broker.clock()

    async def start(self) -> None:
        """Begins to listen, and returns at once: a store that is not there yet is waited for."""
        self._main = asyncio.create_task(self._keeping.run())

    async def drain(self, seconds: float) -> None:
        """Takes no more captions; returns when those under way are answered.

        After `seconds` the rest is told `stopping`, and their jobs are given up.
        """
        self._draining = True
        end = time.monotonic() + seconds
        while self._under_way and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for waiting in self._under_way:
            waiting.hear(stopping())
        end = time.monotonic() + GOODBYE_SECONDS
        while self._under_way and time.monotonic() < end:  # their requests wake up
            await asyncio.sleep(0.002)

    async def stop(self) -> None:
        """Ends at once, as `drain` does after its time."""
        await self.drain(0.0)
        await self._keeping.given_up()
        if self._main is not None:
            self._main.cancel()
            await asyncio.gather(self._main, return_exceptions=True)
        try:
            async with asyncio.timeout(self._store_seconds):
                await self._broker.close()
        except (BrokerLostError, TimeoutError):
            log.warning("the store is not there to take leave of")

    # Jobs -------------------------------------------------------------------------------------------------------------

    async def caption(self, job: Job) -> Answer:
        """The job's answer. Cancelling this gives the job up.

        Raises `Problem`: what the worker refused it for, and `stopping`, `unavailable`, `no_worker`, `overloaded`,
        `poison` and `deadline_exceeded`.
        """
        async with contextlib.aclosing(self.stream(job)) as said:
            async for each in said:
                if isinstance(each, Answer):
                    return each
        raise AssertionError("a stream ends with an answer or a problem")

    async def stream(self, job: Job) -> AsyncGenerator[Progress | Answer]:
        """The words of a job with `stream` as they come, then its answer. Where a later attempt begins, its number is
        higher and the words begin at 0 again.

        Raises `Problem`, as `caption`. To give the job up, close the iterator.
        """
        self._check_open()
        if job.deadline <= self._broker.clock():  # before it could be put into the queue
            self._keeping.late["front"] += 1
            raise _too_late()
        waiting = self._under_way.add(job)
        queued = True  # or perhaps so: a store that failed meanwhile does not say
        late = False
        try:
            try:
                async with asyncio.timeout(self._left(job)):
                    await self._keeping.submit(waiting)
            except (QueueFullError, NoWorkerError):
                queued = False
                raise
            while True:
                async with asyncio.timeout(self._left(job)):
                    said = await waiting.inbox.get()
                if not isinstance(said, Progress):
                    break
                yield said
            queued = isinstance(said, Problem)
        except TimeoutError as error:
            late = True
            raise _too_late() from error
        except BrokerError as error:
            raise self._problem(error) from error
        finally:
            self._under_way.remove(waiting)
            if queued:
                self._keeping.give_up(job.id, late)
        yield self._answer(said)

    async def enqueue(self, job: Job) -> None:
        """Submits a job that nobody waits for: `find` has its outcome, for as long as `job.kept` says.

        Raises `Problem` `stopping`, `unavailable`, `no_worker` or `overloaded`.
        """
        self._check_open()
        await self._ask(self._broker.submit(job))

    async def find(self, job_id: str) -> Found | None:
        """Where a job is, or its outcome. None: never known, given up, or known no more.

        Raises `Problem` `unavailable`.
        """
        return await self._ask(self._broker.find(job_id))

    async def give_up(self, job_id: str) -> None:
        """Nobody wants the job any more, nor its outcome. Raises `Problem` `unavailable`."""
        await self._ask(self._broker.forget(job_id))

    def _check_open(self) -> None:
        if self._draining:
            raise stopping()
        if self._watch.lost:
            raise unavailable()

    def _left(self, job: Job) -> float:
        return max(0.0, job.deadline - self._broker.clock())

    async def _ask(self, call: Coroutine[Any, Any, T]) -> T:
        """What the broker says. Raises `Problem`."""
        if self._watch.lost:
            call.close()
            raise unavailable()
        try:
            return await self._keeping.in_time(call)
        except BrokerError as error:
            raise self._problem(error) from error

    def _problem(self, error: BrokerError) -> Problem:
        """What a request is told of it."""
        if isinstance(error, QueueFullError):
            return Problem("overloaded", f"{error}.", retry_after=self._watch.rate.retry_after(error.waiting))
        if isinstance(error, NoWorkerError):
            return no_worker()
        self._watch.doubt(error)
        return unavailable()

    def _answer(self, said: Reply | Problem) -> Answer:
        """Raises `Problem`."""
        if isinstance(said, Problem):
            raise said
        if isinstance(said.outcome, Answer):
            return said.outcome
        if said.outcome.code == "deadline_exceeded":
            self._keeping.late["worker" if said.worker else "queue"] += 1  # the queue answers for no worker
        raise said.outcome.to_problem()


def _too_late() -> Problem:
    return Problem("deadline_exceeded", "The caption was not ready by the deadline (timeout_ms).")


def _full(state: QueueState, depths: Mapping[Priority, int], priority: Priority | None) -> bool:
    priorities = PRIORITIES if priority is None else (priority,)
    return all(state.waiting.get(each, 0) >= depths[each] for each in priorities)
