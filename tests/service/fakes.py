"""Captioners without a network, one of which says what it was shown; and brokers whose other side is the test."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from model.caption import Caption, Regions, Word
from model.exits import TIERS, ResolvedSpeed, SpeedRow, SpeedTable
from service.broker.base import BrokerLostError, Found, Place
from service.jobs import Answer, Job, ModelInfo, Progress, QueueState, Reply, Timings, WorkerState

LAYERS = 6
SPEEDS = SpeedTable(
    rows=tuple(SpeedRow(tau, 1.0 + tau, 1.0 + tau / 2, 50.0 - tau, 20.0 - tau) for tau in (0.0, 1.0, 2.0, 3.0, 3.5)),
    tiers={name: target - 1.0 for name, target in TIERS.items()},
    measured={"split": "made up"},
)
BOXES = ((0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.75, 1.0))
EXITS = (1, 3, 2, 6)  # of the three words and the end


def caption_of(words: Sequence[str], speed: ResolvedSpeed) -> Caption:
    """Three words and an end, each with its exit."""
    steps = tuple(Word(text, m, 0.5 * m, -0.1) for text, m in zip([*words, ""], EXITS, strict=True))
    return Caption(steps, speed, LAYERS)


@dataclass(eq=False)
class InMaking:
    """A caption that a made-up captioner has in the making."""

    regions: Regions
    speed: ResolvedSpeed
    beam: int
    deadline: float  # by time.monotonic()
    steps: int = 0


class MadeUpCaptioner:
    """What all captioners without a network have in common: tickets, slots, deadlines, and a word with each step.

    A subclass says what it sees (`prepare`, `look_at_pixels`), what it says of it (`words_of`) and how long that takes.
    """

    name = "fake"
    revision = "0123456789ab"
    extractor_revision = "ba9876543210"
    layers = LAYERS
    device = "cpu"
    sufficient_side = 0
    vocabulary_size = 3
    speeds = SPEEDS
    slots = 8

    def __init__(self) -> None:
        self.making: dict[int, InMaking] = {}  # by ticket
        self._over: list[tuple[int, Caption | str]] = []
        self._tickets = itertools.count(1)

    def words_of(self, each: InMaking) -> tuple[Word, ...]:
        """The steps of the whole caption, the end included."""
        raise NotImplementedError

    def steps_of(self, each: InMaking) -> int:
        """Steps that it takes, by default one for each word and the end."""
        return len(self.words_of(each))

    @property
    def free(self) -> int:
        return self.slots - sum(each.beam for each in self.making.values())

    @property
    def busy(self) -> bool:
        return bool(self.making)

    def begin(
        self,
        batch: Sequence[Regions],
        speeds: Sequence[ResolvedSpeed],
        beams: Sequence[int],
        deadlines: Sequence[float],
    ) -> list[int]:
        new = {next(self._tickets): InMaking(*each) for each in zip(batch, speeds, beams, deadlines, strict=True)}
        self.making.update(new)
        assert self.free >= 0, "more was begun than there are slots"
        return list(new)

    def cancel(self, ticket: int) -> None:
        if self.making.pop(ticket, None):
            self._over.append((ticket, "cancelled"))

    def step(self) -> None:
        for ticket, each in list(self.making.items()):
            each.steps += 1
            if each.deadline <= time.monotonic():
                self._over.append((ticket, "deadline"))
            elif each.steps >= self.steps_of(each):
                self._over.append((ticket, Caption(self.words_of(each), each.speed, LAYERS)))
            else:
                continue
            del self.making[ticket]

    def words_so_far(self, ticket: int, begin: int = 0) -> tuple[Word, ...]:
        each = self.making.get(ticket)
        return self.words_of(each)[begin : each.steps] if each and each.beam == 1 else ()

    def finished(self) -> list[tuple[int, Caption | str]]:
        over, self._over = self._over, []
        return over

    def attention(self, regions: Regions, caption: Caption) -> tuple[tuple[float, ...], ...]:
        """The words take turns to look at one region alone."""
        count = len(regions.boxes)
        return tuple(tuple(float(i % count == r) for r in range(count)) for i, _ in enumerate(caption.words))

    def reset(self) -> None:
        self.making.clear()
        self._over.clear()


class FakeCaptioner(MadeUpCaptioner):
    """Every caption is `<brightness> <width> <height>` of the picture it looked at, and done after one step.

    Clear `go` to hold it while it looks; `fails` is raised by the next looks, `broken` where pixels are prepared.
    """

    slots = 5

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()
        self.looking = threading.Event()
        self.fails: Exception | None = None
        self.broken: Exception | None = None
        self.looked: list[tuple[int, int]] = []  # sizes
        self.described: list[tuple[float, int]] = []  # τ and beam
        self.threads: set[str] = set()

    def prepare(self, image: Image.Image) -> np.ndarray:
        if self.broken is not None:
            raise self.broken
        brightness = float(np.asarray(image.convert("L")).mean())
        return np.array([brightness, *image.size], np.float32)

    def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]:
        self.threads.add(threading.current_thread().name)
        self.looking.set()
        assert self.go.wait(10)
        if self.fails is not None:
            raise self.fails
        self.looked += [(int(width), int(height)) for _, width, height in pixels]
        return [Regions(np.array(BOXES, np.float32), np.stack([photo, np.zeros(3, np.float32)])) for photo in pixels]

    def words_of(self, each: InMaking) -> tuple[Word, ...]:
        return caption_of([str(round(number)) for number in each.regions.features[0].tolist()], each.speed).steps

    def steps_of(self, each: InMaking) -> int:
        return 1

    def step(self) -> None:
        now = time.monotonic()
        self.described += [(each.speed.tau, each.beam) for each in self.making.values() if each.deadline > now]
        super().step()


def model_info(revision: str = FakeCaptioner.revision) -> ModelInfo:
    return ModelInfo("fake", revision, LAYERS, "cpu", SPEEDS, 3)


def worker_state(id: str = "w", revision: str = FakeCaptioner.revision, ready: bool = True) -> WorkerState:
    return WorkerState(id, model_info(revision), ready, slots=4, running=0, last_success=time.time())


def answer_to(job: Job, worker: str = "w") -> Reply:
    """A caption that begins with the job's request id."""
    caption = caption_of([job.request_id, "a", "b"], SPEEDS.resolve(job.speed, job.tau))
    return Reply(
        job.id, Answer(caption, BOXES, Timings(0.01, 0.002, 0.03, 0.004), "fake", FakeCaptioner.revision), worker
    )


