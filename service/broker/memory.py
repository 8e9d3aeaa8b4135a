"""The broker inside one process: a front and its workers on one event loop, with nothing to install."""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush

from service.broker import rules
from service.broker.base import Delivery, Found, NoWorkerError, Place, QueueFullError
from service.jobs import PRIORITIES, Job, Priority, Progress, QueueState, Refusal, Reply, WorkerState


@dataclass(eq=False)
class _Entry:
    """A job that waits or runs."""

    job: Job
    number: int  # of the submission: its place in the queue, also when it comes back
    since: float  # by the clock
    attempt: int = 0  # tries begun
    handed_out: int = 0  # times, so that no two deliveries share a receipt
    worker: str | None = None  # that has it; None: it waits
    cancelled: bool = False

    @property
    def receipt(self) -> str:
        return f"{self.number}/{self.handed_out}"


@dataclass(frozen=True)
class _Done:
    """A job that was answered."""

    reply: Reply | None  # None: it was cancelled, nobody heard the answer
    worker: str
    receipt: str
    note: str  # of the job
    until: float  # by the clock: when to forget it


class MemoryBroker:
    """Both sides of `service.broker.base`, for one front. Not to be used from several threads or event loops.

    A worker that is not joined, by `beat`, is handed nothing. Where a dead worker's job was taken by nobody yet, the
    worker may still answer it.
    """

    def __init__(
        self,
        depths: Mapping[Priority, int],
        worker_timeout: float,
        tries: int,
        clock: Callable[[], float] | None = None,
        waiting_bytes: float = math.inf,
    ) -> None:
        """`depths`: jobs that may wait; `worker_timeout`: seconds between beats; `clock`: seconds since 1970;
        `waiting_bytes`: of the photos of all jobs that wait.

        By default the clock is this machine's as it is now, and steady from then on, whoever sets that.
        """
        started = time.time() - time.monotonic()
        self.clock = clock or (lambda: started + time.monotonic())
        self.dead_letters: deque[Job] = deque()
        self._depths = depths
        self._worker_timeout = worker_timeout
        self._tries = tries
        self._most_bytes = waiting_bytes
        self._entries: dict[str, _Entry] = {}  # by job id, waiting or running
        self._forgotten: dict[str, _Entry] = {}  # by receipt: running, and nothing is known of their ids any more
        self._waiting: dict[Priority, list[_Entry]] = {priority: [] for priority in PRIORITIES}  # by number
        self._waiting_bytes = 0  # of their photos
        self._done: dict[str, _Done] = {}  # by job id
        self._kept: dict[str, int] = {}  # bytes of those kept for longer than usual, the oldest first
        self._kept_bytes = 0  # of all of them
        self._fading: list[tuple[float, str]] = []  # a heap: when to forget which of them
        self._workers: dict[str, WorkerState] = {}
        self._beats: dict[str, float] = {}  # by worker: when it last beat, by the clock
        self._outbox: deque[Reply | Progress] = deque()
        self._replied = asyncio.Event()
        self._bell = asyncio.Event()  # of the moment; rung once, then replaced
        self._submitted = self._places = self._answered = self._redelivered = self._dead = 0

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    # The front's side.

    async def submit(self, job: Job) -> None:
        if await self.remind(job.id):
            return
        if not any(map(self._alive, self._beats)):
            raise NoWorkerError("no worker's heart beats")
        if (waiting := len(self._waiting[job.priority])) >= self._depths[job.priority]:
            raise QueueFullError(waiting)
        if self._waiting_bytes + len(job.image) > self._most_bytes:
            raise QueueFullError(waiting, f"the photos that wait make {self._waiting_bytes:,} bytes already")
        self._submitted += 1
        self._entries[job.id] = _Entry(job, self._submitted, self.clock())
        self._enqueue(self._entries[job.id])

    async def remind(self, job_id: str) -> bool:
        self._forget_old()
        if (done := self._done.get(job_id)) and done.reply:
            self._send(done.reply)
            return True
        if known := self._entries.get(job_id):
            known.cancelled = False  # somebody waits for it again
        return known is not None

    async def replies(self) -> Sequence[Reply | Progress]:
        while not self._outbox:
            self._replied.clear()
            await self._replied.wait()
        replies = tuple(self._outbox)
        self._outbox.clear()
        return replies

    async def cancel(self, job_id: str) -> Place | None:
        self._outbox = deque(said for said in self._outbox if said.job_id != job_id)
        entry = self._entries.get(job_id)
        if entry is None or entry.cancelled:
            return None
        entry.cancelled = True
        if entry.worker is not None:
            return "running"
        self._leave_queue(entry)
        del self._entries[job_id]
        return "queued"

    async def forget(self, job_id: str) -> None:
        await self.cancel(job_id)
        self._drop(job_id)
        if running := self._entries.pop(job_id, None):
            self._forgotten[running.receipt] = running

    async def find(self, job_id: str) -> Found | None:
        self._forget_old()
        entry = self._entries.get(job_id)
        if entry is not None and not entry.cancelled and entry.job.deadline <= self.clock():
            if entry.worker is None:
                self._leave_queue(entry)
            if entry.worker is None or not self._alive(entry.worker):
                self._refuse(entry, rules.TOO_LATE)  # perhaps no worker ever comes for it
        if (done := self._done.get(job_id)) and done.reply:
            return Found("done", reply=done.reply, note=done.note)
        if entry is None or entry.cancelled:
            return None
        if entry.worker is not None:
            return Found("running", note=entry.job.note)
        queue = self._waiting[entry.job.priority]
        place = bisect_left(queue, entry.number, key=lambda other: other.number)
        return Found("queued", place, note=entry.job.note)

    async def state(self) -> QueueState:
        waits = [self.clock() - queue[0].since for queue in self._waiting.values() if queue]
        return QueueState(
            waiting={priority: len(queue) for priority, queue in self._waiting.items()},
            oldest=max([0.0, *waits]),
            answered=self._answered,
            redelivered=self._redelivered,
            dead=self._dead,
            workers=tuple(state for worker, state in self._workers.items() if self._alive(worker)),
        )

    # The worker's side.

    async def beat(self, state: WorkerState) -> frozenset[str]:
        self._workers[state.id] = state
        self._beats[state.id] = self.clock()
        entries = (*self._entries.values(), *self._forgotten.values())
        return frozenset(entry.job.id for entry in entries if entry.worker == state.id and entry.cancelled)

    async def take(self, worker: str, count: int, seconds: float) -> Sequence[Delivery]:
        until = time.monotonic() + seconds
        while True:
            bell = self._bell
            deliveries = self._draw(worker, count)
            left = until - time.monotonic()
            if deliveries or left <= 0:
                return deliveries
            # No bell rings when a worker dies: look again and again.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, self._worker_timeout / 4)):
                    await bell.wait()

    async def answer(self, worker: str, delivery: Delivery, reply: Reply) -> bool:
        entry = self._owned(worker, delivery)
        if self._forgotten.pop(delivery.receipt, None):
            return True
        if entry is None:
            done = self._done.get(delivery.job.id)
            return done is not None and (done.worker, done.receipt) == (worker, delivery.receipt)
        self._finish(entry, reply)
        return True

    async def tell(self, worker: str, words: Sequence[tuple[Delivery, Progress]]) -> None:
        for delivery, progress in words:
            entry = self._owned(worker, delivery)
            if entry and not entry.cancelled:
                self._send(progress)

    async def give_back(self, worker: str, deliveries: Collection[Delivery]) -> None:
        for delivery in deliveries:
            self._forgotten.pop(delivery.receipt, None)
            if entry := self._owned(worker, delivery):
                entry.attempt -= 1
                self._requeue(entry)

    async def leave(self, worker: str) -> None:
        self._workers.pop(worker, None)
        self._beats.pop(worker, None)
        for entry in [entry for entry in self._entries.values() if entry.worker == worker]:
            entry.attempt -= 1  # it ends in order: not the job's fault
            self._requeue(entry)
        self._forget_of({worker})

    # What follows does one step each, with no await in it: nothing can come between.

    def _alive(self, worker: str) -> bool:
        return self._beats.get(worker, float("-inf")) > self.clock() - self._worker_timeout

    def _owned(self, worker: str, delivery: Delivery) -> _Entry | None:
        entry = self._entries.get(delivery.job.id)
        return entry if entry and entry.worker == worker and entry.receipt == delivery.receipt else None

    def _draw(self, worker: str, count: int) -> list[Delivery]:
        """Hands out what there is for this worker."""
        drawn: list[Delivery] = []
        if not self._alive(worker):
            return drawn
        self._take_over()
        size = 0
        while len(drawn) < count and size < rules.TAKE_BYTES and (entry := self._next()) is not None:
            alone = entry.attempt > 0
            if alone and drawn:
                break  # it comes next time
            drawn.append(self._hand_out(entry, worker))
            size += len(entry.job.image)
            if alone:
                break
        return drawn

    def _next(self) -> _Entry | None:
        """The job whose turn it is. Those before it whose deadline has passed are answered."""
        for priority in rules.turn(self._places):
            queue = self._waiting[priority]
            while queue and queue[0].job.deadline <= self.clock():
                late = queue[0]
                self._leave_queue(late)
                self._refuse(late, rules.TOO_LATE)
            if queue:
                return queue[0]
        return None

    def _hand_out(self, entry: _Entry, worker: str) -> Delivery:
        self._leave_queue(entry)
        self._places += 1
        entry.worker = worker
        entry.attempt += 1
        entry.handed_out += 1
        return Delivery(entry.job, entry.attempt, self.clock() - entry.since, entry.receipt)

    def _take_over(self) -> None:
        """Puts the jobs of dead workers back, or gives them up."""
        dead = {worker for worker in self._beats if not self._alive(worker)}
        if not dead:
            return
        for entry in [entry for entry in self._entries.values() if entry.worker in dead]:
            if entry.attempt < self._tries or entry.cancelled:
                self._redelivered += not entry.cancelled
                self._requeue(entry)
            else:
                self._bury(entry)
        self._forget_of(dead)
        for worker in dead:
            del self._beats[worker]
            self._workers.pop(worker, None)

    def _bury(self, entry: _Entry) -> None:
        self._dead += 1
        self.dead_letters.append(entry.job)
        while len(self.dead_letters) > rules.DEAD_LETTERS_KEPT or (
            len(self.dead_letters) > 1 and self._dead_bytes() > rules.DEAD_BYTES_KEPT
        ):
            self.dead_letters.popleft()
        self._refuse(entry, rules.POISON)

    def _forget_of(self, workers: Collection[str]) -> None:
        """They have no job any more."""
        self._forgotten = {receipt: entry for receipt, entry in self._forgotten.items() if entry.worker not in workers}

    def _dead_bytes(self) -> int:
        return sum(len(job.image) for job in self.dead_letters)

    def _requeue(self, entry: _Entry) -> None:
        entry.worker = None
        if entry.cancelled:
            del self._entries[entry.job.id]
        else:
            self._enqueue(entry)

    def _enqueue(self, entry: _Entry) -> None:
        insort(self._waiting[entry.job.priority], entry, key=lambda other: other.number)
        self._waiting_bytes += len(entry.job.image)
        self._bell.set()
        self._bell = asyncio.Event()

    def _leave_queue(self, entry: _Entry) -> None:
        self._waiting[entry.job.priority].remove(entry)
        self._waiting_bytes -= len(entry.job.image)

    def _refuse(self, entry: _Entry, refusal: Refusal) -> None:
        entry.worker = None  # what the one that had it says of it later is refused
        self._finish(entry, Reply(entry.job.id, refusal))

    def _finish(self, entry: _Entry, reply: Reply) -> None:
        """Forgets the entry, and sends the reply if anybody waits for it."""
        del self._entries[entry.job.id]
        heard = None if entry.cancelled else reply
        until = self.clock() + max(rules.REPLY_KEPT, entry.job.kept)
        self._drop(entry.job.id)
        self._done[entry.job.id] = _Done(heard, entry.worker or "", entry.receipt, entry.job.note, until)
        heappush(self._fading, (until, entry.job.id))
        self._forget_old()
        if heard and entry.job.kept > rules.REPLY_KEPT:
            self._keep(entry.job.id, len(heard.to_wire()) + len(entry.job.note.encode()))
        if heard:
            self._answered += 1
            self._send(heard)

    def _keep(self, job_id: str, size: int) -> None:
        """Counts an outcome. Where all together are too large, the oldest go."""
        self._kept[job_id] = size
        self._kept_bytes += size
        while self._kept_bytes > rules.KEPT_BYTES:
            self._drop(next(iter(self._kept)))

    def _drop(self, job_id: str) -> None:
        """Forgets an outcome, if there is one."""
        self._done.pop(job_id, None)
        self._kept_bytes -= self._kept.pop(job_id, 0)

    def _send(self, said: Reply | Progress) -> None:
        self._outbox.append(said)
        self._replied.set()

    def _forget_old(self) -> None:
        while self._fading and self._fading[0][0] <= (now := self.clock()):
            _, job_id = heappop(self._fading)
            if (done := self._done.get(job_id)) and done.until <= now:  # and not answered once more since
                self._drop(job_id)
