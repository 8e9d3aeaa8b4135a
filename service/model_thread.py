"""The one thread that has the model: it looks at photos, and words every caption in the making one step at a time.

The event loop hands `Work` over by `caption`; the thread alone touches the captioner. Invariants:

- Every work that was handed over ends: with a `Made`, with a `Problem`, or because its future was cancelled.
- A photo or caption that fails among others is tried again alone, so that what is wrong with it harms nobody else.
- After any failure nothing new is begun until a canary, a caption known to be good, went through.
- `progress` grows with every turn, the idle ones too: one that stands still is a thread that hangs or is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from model.caption import Caption, Regions
from model.exits import ResolvedSpeed, SpeedTable
from service.errors import Problem
from service.jobs import ModelInfo
from service.settings import Settings
from service.worker_metrics import Place, WorkerMetrics

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.05  # between two turns with nothing to do
RETRY_CANARY_SECONDS = 1.0  # between two tries, while the model fails
JOIN_SECONDS = 5.0  # how long a turn under way may take once the thread is told to stop

Span = tuple[float, float]  # when a stage began and ended, by time.monotonic()


class StepwiseCaptioner(Protocol):
    """What the thread uses of `model.captioner.Captioner`, which says what each does."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str: ...

    @property
    def extractor_revision(self) -> str: ...

    @property
    def layers(self) -> int: ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def speeds(self) -> SpeedTable: ...

    @property
    def device(self) -> str: ...

    @property
    def slots(self) -> int: ...

    @property
    def free(self) -> int: ...

    @property
    def busy(self) -> bool: ...

    def prepare(self, image: Image.Image) -> np.ndarray: ...

    def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]: ...

    def begin(
        self,
        batch: Sequence[Regions],
        speeds: Sequence[ResolvedSpeed],
        beams: Sequence[int],
        deadlines: Sequence[float],
    ) -> list[int]: ...

    def cancel(self, ticket: int) -> None: ...

    def step(self) -> None: ...

    def finished(self) -> list[tuple[int, Caption | str]]: ...

    def reset(self) -> None: ...


def bundle_loader(settings: Settings) -> Callable[[], StepwiseCaptioner]:
    """Loads the settings' bundle, and warms it up, when called."""

    def load() -> StepwiseCaptioner:
        from model.captioner import Captioner  # here and not above: it imports torch

        precision = None if settings.precision == "auto" else settings.precision
        captioner = Captioner.load(settings.bundle, settings.device, precision, settings.threads)
        captioner.warm_up()
        return captioner

    return load


class LateError(Problem):
    """The deadline passed; `place` says what the job was at, or waited for."""

    def __init__(self, place: Place) -> None:
        super().__init__("deadline_exceeded", "The deadline passed.")
        self.place: Place = place


@dataclass(frozen=True)
class Made:
    """A caption, and when what was done for it."""

    caption: Caption
    regions: Regions
    looked: Span | None  # None where the regions came with the work
    described: Span


@dataclass(eq=False)
class Work:
    """One caption to be made of `pixels`, or of `regions` where they are known. Once handed over it is the thread's."""

    photo: str  # what it is of: works of the same photo need one look
    speed: ResolvedSpeed
    beam: int
    deadline: float  # by time.monotonic(); may be put off at any time
    pixels: np.ndarray | None = None
    regions: Regions | None = None
    begun: bool = False  # as the event loop knows it: words are being made, or it has ended
    looked: Span | None = None
    since: float = 0.0  # when it was begun


_Outcome = Made | Exception


@dataclass(eq=False)
class _Handed:
    """A work and where its outcome goes."""

    work: Work
    future: asyncio.Future[Made]
    on_begun: Callable[[], None]


@dataclass(eq=False)
class _Order:
    """What the event loop tells the thread."""

    kind: Literal["caption", "cancel", "stop"]
    handed: _Handed | None = None


@dataclass
class _Hands:
    """What the thread has in hand."""

    unseen: deque[_Handed] = field(default_factory=deque)  # to be looked at
    seen: deque[_Handed] = field(default_factory=deque)  # to be begun
    making: dict[int, _Handed] = field(default_factory=dict)  # by ticket

    def remove(self, handed: _Handed) -> int | None:
        """Forgets it; returns its ticket where it was begun."""
        for waiting in (self.unseen, self.seen):
            if handed in waiting:
                waiting.remove(handed)
                return None
        found = [ticket for ticket, each in self.making.items() if each is handed]
        for ticket in found:
            del self.making[ticket]
        return found[0] if found else None


