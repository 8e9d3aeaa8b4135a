"""What a front knows of workers and queue: asked for again and again, and why no caption would come now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection

from service.broker.base import BrokerError, FrontBroker
from service.errors import Problem
from service.jobs import ModelInfo, QueueState, WorkerState
from service.retry_after import DrainRate

log = logging.getLogger(__name__)

READY_SECONDS = 60.0  # that a worker's last caption may be ago: an idle one makes a canary every 30
COME_BACK_SECONDS = 2  # Retry-After where no rate can tell: a worker or a store that is being restarted


class QueueWatch:
    """The store counts as lost while it does not tell its state."""

    def __init__(
        self,
        broker: FrontBroker,
        on_back: Callable[[], None],
        *,
        own_worker: bool,
        poll_seconds: float,
        store_seconds: float,
    ) -> None:
        """`on_back` is called when the store that was lost answers again."""
        self.rate = DrainRate()
        self.losses = 0  # times that the store was lost
        self.lost = False
        self.info: ModelInfo | None = None  # that most workers serve, the ready ones first; the last known without any
        self._broker = broker
        self._on_back = on_back
        self._own_worker = own_worker
        self._poll_seconds = poll_seconds
        self._store_seconds = store_seconds
        self._state: QueueState | None = None
        self._look_now = asyncio.Event()

    @property
    def state(self) -> QueueState | None:
        """The queue at the last look; None before the first one, and while the store is lost."""
        return None if self.lost else self._state

    @property
    def started(self) -> bool:
        """Whether there ever was something to work with: the own model loaded, or the store reached."""
        return self.info is not None if self._own_worker else self._state is not None

    def check_ready(self) -> ModelInfo:
        """The model that captions would come from.

        Raises `Problem` `unavailable`, `no_worker` or `not_ready` where none would come.
        """
        if self.lost:
            raise unavailable()
        if self._own_worker and self.info is None:
            raise _not_ready("The model is being loaded.")
        if self._state is None:
            raise _not_ready("The front is starting.")
        if self.info is None or not self._state.workers:
            raise no_worker()
        since = self._broker.clock() - READY_SECONDS
        if not any(worker.ready and worker.last_success >= since for worker in self._state.workers):
            raise _not_ready("The model is loaded, but cannot caption at the moment.")
        return self.info

    async def look(self) -> None:
        """Asks once, and waits until it is time to ask again. Raises `BrokerError` or `TimeoutError`: it is lost."""
        try:
            async with asyncio.timeout(self._store_seconds):
                state = await self._broker.state()
        except (BrokerError, TimeoutError) as error:
            self.mark_lost(error)
            raise
        self._state = state
        self.rate.saw(time.monotonic(), state.answered, sum(state.waiting.values()))
        if state.workers:
            self.info = _most_served(state.workers, self.info)
        if self.lost:
            log.warning("the store is back")
            self.lost = False
            self._on_back()
        self._look_now.clear()
        with contextlib.suppress(TimeoutError):
            # The own worker, being loaded, is looked for in memory: that costs nothing, and somebody waits for it.
            pause = self._poll_seconds if self.info or not self._own_worker else self._poll_seconds / 10
            async with asyncio.timeout(pause):  # `wait_for` of Python 3.11 can lose a cancellation, and a stop with it
                await self._look_now.wait()

    def doubt(self, error: Exception) -> None:
        """The store failed at something. It may be one connection's trouble, or one large photo: a look will tell."""
        log.info("the store failed at one thing: %s", error)
        self._look_now.set()

    def mark_lost(self, error: Exception) -> None:
        if not self.lost:
            self.lost = True
            self.losses += 1
            log.warning("the store is lost: %s", str(error) or type(error).__name__)


def _most_served(workers: Collection[WorkerState], known: ModelInfo | None) -> ModelInfo:
    """The model of most workers, of the ready ones where there are any; between equals the one `known`."""
    asked = [worker.model for worker in workers if worker.ready] or [worker.model for worker in workers]
    count = Counter(model.revision for model in asked)
    most = [model for model in asked if count[model.revision] == max(count.values())]
    return next((model for model in most if known is not None and model.revision == known.revision), most[0])


def stopping() -> Problem:
    return Problem("stopping", "The service is stopping; another one will answer.", retry_after=1)


def unavailable() -> Problem:
    return Problem("unavailable", "The queue cannot be reached at the moment.", retry_after=COME_BACK_SECONDS)


def no_worker() -> Problem:
    return Problem("no_worker", "No worker is there to caption.", retry_after=COME_BACK_SECONDS)


def _not_ready(why: str) -> Problem:
    return Problem("not_ready", why, retry_after=COME_BACK_SECONDS)
