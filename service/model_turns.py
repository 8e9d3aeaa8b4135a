"""What the model thread does, turn by turn: it looks at photos, and words every caption in the making a step at a time.

This thread alone touches the captioner. Invariants:

- Photos of equal shape, and captions, share runs of the network; one that fails among others is tried again alone, so
  that what is wrong with it harms nobody else.
- After any failure nothing new is begun until a canary, a caption known to be good, went through.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from model.caption import Caption, Regions
from service.errors import Problem
from service.handover import Handed, LateError, Made, News, Outcome, Work, hear, mark_begun, resolve
from service.jobs import ModelInfo
from service.patience import Patience
from service.stepwise import StepwiseCaptioner, caption_alone, caption_canary, model_info
from service.worker_metrics import Place, WorkerMetrics

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.05  # between two turns with nothing to do
RETRY_CANARY_SECONDS = 1.0  # between two tries, while the model fails


class Post(Protocol):
    """Has the event loop call the function."""

    def __call__(self, function: Callable[..., object], *args: object) -> None: ...


@dataclass(eq=False)
class Order:
    """What the event loop tells the thread."""

    kind: Literal["caption", "cancel", "stop"]
    handed: Handed | None = None


@dataclass
class _Hands:
    """What the thread has in hand."""

    unseen: deque[Handed] = field(default_factory=deque)  # to be looked at
    seen: deque[Handed] = field(default_factory=deque)  # to be begun
    making: dict[int, Handed] = field(default_factory=dict)  # by ticket

    def remove(self, handed: Handed) -> int | None:
        """Forgets it; returns its ticket where it was begun."""
        for waiting in (self.unseen, self.seen):
            if handed in waiting:
                waiting.remove(handed)
                return None
        found = [ticket for ticket, each in self.making.items() if each is handed]
        for ticket in found:
            del self.making[ticket]
        return found[0] if found else None


class ModelTurns:
    """`run` is the thread; all the rest is its own, but for what is said below to be written for the event loop."""

    def __init__(
        self,
        load: Callable[[], StepwiseCaptioner],
        orders: queue.SimpleQueue[Order],
        metrics: WorkerMetrics,
        look_batch: int,
        canary_seconds: float,
        patience: Patience,
        *,
        post: Post,
        on_loaded: Callable[[ModelInfo], None],
        on_load_failed: Callable[[BaseException], None],
        on_health: Callable[[], None],
    ) -> None:
        """The `on_...` are called on the event loop, by `post`."""
        self._load, self._orders, self._metrics = load, orders, metrics
        self._look_batch, self._canary_seconds, self._patience = look_batch, canary_seconds, patience
        self._post, self._on_loaded, self._on_load_failed, self._on_health = post, on_loaded, on_load_failed, on_health
        # Written here and read by the event loop.
        self.progress = 0
        self.healthy = False
        self.last_success = 0.0  # by time.monotonic(); 0.0 before the first
        self.captioner: StepwiseCaptioner | None = None
        # The thread's own.
        self._hands = _Hands()
        self._suspect = False  # something failed, and no canary went through since
        self._next_canary = 0.0
        self._stepped = 0.0  # seconds spent on steps since the last look
        self._look_took = 0.0  # seconds, the last one

    def run(self) -> None:
        """Loads the model, and makes turns until it is told to stop."""
        try:
            captioner = self._load()
            begin = time.monotonic()
            caption_canary(captioner)
        except BaseException as error:  # SystemExit too: nobody else would hear of it
            self._post(self._on_load_failed, error)
            return
        self.last_success = time.monotonic()
        self._patience.expect(self.last_success - begin, self._look_batch)
        self.captioner = captioner
        self.healthy = True
        self.progress += 1
        self._post(self._on_loaded, model_info(captioner))
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
        waits: tuple[tuple[Place, deque[Handed]], ...] = (("look", self._hands.unseen), ("describe", self._hands.seen))
        for place, waiting in waits:
            for handed in [each for each in waiting if each.work.deadline <= now]:
                waiting.remove(handed)
                self._end(handed, LateError(place))

    def _cancel(self, captioner: StepwiseCaptioner, handed: Handed) -> None:
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
        photos = self._take_photos()
        begin = time.monotonic()
        try:
            self._look_at(captioner, photos)
        except Exception:
            log.warning("looking at %d photos failed; trying each alone", len(photos), exc_info=True)
            self._suspect = True
            for same in photos:
                self._look_alone(captioner, same)
        else:
            self._patience.saw(time.monotonic() - begin, len(photos))
        self._look_took, self._stepped = time.monotonic() - begin, 0.0

    def _take_photos(self) -> list[list[Handed]]:
        """The photo that has waited longest and those that can be stacked with it, each with all works of it.

        The embedded extractor's photos are all of one size. A detector's are not: those of other sizes wait for their
        own look, which comes next.
        """
        photos: dict[str, list[Handed]] = {}
        shape = _pixels(self._hands.unseen[0]).shape
        for handed in self._hands.unseen:
            fits = len(photos) < self._look_batch and _pixels(handed).shape == shape
            if handed.work.photo in photos or fits:
                photos.setdefault(handed.work.photo, []).append(handed)
        for handed in [each for same in photos.values() for each in same]:
            self._hands.unseen.remove(handed)
        return list(photos.values())

    def _look_alone(self, captioner: StepwiseCaptioner, same: list[Handed]) -> None:
        self.progress += 1
        try:
            self._look_at(captioner, [same])
        except Exception as error:
            for handed in same:
                self._end(handed, error)

    def _look_at(self, captioner: StepwiseCaptioner, photos: Sequence[Sequence[Handed]]) -> None:
        """One run of the extractor over the photos, each wanted by one work or more. Raises what it raises."""
        begin = time.monotonic()
        found = captioner.look_at_pixels(np.stack([_pixels(same[0]) for same in photos]))
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

    def _begin_all(self, captioner: StepwiseCaptioner, batch: Sequence[Handed]) -> None:
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
        self._post(mark_begun, batch)  # once for all: each call wakes the event loop, and the words wait for that

    def _step(self, captioner: StepwiseCaptioner) -> None:
        begin = time.monotonic()
        self._metrics.stepped(len(self._hands.making))
        try:
            captioner.step()
            self._hand_out(captioner.finished())
            self._hand_words(captioner)
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

    def _hand_words(self, captioner: StepwiseCaptioner) -> None:
        """The new words of the captions that stream, all at once: each call wakes the event loop."""
        news = []
        for ticket, handed in self._hands.making.items():
            if handed.work.streams and (words := captioner.words_so_far(ticket, handed.told)):
                news.append(News(handed, handed.told, words))
                handed.told += len(words)
        if news:
            self._post(hear, news)

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
                self._succeeded(handed, caption_alone(captioner, _regions(work), work.speed, work.beam))
            except Exception as error:
                captioner.reset()
                self._end(handed, error)

    def _succeeded(self, handed: Handed, caption: Caption) -> None:
        now = time.monotonic()
        self.last_success = now
        work, attention = handed.work, None
        if work.attention:
            assert self.captioner is not None
            try:
                attention = self.captioner.attention(_regions(work), caption)
            except Exception as error:
                log.warning("where the words of a caption looked cannot be told", exc_info=True)
                self._suspect = True
                self._end(handed, error)
                return
        self._end(handed, Made(caption, _regions(work), work.looked, (work.since, now), attention))
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
            caption_canary(captioner)
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
            self._post(self._on_health)

    # Back to the event loop

    def _end(self, handed: Handed, outcome: Outcome) -> None:
        self._post(resolve, handed, outcome)


_HEALTH = {True: "captions again", False: "cannot caption at the moment"}


def _pixels(handed: Handed) -> np.ndarray:
    assert handed.work.pixels is not None, "neither pixels nor regions were handed over"
    return handed.work.pixels


def _regions(work: Work) -> Regions:
    assert work.regions is not None
    return work.regions