class ModelThread:
    """Starts the thread and talks to it. All public methods are called from one event loop."""

    def __init__(
        self,
        load: Callable[[], StepwiseCaptioner],
        metrics: WorkerMetrics,
        look_batch: int = 4,
        canary_seconds: float = 30.0,
    ) -> None:
        """`look_batch`: photos in one run of the extractor, at most. A canary runs when no caption went through for
        `canary_seconds`."""
        self._load = load
        self._metrics = metrics
        self._look_batch = look_batch
        self._canary_seconds = canary_seconds
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[ModelInfo] | None = None
        self._captioner: StepwiseCaptioner | None = None
        self._on_health: Callable[[], None] = lambda: None
        # Written by the thread and read by the event loop.
        self.progress = 0
        self.healthy = False
        self.last_success = 0.0  # by time.monotonic(); 0.0 before the first
        # The thread's own.
        self._hands = _Hands()
        self._suspect = False  # something failed, and no canary went through since
        self._next_canary = 0.0
        self._stepped = 0.0  # seconds spent on steps since the last look
        self._look_took = 0.0  # seconds, the last one

    @property
    def look_batch(self) -> int:
        return self._look_batch

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def captioner(self) -> StepwiseCaptioner:
        """For what never changes, and for `prepare`. Only after `start`."""
        assert self._captioner is not None, "the model has not been loaded"
        return self._captioner

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
        self._orders.put(_Order("stop"))
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, JOIN_SECONDS)

    async def caption(self, work: Work, on_begun: Callable[[], None] = lambda: None) -> Made:
        """The work done; cancelling it frees its slots. `on_begun` is called once its words are being made.

        Raises `Problem` for a deadline (`LateError`) or pixels that cannot be looked at, and what the model raised.
        """
        future: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        handed = _Handed(work, future, on_begun)
        self._orders.put(_Order("caption", handed))
        try:
            return await future
        except asyncio.CancelledError:
            self._orders.put(_Order("cancel", handed))
            raise

    # What follows runs in the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            captioner = self._load()
            _caption_canary(captioner)
        except BaseException as error:  # SystemExit too: nobody else would hear of it
            self._call(self._fail_start, error)
            return
        self._captioner = captioner
        self.last_success = time.monotonic()
        self.healthy = True
        self.progress += 1
        self._call(self._tell_start, _info(captioner))
        try:
            while self._obey(captioner):
                self._turn(captioner)
                self.progress += 1
        except BaseException:
            log.critical("the model thread died", exc_info=True)
            self.healthy = False

    def _obey(self, captioner: StepwiseCaptioner) -> bool:
        """Takes what the event loop said, waiting a moment where there is nothing else to do. False: stop."""
        idle = not captioner.busy and (self._suspect or not (self._hands.unseen or self._hands.seen))
        with contextlib.suppress(queue.Empty):
            order = self._orders.get(timeout=IDLE_SECONDS) if idle else self._orders.get_nowait()
            while True:
                if order.kind == "stop":
                    self._give_up(captioner)
                    return False
                assert order.handed is not None
                if order.kind == "cancel":
                    self._cancel(captioner, order.handed)
                else:
                    seen = order.handed.work.regions is not None
                    (self._hands.seen if seen else self._hands.unseen).append(order.handed)
                order = self._orders.get_nowait()
        return True

    def _turn(self, captioner: StepwiseCaptioner) -> None:
        self._expire()
        if self._canary_is_due(captioner):
            self._check(captioner)
        if not self._suspect:
            # A caption in the making waits for a look no longer than it was worked on since the last one.
            if self._hands.unseen and (not captioner.busy or self._stepped >= self._look_took):
                self._look(captioner)
            self._begin(captioner)
        if captioner.busy:
            self._step(captioner)

    def _expire(self) -> None:
        """Ends what was not begun by its deadline. The captioner sees to what was."""
        now = time.monotonic()
        waits: tuple[tuple[Place, deque[_Handed]], ...] = (("look", self._hands.unseen), ("describe", self._hands.seen))
        for place, waiting in waits:
            for handed in [each for each in waiting if each.work.deadline <= now]:
                waiting.remove(handed)
                self._end(handed, LateError(place))

    def _cancel(self, captioner: StepwiseCaptioner, handed: _Handed) -> None:
        ticket = self._hands.remove(handed)
        if ticket is not None:
            captioner.cancel(ticket)

    def _give_up(self, captioner: StepwiseCaptioner) -> None:
        captioner.reset()
        hands = self._hands
        for handed in [*hands.unseen, *hands.seen, *hands.making.values()]:
            self._end(handed, Problem("stopping", "The worker stopped before the caption was ready."))
        self._hands = _Hands()

    # Looking

    def _look(self, captioner: StepwiseCaptioner) -> None:
        """Finds the regions of the next photos, together; if that fails, of each alone."""
        photos: dict[str, list[_Handed]] = {}
        for handed in self._hands.unseen:
            if handed.work.photo in photos or len(photos) < self._look_batch:
                photos.setdefault(handed.work.photo, []).append(handed)
        for handed in [each for same in photos.values() for each in same]:
            self._hands.unseen.remove(handed)
        works = list(photos.values())
        begin = time.monotonic()
        try:
            self._look_at(captioner, works)
        except Exception:
            log.warning("looking at %d photos failed; trying each alone", len(works), exc_info=True)
            self._suspect = True
            for same in works:
                self._look_alone(captioner, same)
        self._look_took, self._stepped = time.monotonic() - begin, 0.0

    def _look_alone(self, captioner: StepwiseCaptioner, same: list[_Handed]) -> None:
        self.progress += 1
        try:
            self._look_at(captioner, [same])
        except Exception as error:
            for handed in same:
                self._end(handed, error)

    def _look_at(self, captioner: StepwiseCaptioner, photos: Sequence[Sequence[_Handed]]) -> None:
        """One run of the extractor over the photos, each wanted by one work or more. Raises what it raises."""
        begin = time.monotonic()
        found = captioner.look_at_pixels(np.stack([_pixels(same[0].work) for same in photos]))
        self._metrics.looked(len(photos))
        looked = (begin, time.monotonic())
        for regions, same in zip(found, photos, strict=True):
            for handed in same:
                handed.work.regions, handed.work.looked, handed.work.pixels = regions, looked, None
                self._hands.seen.append(handed)

    # Wording

    def _begin(self, captioner: StepwiseCaptioner) -> None:
        """Begins, in their order, as many as there are free slots for."""
        free, batch = captioner.free, []
        while self._hands.seen and self._hands.seen[0].work.beam <= free:
            batch.append(self._hands.seen.popleft())
            free -= batch[-1].work.beam
        if not batch:
            return
        try:
            self._begin_all(captioner, batch)
        except Exception:
            log.warning("beginning %d captions failed; trying each alone", len(batch), exc_info=True)
            self._suspect = True
            for handed in batch:
                try:
                    self._begin_all(captioner, [handed])
                except Exception as error:
                    self._end(handed, error)

    def _begin_all(self, captioner: StepwiseCaptioner, batch: Sequence[_Handed]) -> None:
        begin = time.monotonic()
        works = [handed.work for handed in batch]
        tickets = captioner.begin(
            [_regions(work) for work in works],
            [work.speed for work in works],
            [work.beam for work in works],
            [work.deadline for work in works],
        )
        for ticket, handed in zip(tickets, batch, strict=True):
            handed.work.since = begin
            self._hands.making[ticket] = handed
        self._call(_mark_begun, batch)  # once for all: each call wakes the event loop, and the words wait for that

    def _step(self, captioner: StepwiseCaptioner) -> None:
        begin = time.monotonic()
        self._metrics.stepped(len(self._hands.making))
        try:
            captioner.step()
            self._hand_out(captioner.finished())
        except Exception:
            log.warning("a step of %d captions failed; each alone", len(self._hands.making), exc_info=True)
            self._suspect = True
            self._make_each_alone(captioner)
        self._stepped += time.monotonic() - begin

    def _hand_out(self, over: Sequence[tuple[int, Caption | str]]) -> None:
        for ticket, outcome in over:
            handed = self._hands.making.pop(ticket, None)
            if handed is None:
                continue  # cancelled
            work = handed.work
            if isinstance(outcome, Caption):
                self._succeeded(handed, outcome)
            elif work.deadline > time.monotonic():  # put off since it was begun
                self._hands.seen.appendleft(handed)
            else:
                self._end(handed, LateError("describe"))

    def _make_each_alone(self, captioner: StepwiseCaptioner) -> None:
        """One by one what was in the making when a step failed: what fails alone is what is wrong."""
        captioner.reset()
        victims = list(self._hands.making.values())
        self._hands.making.clear()
        for handed in victims:
            self.progress += 1
            work = handed.work
            if handed.future.cancelled():
                continue
            if work.deadline <= time.monotonic():
                self._end(handed, LateError("describe"))
                continue
            try:
                self._succeeded(handed, _caption_alone(captioner, _regions(work), work.speed, work.beam))
            except Exception as error:
                captioner.reset()
                self._end(handed, error)

    def _succeeded(self, handed: _Handed, caption: Caption) -> None:
        now = time.monotonic()
        self.last_success = now
        work = handed.work
        self._end(handed, Made(caption, _regions(work), work.looked, (work.since, now)))
        self._metrics.captioned(caption)

    # Health

    def _canary_is_due(self, captioner: StepwiseCaptioner) -> bool:
        """It needs the captioner for itself; a suspect one gets nothing new, so that is soon."""
        if captioner.busy:
            return False
        now = time.monotonic()
        if self._suspect:
            return now >= self._next_canary
        return now >= self.last_success + self._canary_seconds

    def _check(self, captioner: StepwiseCaptioner) -> None:
        before = self.healthy
        try:
            _caption_canary(captioner)
        except Exception as error:
            again = "" if self.healthy else " again"  # how it came about is told once
            log.error("the canary caption failed%s: %r", again, error, exc_info=self.healthy)
            captioner.reset()
            self._suspect, self.healthy = True, False
            self._next_canary = time.monotonic() + RETRY_CANARY_SECONDS
        else:
            self._suspect, self.healthy = False, True
            self.last_success = time.monotonic()
        if self.healthy != before:
            log.log(logging.INFO if self.healthy else logging.ERROR, "the model %s", _HEALTH[self.healthy])
            self._call(self._on_health)

    # Back to the event loop

    def _end(self, handed: _Handed, outcome: _Outcome) -> None:
        self._call(_resolve, handed, outcome)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)

    def _tell_start(self, info: ModelInfo) -> None:
        if self._started is not None and not self._started.done():
            self._started.set_result(info)

    def _fail_start(self, error: BaseException) -> None:
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)


