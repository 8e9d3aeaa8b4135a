"""The front's side of the queue: jobs in, answers out, and what the front knows of workers and queue meanwhile.

A job belongs to the request that waits for it. It is kept until it is answered, and submitted again under its id when
the store was lost, so an answer is late at worst. When the request ends without an answer, its job is given up, and
only its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from service.broker.base import BrokerError, BrokerLostError, FrontBroker, NoWorkerError, QueueFullError
from service.errors import KINDS, Problem
from service.jobs import Answer, Job, ModelInfo, QueueState, Reply, WorkerState
from service.retry_after import DrainRate

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25  # between two looks at workers and queue: soon enough for a probe, rare enough for the store
READY_SECONDS = 60.0  # that a worker's last caption may be ago: an idle one makes a canary every 30
STORE_SECONDS = 2.0  # that the store may take for one call before it counts as lost
FIRST_BACKOFF, LAST_BACKOFF = 0.1, 2.0  # seconds
RESUBMIT_SECONDS = 5.0  # a store can lose a job and nobody hears of it; asking again sends the photo again
REFUSED_AGAIN_SECONDS = 0.5  # until the next try for a job that was in the queue once and finds it full or unserved
COME_BACK_SECONDS = 2  # Retry-After where no rate can tell: a worker or a store that is being restarted


@dataclass
class _Outstanding:
    """A job that a request waits for."""

    job: Job
    reply: asyncio.Future[Reply]
    due: float | None = None  # by time.monotonic(), when to submit it again; None until it was taken


class Front:
    """One front. All of it runs in one event loop."""

    def __init__(
        self,
        broker: FrontBroker,
        *,
        own_worker: bool = False,
        poll_seconds: float = POLL_SECONDS,
        resubmit_seconds: float = RESUBMIT_SECONDS,
        store_seconds: float = STORE_SECONDS,
    ) -> None:
        """`own_worker`: this process starts a worker too, so that having none yet means that it loads."""
        self._broker = broker
        self._own_worker = own_worker
        self._poll_seconds = poll_seconds
        self._resubmit_seconds = resubmit_seconds
        self._store_seconds = store_seconds
        self._outstanding: dict[str, _Outstanding] = {}
        self._state: QueueState | None = None
        self._info: ModelInfo | None = None
        self._rate = DrainRate()
        self._lost = False
        self._look_now = asyncio.Event()
        self._draining = False
        self._main: asyncio.Task[None] | None = None
        self._giving_up: set[asyncio.Task[None]] = set()
        # Since the start:
        self.resubmitted = 0  # jobs submitted again
        self.store_losses = 0  # times that the store was lost
        self.late: Counter[str] = Counter()  # deadlines missed: "front", by its own clock; "worker", as it was told

    @property
    def state(self) -> QueueState | None:
        """The queue at the last look; None before the first one, and while the store is lost."""
        return None if self._lost else self._state

    @property
    def info(self) -> ModelInfo | None:
        """The model that most workers serve, those that are ready first; the last known where there is no worker."""
        return self._info

    @property
    def under_way(self) -> int:
        """Captions that requests wait for."""
        return len(self._outstanding)

    @property
    def started(self) -> bool:
        """Whether this front ever got to where it can be of use: its own model loaded, or the store reached."""
        return self._info is not None if self._own_worker else self._state is not None

    def check_ready(self) -> ModelInfo:
        """The model that captions would come from.

        Raises `Problem` `stopping`, `unavailable`, `no_worker` or `not_ready` where none would come.
        """
        if self._draining:
            raise _stopping()
        if self._lost:
            raise _unavailable()
        if self._own_worker and self._info is None:
            raise Problem("not_ready", "The model is being loaded.", retry_after=COME_BACK_SECONDS)
        if self._state is None:
            raise Problem("not_ready", "The front is starting.", retry_after=COME_BACK_SECONDS)
        if self._info is None or not self._state.workers:
            raise _no_worker()
        since = self._broker.clock() - READY_SECONDS
        if not any(worker.ready and worker.last_success >= since for worker in self._state.workers):
            raise Problem(
                "not_ready", "The model is loaded, but cannot caption at the moment.", retry_after=COME_BACK_SECONDS
            )
        return self._info

    def clock(self) -> float:
        """The broker's time, seconds since 1970: what a job's deadline is told in."""
        return self._broker.clock()

    async def start(self) -> None:
        """Begins to listen, and returns at once: a store that is not there yet is waited for."""
        self._main = asyncio.create_task(self._run())

    async def drain(self, seconds: float) -> None:
        """Takes no more captions; returns when those under way are answered.

        After `seconds` the rest is told `stopping`, and their jobs are given up.
        """
        self._draining = True
        end = time.monotonic() + seconds
        while self._outstanding and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for waiting in self._outstanding.values():
            if not waiting.reply.done():
                waiting.reply.set_exception(_stopping())
        while self._outstanding:  # their requests wake up
            await asyncio.sleep(0.002)

    async def stop(self) -> None:
        """Ends at once, as `drain` does after its time."""
        await self.drain(0.0)
        await asyncio.gather(*self._giving_up, return_exceptions=True)
        if self._main is not None:
            self._main.cancel()
            await asyncio.gather(self._main, return_exceptions=True)
        try:
            async with asyncio.timeout(self._store_seconds):
                await self._broker.close()
        except (BrokerLostError, TimeoutError):
            log.warning("the store is not there to take leave of")

    async def caption(self, job: Job) -> Answer:
        """The job's answer. Cancelling this gives the job up.

        Raises `Problem`: what the worker refused it for, and `stopping`, `unavailable`, `no_worker`, `overloaded`,
        `poison` and `deadline_exceeded`.
        """
        if self._draining:
            raise _stopping()
        if self._lost:
            raise _unavailable()
        waiting = _Outstanding(job, asyncio.get_running_loop().create_future())
        self._outstanding[job.id] = waiting
        queued = True  # or perhaps so: a store that was lost meanwhile does not say
        try:
            async with asyncio.timeout(max(0.0, job.deadline - self._broker.clock())):
                await self._submit(waiting)
                reply = await waiting.reply
            queued = False
        except TimeoutError as error:
            self.late["front"] += 1
            raise Problem("deadline_exceeded", "The caption was not ready by the deadline (timeout_ms).") from error
        except QueueFullError as error:
            queued = False
            seconds = self._rate.retry_after(error.waiting)
            raise Problem("overloaded", f"{error.waiting} photos are waiting already.", retry_after=seconds) from error
        except NoWorkerError as error:
            queued = False
            raise _no_worker() from error
        except BrokerLostError as error:
            self._mark_lost(error)
            raise _unavailable() from error
        finally:
            del self._outstanding[job.id]
            if queued:
                self._give_up(job.id)
        if isinstance(reply.outcome, Answer):
            return reply.outcome
        if reply.outcome.code == "deadline_exceeded":
            self.late["worker"] += 1
        # A worker newer than this front may know codes that this front does not.
        code = reply.outcome.code if reply.outcome.code in KINDS else "internal"
        raise Problem(code, reply.outcome.detail, retry_after=reply.outcome.retry_after)

    async def _submit(self, waiting: _Outstanding) -> None:
        """Raises `QueueFullError`, `NoWorkerError`, `BrokerLostError`, the last one also where it takes too long."""
        try:
            async with asyncio.timeout(self._store_seconds):
                await self._broker.submit(waiting.job)
        except TimeoutError as error:
            raise BrokerLostError("the store took too long to take a job") from error
        waiting.due = time.monotonic() + self._resubmit_seconds

    def _give_up(self, job_id: str) -> None:
        """Tells the broker so, on its own: the request that ends must not wait for that, nor stop it."""

        async def tell() -> None:
            try:
                async with asyncio.timeout(self._store_seconds):
                    await self._broker.cancel(job_id)
            except (BrokerLostError, TimeoutError):
                log.debug("job %s is given up, and the store was not told", job_id)  # it is done for nobody at worst

        task = asyncio.create_task(tell())
        self._giving_up.add(task)
        task.add_done_callback(self._giving_up.discard)

    async def _run(self) -> None:
        opened = False

        async def open_it() -> None:
            nonlocal opened
            await self._broker.open()
            opened = True

        await self._repeat(open_it, lambda: opened)
        async with asyncio.TaskGroup() as group:
            for step in (self._receive, self._look, self._submit_again):
                group.create_task(self._repeat(step))

    async def _repeat(self, step: Callable[[], Awaitable[None]], enough: Callable[[], bool] = lambda: False) -> None:
        """The step, again and again; where it fails, after a pause that grows while it does."""
        pause = FIRST_BACKOFF
        while not enough():
            try:
                await step()
                pause = FIRST_BACKOFF
                continue
            except (BrokerError, TimeoutError) as error:
                self._mark_lost(error)
            except Exception:  # a fault of ours, or a reply that is none: the other requests must go on
                log.exception("the front failed at one thing and goes on with the next")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_BACKOFF)

    async def _receive(self) -> None:
        for reply in await self._broker.replies():
            waiting = self._outstanding.get(reply.job_id)
            if waiting is not None and not waiting.reply.done():  # else nobody waits any more
                waiting.reply.set_result(reply)

    async def _look(self) -> None:
        async with asyncio.timeout(self._store_seconds):
            state = await self._broker.state()
        self._state = state
        self._rate.saw(time.monotonic(), state.answered, sum(state.waiting.values()))
        if state.workers:
            self._info = _most_served(state.workers, self._info)
        if self._lost:
            log.warning("the store is back: %d jobs are submitted again", len(self._outstanding))
            self._lost = False
            for waiting in self._outstanding.values():
                if waiting.due is not None:
                    waiting.due = 0.0
        self._look_now.clear()
        with contextlib.suppress(TimeoutError):
            # The own worker, being loaded, is looked for in memory: that costs nothing, and somebody waits for it.
            pause = self._poll_seconds if self._info or not self._own_worker else self._poll_seconds / 10
            await asyncio.wait_for(self._look_now.wait(), pause)

    async def _submit_again(self) -> None:
        """Those that are due: all after the store was lost, and the others once in a while."""
        for waiting in list(self._outstanding.values()):
            if self._lost:
                break
            if waiting.due is None or waiting.due > time.monotonic() or waiting.reply.done():
                continue
            try:
                await self._submit(waiting)
                self.resubmitted += 1
            except (QueueFullError, NoWorkerError):  # it was accepted once: it has until its deadline
                waiting.due = time.monotonic() + REFUSED_AGAIN_SECONDS
            if waiting.job.id not in self._outstanding:
                self._give_up(waiting.job.id)  # its request ended meanwhile, and the job may be there again
        await asyncio.sleep(self._poll_seconds)

    def _mark_lost(self, error: Exception) -> None:
        if not self._lost:
            self._lost = True
            self._look_now.set()  # it may be a moment's trouble of one connection
            self.store_losses += 1
            log.warning("the store is lost: %s", error)


def _most_served(workers: Collection[WorkerState], known: ModelInfo | None) -> ModelInfo:
    """The model of most workers, of the ready ones where there are any; between equals the one `known`."""
    asked = [worker.model for worker in workers if worker.ready] or [worker.model for worker in workers]
    count = Counter(model.revision for model in asked)
    most = [model for model in asked if count[model.revision] == max(count.values())]
    return next((model for model in most if known is not None and model.revision == known.revision), most[0])


def _stopping() -> Problem:
    return Problem("stopping", "The service is stopping; another one will answer.", retry_after=1)


def _unavailable() -> Problem:
    return Problem("unavailable", "The queue cannot be reached at the moment.", retry_after=COME_BACK_SECONDS)


def _no_worker() -> Problem:
    return Problem("no_worker", "No worker is there to caption.", retry_after=COME_BACK_SECONDS)
