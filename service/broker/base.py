"""The one interface of all brokers, and what each of them promises.

- A job that `submit` took is answered exactly once to its front, as long as the front lives and no store is lost:
  by the worker that has it, or by the broker itself where its deadline passed in the queue or every try was fatal.
- A worker has a job until it answers it, gives it back, or is dead. It is dead when it has not called `beat` for
  `worker_timeout` seconds; others then get its jobs. What it says of them later is refused (`answer` gives False).
- A job whose worker died may be what killed it: from the second try on it is handed out `alone`. After `tries` tries it
  is a dead letter, kept for the operator, and its front is told `poison`.
- Words of a job that is being worked on (`tell`) reach its front before its reply and in order, or not at all.
- An answered job is known by its id for a minute, or for the seconds that it asked for (`kept`) if these are more. Of
  the latter the oldest are forgotten earlier where all together make more than `rules.KEPT_BYTES`.
- Time is the broker's: `clock` is the same on all machines, however wrong their own clocks are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from service.jobs import Job, Progress, QueueState, Reply, WorkerState

Place = Literal["queued", "running"]  # of a job that is not answered yet


class BrokerError(Exception):
    """A broker cannot do what was asked."""


class QueueFullError(BrokerError):
    """There is no room for the job: as many of its priority wait as may, or the store's memory is full, or what this
    process may hold of photos that wait.

    Whoever submitted it may try again later.
    """

    def __init__(self, waiting: int, why: str = "") -> None:
        """`why`: by default the count of those that wait."""
        super().__init__(why or f"{waiting} photos are waiting already")
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


@dataclass(frozen=True)
class Found:
    """What is known of a job."""

    state: Literal["queued", "running", "done"]
    position: int | None = None  # of a queued one: how many of its priority come before it, 0: it is the next
    reply: Reply | None = None  # to one that is done
    note: str = ""  # `Job.note`, as first submitted under this id


class FrontBroker(Protocol):
    """What a front needs. All of it raises `BrokerLostError`, and may be cancelled at any await without harm."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def clock(self) -> float:
        """The broker's time, seconds since 1970."""

    async def submit(self, job: Job) -> None:
        """Admits and enqueues in one step. A job whose id is known is not enqueued again: it stays where it is, or, if
        it was answered and is still known, its reply comes again. From then on this front gets its words and reply.

        Raises `QueueFullError`, `NoWorkerError`.
        """

    async def remind(self, job_id: str) -> bool:
        """`submit` without the job, whose photo need not travel again: False where its id is not known."""

    async def replies(self) -> Sequence[Reply | Progress]:
        """Waits until there is something to hear of the jobs that this front submitted. One task calls it, always."""

    async def cancel(self, job_id: str) -> Place | None:
        """This front does not wait for the job any more: deleted if queued, flagged if running; no reply comes.

        Returns where it was; None where it is not known, or answered, or where another front has asked for it since:
        then nothing happens.
        """

    async def forget(self, job_id: str) -> None:
        """As `cancel`, whoever asked for it, and for good: from then on nothing is known of its id, under which another
        job may be submitted, even while the worker of this one has not heard of it. What that says is dropped.
        """

    async def find(self, job_id: str) -> Found | None:
        """Where the job is, or its outcome. None: never known, cancelled, or known no more.

        One past its deadline that no live worker has is answered with `deadline_exceeded` by this.
        """

    async def state(self) -> QueueState: ...


class WorkerBroker(Protocol):
    """What a worker needs. All of it but `tell` raises `BrokerLostError`."""

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
        With large photos it is fewer than there are: no more once these make `rules.TAKE_BYTES`.

        Jobs past their deadline are answered with `deadline_exceeded` by the broker and not handed out.
        """

    async def answer(self, worker: str, delivery: Delivery, reply: Reply) -> bool:
        """Sends the reply and removes the job in one step. False where the job is not this worker's any more."""

    async def tell(self, worker: str, words: Sequence[tuple[Delivery, Progress]]) -> None:
        """Sends words to the fronts that wait for them, without a promise that they arrive: the reply has them all.

        Those of jobs that are not this worker's any more are dropped, and so is everything while the store is lost:
        this raises nothing.
        """

    async def give_back(self, worker: str, deliveries: Collection[Delivery]) -> None:
        """Jobs not begun go to the head of the queue; this does not count as a try."""

    async def leave(self, worker: str) -> None:
        """The worker stops: it is no longer waited for. To be called when it has nothing in hand."""
