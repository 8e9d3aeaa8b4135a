"""The one thread that has the model, as the event loop sees it: works go in by `caption`, captions come out.

What the thread does is in `service.model_turns`. Invariants:

- Every work that was handed over ends: with a `Made`, with a `Problem`, or because its future was cancelled.
- `progress` grows with every turn, the idle ones too: one that stands still is a thread that hangs or is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable

from service.handover import Handed, Made, OnWords, Work
from service.jobs import ModelInfo
from service.model_turns import ModelTurns, Order
from service.patience import Patience
from service.stepwise import StepwiseCaptioner
from service.worker_metrics import WorkerMetrics

JOIN_SECONDS = 5.0  # how long a turn under way may take once the thread is told to stop


class ModelThread:
    """Starts the thread and talks to it. All public methods are called from one event loop."""

    def __init__(
        self,
        load: Callable[[], StepwiseCaptioner],
        metrics: WorkerMetrics,
        look_batch: int = 4,
        canary_seconds: float = 30.0,
        patience: Patience | None = None,
    ) -> None:
        """`look_batch`: photos in one run of the extractor, at most. A canary runs when no caption went through for
        `canary_seconds`. `patience` says how long a run may take."""
        self._look_batch = look_batch
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._turns = ModelTurns(
            load,
            self._orders,
            metrics,
            look_batch,
            canary_seconds,
            patience or Patience(),
            post=self._post,
            on_loaded=self._tell_start,
            on_load_failed=self._fail_start,
            on_health=lambda: self._on_health(),
        )
        self._thread = threading.Thread(target=self._turns.run, name="model", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[ModelInfo] | None = None
        self._on_health: Callable[[], None] = lambda: None

    @property
    def look_batch(self) -> int:
        return self._look_batch

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def progress(self) -> int:
        """Turns made."""
        return self._turns.progress

    @property
    def healthy(self) -> bool:
        """Whether captions go through."""
        return self._turns.healthy

    @property
    def last_success(self) -> float:
        """When a caption last went through, by time.monotonic(); 0.0 before the first."""
        return self._turns.last_success

    @property
    def captioner(self) -> StepwiseCaptioner:
        """For what never changes, and for `prepare`. Only after `start`."""
        captioner = self._turns.captioner
        assert captioner is not None, "the model has not been loaded"
        return captioner

    async def start(self, on_health: Callable[[], None] = lambda: None) -> ModelInfo:
        """Returns once a canary caption went through. Raises what kept the model from loading.

        `on_health` is called on the event loop whenever `healthy` has changed.
        """
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        self._on_health = on_health
        self._thread.start()
        return await self._started

    async def stop(self) -> None:
        """Ends the thread after its turn, and whatever it has in hand with `stopping`."""
        self._orders.put(Order("stop"))
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, JOIN_SECONDS)

    async def caption(
        self, work: Work, on_begun: Callable[[], None] = lambda: None, on_words: OnWords = lambda begin, words: None
    ) -> Made:
        """The work done; cancelling it frees its slots.

        `on_begun` is called once its words are being made; `on_words`, where the work streams, for those decided since
        the last call, each word once and in order. A beam's are not among them, nor need be the last ones: the caption
        has them all. Raises `Problem` for a deadline (`LateError`) or pixels that cannot be looked at, and what the
        model raised.
        """
        future: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        handed = Handed(work, future, on_begun, on_words)
        self._orders.put(Order("caption", handed))
        try:
            return await future
        except asyncio.CancelledError:
            self._orders.put(Order("cancel", handed))
            raise

    def _post(self, function: Callable[..., object], *args: object) -> None:
        """Called in the thread: has the event loop call the function."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)

    def _tell_start(self, info: ModelInfo) -> None:
        if self._started is not None and not self._started.done():
            self._started.set_result(info)

    def _fail_start(self, error: BaseException) -> None:
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)
