"""The seam between the front and whatever captions: the `Engine` interface, and an engine that runs in this process."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from model.caption import Caption, Regions
from model.exits import SpeedTable, UnknownSpeedError
from service.errors import Problem
from service.images import ImageLimits, decode
from service.settings import Settings

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0  # how long a caption under way may take once the engine is told to stop
RETRY_CANARY_SECONDS = 1.0  # between two tries, while the model fails


@dataclass(frozen=True)
class ModelInfo:
    """What the engine serves."""

    name: str
    revision: str
    layers: int  # N of the decoder
    device: str
    speeds: SpeedTable
    vocabulary_size: int  # words, special ones included


@dataclass(frozen=True)
class Job:
    """One photo to caption. It carries the image as it came, which is small and can travel, and not its pixels."""

    image: bytes
    speed: str | float | None  # as asked for: the engine turns it into τ with its own table
    tau: float | None  # nats
    beam: int
    deadline: float  # by time.monotonic(), seconds


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds. `describe` is the encoder and the words."""

    queue: float
    decode_image: float
    look: float
    describe: float


@dataclass(frozen=True)
class Answer:
    """A job done."""

    caption: Caption
    regions: Regions
    timings: Timings


class Engine(Protocol):
    """What the front needs of an engine. All of it is called from the event loop."""

    @property
    def info(self) -> ModelInfo | None:
        """The model served; None until it has been loaded."""

    @property
    def ready(self) -> bool:
        """Whether a caption went through and none has failed since."""

    @property
    def waiting(self) -> int:
        """Jobs not yet begun."""

    async def start(self) -> None:
        """Returns once a canary caption went through. Raises what kept the model from loading."""

    async def stop(self) -> None:
        """Lets the caption under way finish and gives the waiting ones up."""

    async def caption(self, job: Job) -> Answer:
        """Raises `Problem` for bad images and speeds, a full queue or a deadline. Cancelling it gives the job up."""


class CaptionerLike(Protocol):
    """What `LocalEngine` uses of `model.captioner.Captioner`."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str: ...

    @property
    def layers(self) -> int: ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def speeds(self) -> SpeedTable: ...

    @property
    def device(self) -> str: ...

    def look(self, image: Image.Image) -> Regions: ...

    def describe(
        self, regions: Regions, speed: str | float | None = None, *, tau: float | None = None, beam: int = 1
    ) -> Caption: ...


def bundle_loader(settings: Settings) -> Callable[[], CaptionerLike]:
    """Loads the settings' bundle when called."""

    def load() -> CaptionerLike:
        from model.captioner import Captioner  # here and not above: it imports torch

        precision = None if settings.precision == "auto" else settings.precision
        captioner = Captioner.load(settings.bundle, settings.device, precision, settings.threads)
        captioner.warm_up()
        return captioner

    return load


@dataclass(frozen=True)
class _Waiting:
    """A job in the queue. Its future is cancelled where the client has gone."""

    job: Job
    future: Future[Answer]
    since: float


