"""Takes jobs from a broker, has their captions made, and answers: the event loop's side of a worker.

Invariants:

- Every delivered job ends in exactly one of: answered, given back, cancelled (given back too: nobody wants it).
- At most `look_ahead` jobs are in hand whose words are not being made yet; the rest stays with the broker, for others.
- The heart beats only while the model thread gets on with its work.
- The words of a job that streams are told before its answer, and never after.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterable

from service.broker.base import BrokerError, BrokerLostError, Delivery, WorkerBroker
from service.caption_maker import CaptionMaker
from service.feature_cache import FeatureCache
from service.images import ImageLimits
from service.job_in_hand import INTERNAL, Hand, Outcomes, trace_job
from service.jobs import Answer, ModelInfo, Refusal, Reply, WorkerState
from service.logs import RequestIds, current
from service.model_thread import ModelThread
from service.outage import Outage, pauses
from service.speed_control import LoadLevel
from service.trace import trace_id
from service.tracing import Tracing
from service.word_teller import WordTeller
from service.worker_metrics import WorkerMetrics

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.2  # between heartbeats: the shortest timeout that the settings allow spans five
TAKE_SECONDS = 0.25  # that one `take` waits for jobs: a stop waits as long, and an idle queue is asked so often
UNDELIVERED_SECONDS = 5.0  # that an answer is kept for a lost broker, or until the job's deadline
HANG_STATUS = 70  # EX_SOFTWARE of sysexits.h


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
        beat_seconds: float = BEAT_SECONDS,
        hang_seconds: float = 20.0,
        stall_seconds: float = 5.0,
        load_seconds: float = 300.0,
        drain_seconds: float = 25.0,
        target_wait: float = 0.15,
        on_hang: Callable[[str], None] | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`id` must be like no other worker's; by default it is made of host, process and chance. `on_hang` gets the
        reason once the model thread made no progress for `hang_seconds`, died, or was not there after `load_seconds`;
        by default it ends the process. Without progress for `stall_seconds` the worker is not ready any more.
        `target_wait`: seconds in the queue above which jobs that allow it are sped up."""
        self.id = id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._broker, self._model, self._cache = broker, model, cache
        self._metrics, self._tracing = metrics, tracing
        self._beat_seconds, self._hang_seconds, self._drain_seconds = beat_seconds, hang_seconds, drain_seconds
        self._stall_seconds, self._load_seconds = stall_seconds, load_seconds
        self._still = 0.0  # seconds since the model thread last got on
        self._on_hang = on_hang or end_process
        self._look_ahead = 2 * model.look_batch  # one batch is looked at while the next is decoded
        self._changed = asyncio.Event()  # set whenever something happened that somebody may wait for
        self._maker = CaptionMaker(model, limits, cache, metrics, self._look_ahead, self._changed.set)
        self._teller = WordTeller(lambda words: broker.tell(self.id, words))
        self._load = LoadLevel(target_wait)
        self._outage = Outage()
        self._info: ModelInfo | None = None  # like the next, known once the model has been loaded
        self._outcomes: Outcomes | None = None
        self._joined = False
        self._hands: set[Hand] = set()
        self._owed: list[Delivery] = []  # to be given back
        self._aside: set[asyncio.Task[None]] = set()  # what nobody waits for
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
        gets_on = self._model.healthy and self._still < self._stall_seconds
        return self._joined and gets_on and not self._stopping.is_set() and not self._outage.lasts

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
        late = asyncio.get_running_loop().call_later(
            self._load_seconds, self._on_hang, f"the model was not loaded within {self._load_seconds:g} s"
        )
        try:
            self._info = await self._model.start(self._on_health)
        finally:
            late.cancel()
        self._maker.begin()
        self._outcomes = Outcomes(self._info, self._maker, self._teller, self._load, self._metrics)
        self._metrics.joined(self._info, lambda: len(self._hands), self._last_success, lambda: self._load.level)
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
        await self._maker.close()
        await self._teller.close()
        await self._cache.close()
        await self._broker.close()

    # Beating and taking -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        for pause in pauses():
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
        seen = -1
        while True:
            if self._model.progress != seen:
                seen, self._still = self._model.progress, 0.0
                await self._beat_once()
            if not self._model.alive or self._still >= self._hang_seconds:
                self._on_hang("the model thread " + ("made no progress" if self._model.alive else "died"))
                return
            # Counted in turns and not by the clock: that goes on while the whole process is stopped.
            self._still += self._beat_seconds
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
        tries = pauses()
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
                await self._sleep(next(tries), self._stopping)
                continue
            tries = pauses()
            self._load.took(time.monotonic(), deliveries)
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

    def _hold(self, delivery: Delivery) -> Hand:
        now = time.monotonic()
        hand = Hand(delivery, now, now + delivery.job.deadline - self._broker.clock())
        self._hands.add(hand)
        if delivery.attempt > 1:
            self._metrics.redelivered()
            job = delivery.job
            log.warning("job %s of request %s comes for the %d. time", job.id, job.request_id, delivery.attempt)
        return hand

    def _begin(self, hand: Hand) -> None:
        if hand in self._hands:  # and not let go while it waited
            hand.task = asyncio.create_task(self._work_on(hand))

    async def _begin_alone(self, hand: Hand) -> None:
        """Waits until nothing is being worked on, begins, and waits until that has ended."""
        await self._until(lambda: hand not in self._hands or not any(other.task for other in self._hands))
        self._begin(hand)
        await self._until(lambda: hand not in self._hands or self._stopping.is_set())

    # One job ----------------------------------------------------------------------------------------------------------

    async def _work_on(self, hand: Hand) -> None:
        """From a job in hand to its answer. Cancelled by `_let_go` alone, which sees to what then becomes of it."""
        job = hand.delivery.job
        current.set(RequestIds(job.request_id, trace_id(job.traceparent)))
        try:
            assert self._outcomes is not None
            outcome = await self._outcomes.of(hand)
            hand.answering = True
            self._changed.set()
            if self._tracing is not None:
                trace_job(self._tracing, self.id, hand, outcome)
            if hand.stream is not None:
                await self._teller.finish(hand.stream)
            await self._answer(hand, outcome)
        finally:
            if hand.stream is not None:
                self._teller.drop(hand.stream)
            self._hands.discard(hand)
            self._changed.set()

    async def _answer(self, hand: Hand, outcome: Answer | Refusal) -> None:
        """Answers, again and again while the broker is lost: it may have kept the job."""
        delivery = hand.delivery
        until = max(hand.deadline, time.monotonic() + UNDELIVERED_SECONDS)
        for pause in pauses():
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

    async def _let_go(self, hands: Iterable[Hand], outcome: str) -> None:
        """Gives jobs back; those that are being answered stay. A cancelled one is then forgotten by the broker."""
        for hand in hands:
            if hand.answering or hand not in self._hands:
                continue
            self._hands.discard(hand)
            if hand.task is not None:
                hand.task.cancel()
            if hand.stream is not None:
                self._teller.drop(hand.stream)
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
            async with asyncio.timeout(seconds):  # `wait_for` of Python 3.11 can lose a cancellation
                await unless.wait()
        return unless.is_set()


def end_process(reason: str) -> None:
    """Ends the process at once, for its supervisor to start a new one: a thread that hangs cannot be stopped."""
    log.critical("%s: the process ends", reason)
    logging.shutdown()
    os._exit(HANG_STATUS)