_HEALTH = {True: "captions again", False: "cannot caption at the moment"}


def _mark_begun(batch: Sequence[_Handed]) -> None:
    for handed in batch:
        handed.work.begun = True
        handed.on_begun()


def _resolve(handed: _Handed, outcome: _Outcome) -> None:
    handed.work.begun = True  # one that failed must not be given back as if nobody had tried
    future = handed.future
    if future.done():
        return  # cancelled
    if isinstance(outcome, Made):
        future.set_result(outcome)
    elif isinstance(outcome, StopIteration):  # which a future does not take
        future.set_exception(RuntimeError(repr(outcome)))
    else:
        future.set_exception(outcome)


def _pixels(work: Work) -> np.ndarray:
    assert work.pixels is not None, "neither pixels nor regions were handed over"
    return work.pixels


def _regions(work: Work) -> Regions:
    assert work.regions is not None
    return work.regions


def _caption_alone(captioner: StepwiseCaptioner, regions: Regions, speed: ResolvedSpeed, beam: int) -> Caption:
    """One caption with nothing else in the making. Raises what the captioner raises."""
    captioner.begin([regions], [speed], [beam], [float("inf")])
    while captioner.busy:
        captioner.step()
    [(_, caption)] = captioner.finished()
    assert isinstance(caption, Caption)
    return caption


def _caption_canary(captioner: StepwiseCaptioner) -> None:
    """Captions a grey ramp: if that goes through, so will photos. Raises what the captioner raises."""
    [regions] = captioner.look_at_pixels(captioner.prepare(Image.linear_gradient("L"))[None])
    _caption_alone(captioner, regions, captioner.speeds.resolve(), 1)


def _info(captioner: StepwiseCaptioner) -> ModelInfo:
    return ModelInfo(
        name=captioner.name,
        revision=captioner.revision,
        layers=captioner.layers,
        device=captioner.device,
        speeds=captioner.speeds,
        vocabulary_size=captioner.vocabulary_size,
    )
