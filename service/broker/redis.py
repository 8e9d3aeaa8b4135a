"""The broker between machines: fronts and workers meet in Redis Streams. `scripts/common.lua` lists the keys."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from service.broker.base import BrokerError, BrokerLostError, Delivery, Found, NoWorkerError, Place, QueueFullError
from service.broker.redis_reading import Reading
from service.broker.redis_store import BLOCK_SECONDS, Entry, Store, StoreFullError
from service.broker.rules import for_scripts
from service.jobs import PRIORITIES, Job, Priority, Progress, QueueState, Reply, WorkerState

PLACES: Mapping[bytes | None, Place] = {b"queued": "queued", b"running": "running"}
START = "0-0"  # before the first entry of any stream


@dataclass
class _Hands:
    """What one worker has in hand, as far as this process knows."""

    held: dict[str, str] = field(default_factory=dict)  # receipt -> job id
    turn: int = 0  # number of its latest beat or take
    free: asyncio.Lock = field(default_factory=asyncio.Lock)  # held until what a turn drew is in `held`


class RedisBroker:
    """Both sides of `service.broker.base`, over Redis 6.2 or newer. One object per process, on one event loop.

    A worker that is not joined, by `beat`, is handed nothing. Where a dead worker's job was taken by nobody yet, the
    worker may still answer it. A worker's id must not be used by two processes, nor by two objects of this class.

    After the server came back empty, and after any failure, `replies` raises `BrokerLostError` once or twice: what
    was submitted before may be gone. Until a worker has beaten again, `submit` then raises `NoWorkerError`.

    All calls, the worker's too, may be cancelled: jobs drawn by a cancelled `take` are given back.
    """

    def __init__(self, url: str, queue: str, depths: Mapping[Priority, int], worker_timeout: float, tries: int) -> None:
        """`queue`: its name; `depths`: jobs that may wait; `worker_timeout`: seconds without a beat.

        The last three must be the same in all processes. Raises `BrokerError` for a URL that is none.
        """
        self._store = Store(url)
        self._queue = f"{{deecap:{queue}}}"
        self._depths = depths
        self._worker_timeout = worker_timeout
        self._rules = for_scripts(worker_timeout, tries)
        self._reads = Reading()
        self._ahead = time.time() - time.monotonic()  # of the broker's time, before the local monotonic clock
        # The front's side.
        self._front = ""
        self._epoch: bytes | None = None
        self._read_to = START  # the last reply that was returned
        self._reading: asyncio.Task[tuple[Sequence[Entry], bytes | None]] | None = None
        self._failures_told = 0
        self._submitting: dict[str, asyncio.Task[None]] = {}  # by job id
        # The worker's side.
        self._hands: defaultdict[str, _Hands] = defaultdict(_Hands)  # by worker

    async def open(self) -> None:
        """Raises `BrokerLostError` where no server answers, `BrokerError` where it is one that would lose jobs."""
        await self._store.open()
        self._front = secrets.token_hex(8)
        self._read_to = START
        self._reading = None
        self._failures_told = self._store.failures
        await self._store.safely(self._enter())

    async def close(self) -> None:
        await self._store.close()

    def clock(self) -> float:
        """Redis's time, as of the last `open`, `beat` or `state`; in between the local monotonic clock runs on."""
        return time.monotonic() + self._ahead

    # The front's side.

    async def submit(self, job: Job) -> None:
        task = self._store.start(self._submit(job))
        self._submitting[job.id] = task
        task.add_done_callback(lambda _: self._submitting.pop(job.id, None))
        await self._store.result(task)

    async def remind(self, job_id: str) -> bool:
        (known,) = await self._store.safely(self._run("remind", job_id, self._front))
        return bool(known)

    async def replies(self) -> Sequence[Reply | Progress]:
        while True:
            if self._store.failures > self._failures_told:
                self._failures_told = self._store.failures
                raise BrokerLostError(f"{self._store.address}: lost for a while")
            if replies := await self._read_replies():
                return replies

    async def cancel(self, job_id: str) -> Place | None:
        return await self._cancel(job_id, self._front)

    async def forget(self, job_id: str) -> None:
        await self._cancel(job_id, "")

    async def find(self, job_id: str) -> Found | None:
        return self._reads.found(await self._store.safely(self._run("find", job_id)))

    async def state(self) -> QueueState:
        return await self._store.safely(self._state())

    # The worker's side.

    async def beat(self, state: WorkerState) -> frozenset[str]:
        return await self._store.safely(self._beat(state))

    async def take(self, worker: str, count: int, seconds: float) -> Sequence[Delivery]:
        until = time.monotonic() + seconds
        while True:
            drawing = self._store.start(self._draw(worker, count))
            try:
                bell, deliveries = await self._store.result(drawing)
            except asyncio.CancelledError:
                self._store.start(self._return_drawn(worker, drawing))
                raise
            left = until - time.monotonic()
            if deliveries or left <= 0:
                return deliveries
            # No bell rings when a worker dies: look again and again.
            pause = min(left, self._worker_timeout / 4)
            listening = self._store.start(self._store.wait(f"{self._queue}:bell", bell, pause), blocks=True)
            await self._store.result(listening)

    async def answer(self, worker: str, delivery: Delivery, reply: Reply) -> bool:
        return await self._store.safely(self._answer(worker, delivery, reply))

    async def tell(self, worker: str, words: Sequence[tuple[Delivery, Progress]]) -> None:
        rows = [(delivery.receipt, delivery.job.id, progress.to_wire()) for delivery, progress in words]
        if rows:
            with suppress(BrokerError):
                await self._store.safely(self._run("tell", worker, *(each for row in rows for each in row)))

    async def give_back(self, worker: str, deliveries: Collection[Delivery]) -> None:
        await self._store.safely(self._give_back(worker, deliveries))

    async def leave(self, worker: str) -> None:
        await self._store.safely(self._leave(worker))

    async def _cancel(self, job_id: str, front: str) -> Place | None:
        if submitting := self._submitting.get(job_id):
            await asyncio.wait({submitting})  # it must not come after this
        (place,) = await self._store.safely(self._run("cancel", job_id, front))
        return PLACES.get(place)

    # What follows runs in tasks of the store, to its end.

    async def _run(self, script: str, *arguments: str | bytes | int | float) -> list[bytes]:
        """Its answer; most scripts answer with a list, the rest with nothing or a number."""
        answer = await self._store.script(script, self._queue, self._rules, *arguments)
        return answer if isinstance(answer, list) else [answer]

    async def _enter(self) -> None:
        asked = time.monotonic()
        told, self._epoch = await self._run("open")
        self._set_clock(told, asked)

    async def _submit(self, job: Job) -> None:
        wire = job.to_wire()
        depth = self._depths[job.priority]
        about = (job.id, job.priority, self._front, repr(float(job.deadline)), depth)
        after = (repr(float(job.kept)), job.note)
        try:
            outcome, *waiting = await self._run("submit", *about, *after, wire["job"], wire["image"])
        except StoreFullError as error:
            waits = (await self._state()).waiting[job.priority]
            raise QueueFullError(waits, "the queue's memory is full") from error
        if outcome == b"no_worker":
            raise NoWorkerError("no worker's heart beats")
        if outcome == b"full":
            raise QueueFullError(int(waiting[0]))

    async def _read_replies(self) -> list[Reply | Progress]:
        """Those that came within a second, or earlier if one came. A cancelled call's reading goes on in the next."""
        if self._reading is None:
            stream, epoch_key = f"{self._queue}:replies:{self._front}", f"{self._queue}:epoch"
            reading = self._store.read_on(stream, self._read_to, BLOCK_SECONDS, epoch_key)
            self._reading = self._store.start(reading, blocks=True)
        try:
            entries, epoch = await self._store.result(self._reading)
        except BrokerLostError:
            self._reading = None
            self._failures_told = self._store.failures
            raise
        self._reading = None
        if epoch != self._epoch:
            # Entries that came with it are still there for the next call.
            self._epoch, self._read_to = epoch, START
            raise BrokerLostError(f"{self._store.address}: came back empty")
        if entries:
            self._read_to = entries[-1][0].decode()
        return [said for _, fields in entries if (said := self._reads.heard(fields)) is not None]

    async def _state(self) -> QueueState:
        asked = time.monotonic()
        now, interactive, batch, oldest, answered, redelivered, dead, *workers = await self._run("state")
        self._set_clock(now, asked)
        return QueueState(
            waiting=dict(zip(PRIORITIES, (int(interactive), int(batch)), strict=True)),
            oldest=float(oldest),
            answered=int(answered),
            redelivered=int(redelivered),
            dead=int(dead),
            workers=tuple(state for wire in workers if (state := self._reads.worker(wire)) is not None),
        )

    async def _beat(self, state: WorkerState) -> frozenset[str]:
        hands = self._hands[state.id]
        async with hands.free:
            hands.turn += 1
            pairs = [part for pair in hands.held.items() for part in pair]
            asked = time.monotonic()
            now, *cancelled = await self._run("beat", state.id, state.to_wire(), hands.turn, *pairs)
            self._set_clock(now, asked)
            # One of them may have been answered meanwhile.
            return frozenset(job_id for receipt in cancelled if (job_id := hands.held.get(receipt.decode())))

    async def _draw(self, worker: str, count: int) -> tuple[str, list[Delivery]]:
        """The bell as it was last rung, and what there was to take."""
        hands = self._hands[worker]
        async with hands.free:
            hands.turn += 1
            bell, *rows = await self._store.script("take", self._queue, self._rules, worker, count, hands.turn)
            deliveries = []
            for receipt, attempt, waited, job_id, job, image in rows:
                read = self._reads.job(job_id, job, image)
                if read is None:
                    await self._run("bury", worker, receipt)
                    continue
                deliveries.append(Delivery(read, int(attempt), float(waited), receipt.decode()))
                hands.held[receipt.decode()] = read.id
            return bell.decode(), deliveries

    async def _return_drawn(self, worker: str, drawing: asyncio.Task[tuple[str, list[Delivery]]]) -> None:
        """Gives back what a cancelled `take` drew for nobody."""
        _, deliveries = await drawing
        await self._give_back(worker, deliveries)

    async def _answer(self, worker: str, delivery: Delivery, reply: Reply) -> bool:
        receipt = delivery.receipt
        (owned,) = await self._run("answer", worker, receipt, delivery.job.id, reply.to_wire())
        self._hands[worker].held.pop(receipt, None)
        return bool(owned)

    async def _give_back(self, worker: str, deliveries: Collection[Delivery]) -> None:
        receipts = [delivery.receipt for delivery in deliveries]
        if receipts:
            await self._run("give_back", worker, *receipts)
        for receipt in receipts:
            self._hands[worker].held.pop(receipt, None)

    async def _leave(self, worker: str) -> None:
        async with self._hands[worker].free:
            await self._run("leave", worker)
        self._hands.pop(worker, None)

    def _set_clock(self, now: bytes, asked: float) -> None:
        """`now` is Redis's time at some moment between `asked` and this one, by the local monotonic clock."""
        self._ahead = float(now) - (asked + time.monotonic()) / 2
