"""The one interface of all brokers, and what each of them promises.

- A job that `submit` took is answered exactly once to its front, as long as the front lives and no store is lost:
  by the worker that has it, or by the broker itself where its deadline passed in the queue or every try was fatal.
- A worker has a job until it answers it, gives it back, or is dead. It is dead when it has not called `beat` for
  `worker_timeout` seconds; others then get its jobs. What it says of them later is refused (`answer` gives False).
- A job whose worker died may be what killed it: from the second try on it is handed out `alone`. After `tries` tries it
  is a dead letter, kept for the operator, and its front is told `poison`.
- Time is the broker's: `clock` is the same on all machines, however wrong their own clocks are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from service.jobs import Job, QueueState, Reply, WorkerState


class BrokerError(Exception):
    """A broker cannot do what was asked."""


class QueueFullError(BrokerError):
    """As many jobs of this priority wait as may. Whoever submitted it may try again later."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} jobs are waiting already")
        self.waiting = waiting


class NoWorkerError(BrokerError):
    """No worker's heart beats: nobody would take the job."""


class BrokerLostError(BrokerError):
    """The store behind the broker does not answer. What it held may be gone: fronts submit their jobs again."""


@dataclass(frozen=True)
class Delivery:
    """A job in a worker's hands."""

    job: Job
    attempt: int  # 1 the first time
    waited: float  # seconds in the queue
    receipt: str  # by which the broker knows it again

    @property
    def alone(self) -> bool:
        """Whether it must be worked on with nothing beside it, since it may have killed its worker."""
        return self.attempt > 1


class FrontBroker(Protocol):
    """What a front needs. All of it raises `BrokerLostError`, and may be cancelled at any await without harm."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def clock(self) -> float:
        """The broker's time, seconds since 1970."""

    async def submit(self, job: Job) -> None:
        """Admits and enqueues in one step. A job whose id is known is not enqueued again: it stays where it is, or, if
        it was answered within the last minute, its reply comes again, to this front.

        Raises `QueueFullError`, `NoWorkerError`.
        """

    async def replies(self) -> Sequence[Reply]:
        """Waits until there is a reply to a job that this front submitted. One task calls it, again and again."""

    async def cancel(self, job_id: str) -> None:
        """Nobody waits for the job any more: deleted if queued, flagged if running; no reply comes."""

    async def state(self) -> QueueState: ...


class WorkerBroker(Protocol):
    """What a worker needs. All of it raises `BrokerLostError`."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def clock(self) -> float:
        """The broker's time, seconds since 1970."""

    async def beat(self, state: WorkerState) -> frozenset[str]:
        """The worker lives and got on with its work. Returns those ids of its jobs that were cancelled, with each beat
        until they are answered or given back.

        The first beat joins the worker, or joins it again after it was taken for dead.
        """

    async def take(self, worker: str, count: int, seconds: float) -> Sequence[Delivery]:
        """Up to `count` jobs, the more urgent first; none after `seconds` without any.

        Batch jobs get a share even while interactive ones keep coming. A job to be worked on alone comes by itself.

        Jobs past their deadline are answered with `deadline_exceeded` by the broker and not handed out.
        """

    async def answer(self, worker: str, delivery: Delivery, reply: Reply) -> bool:
        """Sends the reply and forgets the job in one step. False where the job is not this worker's any more."""

    async def give_back(self, worker: str, deliveries: Collection[Delivery]) -> None:
        """Jobs not begun go to the head of the queue; this does not count as a try."""

    async def leave(self, worker: str) -> None:
        """The worker stops: it is no longer waited for. To be called when it has nothing in hand."""