class LocalEngine:
    """One captioner in one thread of this process, fed by a bounded queue, one photo at a time.

    The thread loads the captioner itself and is the only one to touch it.
    """

    def __init__(self, load: Callable[[], CaptionerLike], limits: ImageLimits, queue_depth: int) -> None:
        self._load = load
        self._limits = limits
        self._queue_depth = queue_depth
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()  # None: stop
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._started: Future[None] = Future()
        self._started.set_running_or_notify_cancel()  # so that a cancelled `start` does not cancel it
        self._info: ModelInfo | None = None
        self._healthy = False
        self._stopping = False
        self._mean_seconds = 0.1  # per photo; a first guess that soon gives way to what is measured

    @property
    def info(self) -> ModelInfo | None:
        return self._info

    @property
    def ready(self) -> bool:
        return self._healthy and not self._stopping

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    async def start(self) -> None:
        self._thread.start()
        await asyncio.wrap_future(self._started)

    async def stop(self) -> None:
        self._stopping = True
        self._queue.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    async def caption(self, job: Job) -> Answer:
        if self._stopping:
            raise Problem("stopping", "The service is stopping; another one will answer.", retry_after=1)
        if not self._healthy:
            raise Problem("not_ready", "The model cannot caption at the moment.", retry_after=2)
        if self.waiting >= self._queue_depth:
            seconds = max(1, math.ceil(self.waiting * self._mean_seconds))
            raise Problem("overloaded", f"{self.waiting} photos are waiting already.", retry_after=seconds)
        waiting = _Waiting(job, Future(), time.monotonic())
        self._queue.put(waiting)
        return await asyncio.wrap_future(waiting.future)

    # What follows runs in the model thread.

    def _run(self) -> None:
        try:
            captioner = self._load()
            _canary(captioner)
        except BaseException as error:  # SystemExit too: nobody else would hear of it
            self._started.set_exception(error)
            return
        self._info = ModelInfo(
            name=captioner.name,
            revision=captioner.revision,
            layers=captioner.layers,
            device=captioner.device,
            speeds=captioner.speeds,
            vocabulary_size=captioner.vocabulary_size,
        )
        self._healthy = True
        self._started.set_result(None)
        while True:
            try:
                waiting = self._queue.get(timeout=None if self._healthy else RETRY_CANARY_SECONDS)
            except queue.Empty:
                self._healthy = self._canary_passes(captioner)
                continue
            if waiting is None or self._stopping:
                break
            self._take(captioner, waiting)
        self._give_up(waiting)

    def _take(self, captioner: CaptionerLike, waiting: _Waiting) -> None:
        """Does one job, and answers it whatever happens."""
        if not waiting.future.set_running_or_notify_cancel():
            return  # the client has gone
        begin = time.monotonic()
        try:
            waiting.future.set_result(self._answer(captioner, waiting.job, begin - waiting.since))
        except Problem as problem:
            waiting.future.set_exception(problem)
        except UnknownSpeedError as error:
            waiting.future.set_exception(Problem("unknown_speed", str(error)))
        except Exception as error:
            waiting.future.set_exception(error)
            # Is it this photo, or is the model broken from now on (a lost GPU)? A known good photo tells.
            self._healthy = self._canary_passes(captioner)
        else:
            self._mean_seconds += 0.1 * (time.monotonic() - begin - self._mean_seconds)

    def _answer(self, captioner: CaptionerLike, job: Job, queued: float) -> Answer:
        times = [time.monotonic()]

        def lap() -> None:
            times.append(time.monotonic())
            if times[-1] > job.deadline:  # the client has had its 504: save the rest of the work
                raise Problem("deadline_exceeded", "The deadline passed.")

        lap()
        image = decode(job.image, self._limits)
        lap()
        try:
            regions = captioner.look(image)
        except OSError as error:
            raise Problem("undecodable_image", "The pixels of the image cannot be decoded.") from error
        lap()
        caption = captioner.describe(regions, job.speed, tau=job.tau, beam=job.beam)
        _, begun, decoded, looked = times
        return Answer(caption, regions, Timings(queued, decoded - begun, looked - decoded, time.monotonic() - looked))

    def _canary_passes(self, captioner: CaptionerLike) -> bool:
        try:
            _canary(captioner)
        except Exception:
            log.exception("the canary caption failed; trying again every %g s", RETRY_CANARY_SECONDS)
            return False
        return True

    def _give_up(self, waiting: _Waiting | None) -> None:
        """Answers what is still in the queue when the engine stops."""
        while True:
            if waiting is not None and waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(Problem("stopping", "The service stopped before it got to the photo."))
            try:
                waiting = self._queue.get_nowait()
            except queue.Empty:
                return


def _canary(captioner: CaptionerLike) -> None:
    """Captions a grey ramp: if that goes through, so will photos. Raises what the captioner raises."""
    captioner.describe(captioner.look(Image.linear_gradient("L")))
