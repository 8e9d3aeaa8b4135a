"""Takes jobs from a broker, has their captions made, and answers: the event loop's side of a worker.

Invariants:

- Every delivered job ends in exactly one of: answered, given back, cancelled (given back too: nobody wants it).
- At most `look_ahead` jobs are in hand whose words are not being made yet; the rest stays with the broker, for others.
- The heart beats only while the model thread gets on with its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from model.exits import ResolvedSpeed, UnknownSpeedError
from model.threads import available_cores
from service.broker.base import BrokerError, BrokerLostError, Delivery, WorkerBroker
from service.errors import Problem
from service.feature_cache import FeatureCache, cache_key
from service.images import ImageLimits, decode
from service.jobs import Answer, Box, Job, ModelInfo, Refusal, Reply, Timings, WorkerState
from service.logs import RequestIds, current
from service.model_thread import LateError, Made, ModelThread, Span, Work
from service.trace import trace_id
from service.tracing import Tracing
from service.worker_metrics import WorkerMetrics

log = logging.getLogger(__name__)

TAKE_SECONDS = 0.25  # that one `take` waits for jobs: a stop waits as long, and an idle queue is asked so often
PREPARED = "1"  # to be raised whenever other pixels come of the same bytes: what was cached is then forgotten
UNDELIVERED_SECONDS = 5.0  # that an answer is kept for a lost broker, or until the job's deadline
HASHED_AT_ONCE = 256 * 1024  # bytes: 0.2 ms, which is less than to wake a thread and be woken by it
HANG_STATUS = 70  # EX_SOFTWARE of sysexits.h
INTERNAL = Refusal("internal", "The worker failed on this photo.")


@dataclass(eq=False)
class _Hand:
    """A delivered job, until it has ended."""

    delivery: Delivery
    since: float  # by time.monotonic(): when it was delivered
    deadline: float  # by time.monotonic()
    task: asyncio.Task[None] | None = None  # None: it waits until it is alone
    work: Work | None = None  # the caption in the making for it
    done: _Done | None = None  # the caption made for it
    answering: bool = False

    @property
    def begun(self) -> bool:
        return self.answering or (self.work is not None and self.work.begun)


@dataclass(frozen=True)
class _Done:
    """A caption and when what was done for it."""

    made: Made
    decoded: Span | None


@dataclass(eq=False)
class _Making:
    """A caption in the making, for all jobs that want the same."""

    work: Work
    task: asyncio.Task[_Done]
    wanted: int = 0  # jobs that wait for it


class Worker:
    """One worker on one event loop. `start` once, `stop` once."""

    def __init__(
        self,
        broker: WorkerBroker,
        model: ModelThread,
        limits: ImageLimits,
        cache: FeatureCache,
        metrics: WorkerMetrics,
        *,
        id: str = "",
        beat_seconds: float = 0.2,
        hang_seconds: float = 20.0,
        drain_seconds: float = 25.0,
        on_hang: Callable[[str], None] | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`id` must be like no other worker's; by default it is made of host, process and chance. `on_hang` gets the
        reason once the model thread made no progress for `hang_seconds`, or died; by default it ends the process."""
        self.id = id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._broker, self._model, self._limits = broker, model, limits
        self._cache, self._metrics, self._tracing = cache, metrics, tracing
        self._beat_seconds, self._hang_seconds, self._drain_seconds = beat_seconds, hang_seconds, drain_seconds
        self._on_hang = on_hang or end_process
        self._look_ahead = 2 * model.look_batch  # one batch is looked at while the next is decoded
        self._decoding = asyncio.Semaphore(min(self._look_ahead, available_cores()))  # a large photo takes 200 MB
        self._outage = _Outage()
        self._info: ModelInfo | None = None
        self._extractor = ""  # what looks at photos, known once the model has been loaded
        self._joined = False
        self._hands: set[_Hand] = set()
        self._making: dict[tuple[str, float, int], _Making] = {}
        self._owed: list[Delivery] = []  # to be given back
        self._aside: set[asyncio.Task[None]] = set()  # what nobody waits for
        self._changed = asyncio.Event()  # set whenever something happened that somebody may wait for
        self._stopping = asyncio.Event()
        self._left = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @property
    def info(self) -> ModelInfo | None:
        """The model served; None until it has been loaded."""
        return self._info

    @property
    def alive(self) -> bool:
        """Whether the model is being loaded, or its thread lives."""
        return self._info is None or self._model.alive

    @property
    def ready(self) -> bool:
        """Whether jobs are taken and captions go through."""
        return self._joined and self._model.healthy and not self._stopping.is_set() and not self._outage.lasts

    def state(self) -> WorkerState:
        """What the heartbeat says. Only after `start`."""
        assert self._info is not None
        return WorkerState(
            id=self.id,
            model=self._info,
            ready=self._model.healthy and not self._stopping.is_set(),
            slots=self._model.captioner.slots,
            running=len(self._hands),
            last_success=self._last_success(),
        )

    async def start(self) -> None:
        """Loads the model, then begins to beat and to take. Raises what kept the model from loading.

        A broker that is not there is waited for, after this has returned.
        """
        self._info = await self._model.start(self._on_health)
        captioner = self._model.captioner
        self._extractor = f"{captioner.extractor_revision}-{captioner.device}"
        self._metrics.joined(self._info, lambda: len(self._hands), self._last_success)
        self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Drains: takes no more, gives back what was not begun, finishes the rest within `drain_seconds`, leaves."""
        self._stopping.set()
        self._changed.set()
        if self._running is not None:
            await self._drain()
            self._left.set()
            await self._running
            await self._say_goodbye()
        await self._model.stop()
        await asyncio.gather(*self._aside, return_exceptions=True)
        await self._cache.close()
        await self._broker.close()

    # Beating and taking -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        for pause in _pauses():
            try:
                await self._broker.open()
                break
            except BrokerLostError as error:
                self._outage.begins(error)
                if await self._sleep(pause, self._stopping):
                    return
            except BrokerError as error:  # it answers, and cannot be worked with
                self._on_hang(f"the broker cannot be used: {error}")
                return
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._beat())
                both.create_task(self._take())
        except* Exception as errors:  # a heart that goes on beating would keep jobs waiting for ever
            log.critical("the worker failed", exc_info=errors)
            self._on_hang(f"the worker failed: {errors.exceptions[0]!r}")

    async def _beat(self) -> None:
        """Says that the worker lives, as long as the model thread gets on; else, that it hangs."""
        seen, still = -1, 0.0
        while True:
            if self._model.progress != seen:
                seen, still = self._model.progress, 0.0
                await self._beat_once()
            if not self._model.alive or still >= self._hang_seconds:
                self._on_hang("the model thread " + ("made no progress" if self._model.alive else "died"))
                return
            # Counted in turns and not by the clock: that goes on while the whole process is stopped.
            still += self._beat_seconds
            if await self._sleep(self._beat_seconds, self._left):
                return

    async def _beat_once(self) -> None:
        try:
            cancelled = await self._broker.beat(self.state())
        except BrokerLostError as error:
            self._outage.begins(error)
        except Exception:
            log.exception("the heartbeat failed")
        else:
            self._outage.ends()
            self._joined = True
            await self._let_go([hand for hand in self._hands if hand.delivery.job.id in cancelled], "cancelled")

    async def _take(self) -> None:
        pauses = _pauses()
        while True:
            await self._until(lambda: self._stopping.is_set() or (self._room > 0 and self._model.healthy))
            if self._stopping.is_set():
                return
            try:
                deliveries = await self._broker.take(self.id, self._room, TAKE_SECONDS)
            except Exception as error:
                if isinstance(error, BrokerLostError):
                    self._outage.begins(error)
                else:
                    log.exception("taking jobs failed")
                await self._sleep(next(pauses), self._stopping)
                continue
            pauses = _pauses()
            hands = [self._hold(delivery) for delivery in deliveries]
            if self._stopping.is_set() or not self._model.healthy:  # since it was asked
                await self._let_go(hands, "given_back")
                continue
            for hand in hands:
                if hand.delivery.alone:
                    await self._begin_alone(hand)
                else:
                    self._begin(hand)

    @property
    def _room(self) -> int:
        """Jobs that may be taken now."""
        return self._look_ahead - sum(not hand.begun for hand in self._hands)

    def _hold(self, delivery: Delivery) -> _Hand:
        now = time.monotonic()
        hand = _Hand(delivery, now, now + delivery.job.deadline - self._broker.clock())
        self._hands.add(hand)
        if delivery.attempt > 1:
            self._metrics.redelivered()
            log.warning("job %s comes for the %d. time", delivery.job.id, delivery.attempt)
        return hand

    def _begin(self, hand: _Hand) -> None:
        if hand in self._hands:  # and not let go while it waited
            hand.task = asyncio.create_task(self._work_on(hand))

    async def _begin_alone(self, hand: _Hand) -> None:
        """Waits until nothing is being worked on, begins, and waits until that has ended."""
        await self._until(lambda: hand not in self._hands or not any(other.task for other in self._hands))
        self._begin(hand)
        await self._until(lambda: hand not in self._hands or self._stopping.is_set())

    # One job ----------------------------------------------------------------------------------------------------------

    async def _work_on(self, hand: _Hand) -> None:
        """From a job in hand to its answer. Cancelled by `_let_go` alone, which sees to what then becomes of it."""
        job = hand.delivery.job
        current.set(RequestIds(job.request_id, trace_id(job.traceparent)))
        try:
            outcome = await self._outcome(hand)
            hand.answering = True
            self._changed.set()
            if self._tracing is not None:
                self._trace(self._tracing, hand, outcome)
            await self._answer(hand, outcome)
        finally:
            self._hands.discard(hand)
            self._changed.set()

    async def _outcome(self, hand: _Hand) -> Answer | Refusal:
        """Whatever happens, there is one."""
        try:
            hand.done = await self._caption(hand)
            return self._to_answer(hand, hand.done)
        except LateError as late:
            if time.monotonic() < hand.deadline:  # it had joined one that was just being given up
                return await self._outcome(hand)
            self._metrics.missed_deadline(late.place)
            return Refusal(late.code, late.detail)
        except Problem as problem:
            return Refusal(problem.code, problem.detail, problem.retry_after)
        except UnknownSpeedError as error:
            return Refusal("unknown_speed", str(error))
        except Exception:
            log.exception("job %s failed", hand.delivery.job.id)
            return INTERNAL

    async def _caption(self, hand: _Hand) -> _Done:
        """The caption that the job wants, made for it or for another that wants the same. Raises why there is none."""
        job = hand.delivery.job
        assert self._info is not None
        slots = self._model.captioner.slots
        if not 1 <= job.beam <= slots:  # it would wait for ever, and all behind it
            raise Problem("invalid_option", f"beam: must be from 1 to {slots}")
        speed = self._info.speeds.resolve(job.speed, job.tau)
        digest = await _digest(job.image)
        wanted = (digest, speed.tau, job.beam)
        making = self._making.get(wanted)
        if making is None:
            making = self._making[wanted] = self._start_making(job, digest, speed, hand.deadline)
        else:
            self._metrics.coalesced()
            making.work.deadline = max(making.work.deadline, hand.deadline)
        hand.work = making.work
        making.wanted += 1
        try:
            return await asyncio.shield(making.task)
        finally:
            making.wanted -= 1
            if not making.wanted:
                making.task.cancel()  # nobody wants it, or it is done
            if self._making.get(wanted) is making and (making.task.done() or not making.wanted):
                del self._making[wanted]

    def _start_making(self, job: Job, digest: str, speed: ResolvedSpeed, deadline: float) -> _Making:
        decoded = f"{PREPARED}-{self._limits.max_pixels}-{self._limits.min_side}"  # the limits: what was refused
        work = Work(cache_key(digest, self._extractor, decoded), speed, job.beam, deadline)
        return _Making(work, asyncio.create_task(self._make(work, job.image)))

    async def _make(self, work: Work, image: bytes) -> _Done:
        """Raises `Problem`, or what the model raised."""
        decoded = None
        work.regions = await self._cache.get(work.photo)
        self._metrics.cache_asked(self._cache.name, hit=work.regions is not None)
        if work.regions is None:
            async with self._decoding:
                begin = time.monotonic()
                if begin < work.deadline:
                    work.pixels = await asyncio.to_thread(self._to_pixels, image)
                decoded = (begin, time.monotonic())
            if work.deadline <= decoded[1]:
                raise LateError("decode")
        made = await self._model.caption(work, self._changed.set)
        if made.looked is not None:
            self._do_aside(self._cache.put(work.photo, made.regions))
        return _Done(made, decoded)

    def _to_pixels(self, image: bytes) -> np.ndarray:
        """Raises `Problem`."""
        picture = decode(image, self._limits)
        try:
            return self._model.captioner.prepare(picture)
        except Exception as error:  # Pillow's decoders raise all sorts of things
            raise Problem("undecodable_image", "The pixels of the image cannot be decoded.") from error

    def _to_answer(self, hand: _Hand, done: _Done) -> Answer:
        """The job's own answer: what it asked for, and its own timings. Raises `LateError`."""
        now = time.monotonic()
        if now >= hand.deadline:
            raise LateError("describe")
        assert self._info is not None
        job, made = hand.delivery.job, done.made
        decoding, looking, describing = (
            _length(span, hand.since) for span in (done.decoded, made.looked, made.described)
        )
        waited = hand.delivery.waited + max(0.0, now - hand.since - decoding - looking - describing)
        timings = Timings(waited, decoding, looking, describing)
        self._metrics.answered(timings)
        caption = replace(made.caption, speed=self._info.speeds.resolve(job.speed, job.tau))
        return Answer(caption, _boxes(made), timings, self._info.name, self._info.revision)

    def _trace(self, tracing: Tracing, hand: _Hand, outcome: Answer | Refusal) -> None:
        done, delivery = hand.done, hand.delivery
        times = (None, None, None) if done is None else (done.decoded, done.made.looked, done.made.described)
        try:
            tracing.worked(
                delivery.job,
                outcome,
                worker=self.id,
                attempt=delivery.attempt,
                waited=delivery.waited,
                since=hand.since,
                stages=list(zip(("decode_image", "look", "describe"), times, strict=True)),
            )
        except Exception:
            log.exception("job %s cannot be traced", delivery.job.id)  # and is answered all the same

    async def _answer(self, hand: _Hand, outcome: Answer | Refusal) -> None:
        """Answers, again and again while the broker is lost: it may have kept the job."""
        delivery = hand.delivery
        until = max(hand.deadline, time.monotonic() + UNDELIVERED_SECONDS)
        for pause in _pauses():
            try:
                ours = await self._broker.answer(self.id, delivery, Reply(delivery.job.id, outcome, self.id))
            except BrokerLostError as error:
                self._outage.begins(error)
                if time.monotonic() >= until or await self._sleep(pause, self._left):
                    break
            except Exception:
                log.exception("the answer to job %s cannot be sent", delivery.job.id)
                if outcome == INTERNAL:
                    break
                outcome = INTERNAL
            else:
                done = "answered" if isinstance(outcome, Answer) else outcome.code
                self._metrics.ended(done if ours else "not_ours")
                return
        self._metrics.ended("undelivered")
        log.warning("the answer to job %s is dropped: the broker did not take it", delivery.job.id)
        self._owed.append(delivery)  # once the broker is back: it would keep the job as this worker's for ever

    # Letting go -------------------------------------------------------------------------------------------------------

    def _on_health(self) -> None:
        """A model that fails takes no jobs; others may have those that it has not begun."""
        if not self._model.healthy:
            self._do_aside(self._let_go([hand for hand in self._hands if not hand.begun], "given_back"))
        self._changed.set()

    async def _let_go(self, hands: Iterable[_Hand], outcome: str) -> None:
        """Gives jobs back; those that are being answered stay. A cancelled one is then forgotten by the broker."""
        for hand in hands:
            if hand.answering or hand not in self._hands:
                continue
            self._hands.discard(hand)
            if hand.task is not None:
                hand.task.cancel()
            self._owed.append(hand.delivery)
            self._metrics.ended(outcome)
        self._changed.set()
        owed, self._owed = self._owed, []
        if not owed:
            return
        try:
            await self._broker.give_back(self.id, owed)
        except BrokerLostError as error:
            self._outage.begins(error)
            self._owed += owed  # to be given back with the next heartbeat
        except Exception:
            log.exception("%d jobs cannot be given back", len(owed))

    async def _drain(self) -> None:
        until = time.monotonic() + self._drain_seconds
        await self._let_go([hand for hand in self._hands if not hand.begun], "given_back")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
                await self._until(lambda: not self._hands)
        await self._let_go(list(self._hands), "given_back")

    async def _say_goodbye(self) -> None:
        """Jobs that were taken while it was being stopped go back too; then the worker is no longer waited for."""
        await self._let_go(list(self._hands), "given_back")
        await asyncio.gather(*(hand.task for hand in self._hands if hand.task), return_exceptions=True)
        try:
            await self._broker.leave(self.id)
        except BrokerLostError as error:
            self._outage.begins(error)

    # Small things -----------------------------------------------------------------------------------------------------

    def _last_success(self) -> float:
        """By the broker's clock."""
        return self._broker.clock() - (time.monotonic() - self._model.last_success)

    def _do_aside(self, what: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(what)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    @staticmethod
    async def _sleep(seconds: float, unless: asyncio.Event) -> bool:
        """Whether the event came about meanwhile."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(unless.wait(), seconds)
        return unless.is_set()


class _Outage:
    """Tells once that the broker was lost, and once that it is back: when the heart beats again, since what had begun
    before may still come to a good end."""

    def __init__(self) -> None:
        self.lasts = False

    def begins(self, error: BrokerLostError) -> None:
        if not self.lasts:
            self.lasts = True
            log.warning("the broker is lost, trying again: %s", error)

    def ends(self) -> None:
        if self.lasts:
            self.lasts = False
            log.info("the broker is back")


def end_process(reason: str) -> None:
    """Ends the process at once, for its supervisor to start a new one: a thread that hangs cannot be stopped."""
    log.critical("%s: the process ends", reason)
    logging.shutdown()
    os._exit(HANG_STATUS)


def _pauses() -> Iterator[float]:
    """Seconds between tries to reach the broker, without end."""
    seconds = 0.1
    while True:
        yield seconds
        seconds = min(2 * seconds, 2.0)


async def _digest(image: bytes) -> str:
    if len(image) <= HASHED_AT_ONCE:
        return hashlib.sha256(image).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(image).hexdigest())


def _length(span: Span | None, since: float) -> float:
    """Seconds of the span that came after `since`: a job that joined late has waited for the rest only."""
    return 0.0 if span is None else max(0.0, span[1] - max(span[0], since))


def _boxes(made: Made) -> tuple[Box, ...]:
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in made.regions.boxes.tolist())