class FakeBroker:
    """The front's side of a broker whose store and workers are the test.

    `raises` is raised by every call while it is set; `hangs` makes every call wait until it is cleared.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.raises: Exception | None = None
        self.refuses: Exception | None = None  # raised by `submit` alone
        self.trouble: Exception | None = None  # raised by `replies`, once
        self.hangs = False
        self.slow_submit = self.submitting = False  # the former makes `submit` wait, the latter says that it does
        self.submitted: list[Job] = []  # and known, until the test clears it
        self.reminded: list[str] = []
        self.found: dict[str, Found] = {}
        self.places: dict[str, Place] = {}  # where jobs are when they are cancelled
        self.forgotten: list[str] = []
        self.cancelled: list[str] = []
        self.workers: tuple[WorkerState, ...] = (worker_state(),)
        self.waiting = {"interactive": 0, "batch": 0}
        self.oldest = 0.0
        self.answered = self.redelivered = self.dead = 0
        self.opened = self.closed = False
        self._outbox: asyncio.Queue[Reply | Progress] = asyncio.Queue()

    def say(self, reply: Reply | Progress) -> None:
        """To the front, as a worker's."""
        self._outbox.put_nowait(reply)

    async def open(self) -> None:
        await self._meet()
        self.opened = True

    async def close(self) -> None:
        self.closed = True

    async def submit(self, job: Job) -> None:
        await self._meet()
        if self.refuses is not None:
            raise self.refuses
        while self.slow_submit:
            self.submitting = True
            await asyncio.sleep(0.005)
        self.submitting = False
        self.submitted.append(job)

    async def remind(self, job_id: str) -> bool:
        await self._meet()
        self.reminded.append(job_id)
        return any(job.id == job_id for job in self.submitted)

    async def forget(self, job_id: str) -> None:
        await self._meet()
        self.forgotten.append(job_id)

    async def find(self, job_id: str) -> Found | None:
        await self._meet()
        return self.found.get(job_id)

    async def replies(self) -> Sequence[Reply | Progress]:
        await self._meet()
        while self._outbox.empty():
            trouble, self.trouble = self.trouble, None
            if trouble is not None:
                raise trouble
            await asyncio.sleep(0.002)
            await self._meet()
        return [self._outbox.get_nowait()]

    async def cancel(self, job_id: str) -> Place | None:
        await self._meet()
        self.cancelled.append(job_id)
        return self.places.get(job_id)

    async def state(self) -> QueueState:
        await self._meet()
        return QueueState(
            dict(self.waiting),
            self.oldest,
            self.answered,
            self.redelivered,
            self.dead,
            self.workers,
        )

    async def _meet(self) -> None:
        while self.hangs:
            await asyncio.sleep(0.005)
        if self.raises is not None:
            raise self.raises


LOST = BrokerLostError("made up")
