"""A captioner without a network, which says what it was shown; and brokers whose other side is the test."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from model.caption import Caption, Regions, Word
from model.exits import TIERS, ResolvedSpeed, SpeedRow, SpeedTable
from service.broker.base import BrokerLostError
from service.jobs import Answer, Job, ModelInfo, QueueState, Reply, Timings, WorkerState

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


class FakeCaptioner:
    """Every caption is `<brightness> <width> <height>` of the picture it looked at, and done after one step.

    Clear `go` to hold it while it looks; `fails` is raised by the next looks, `broken` where pixels are prepared.
    """

    name = "fake"
    revision = "0123456789ab"
    extractor_revision = "ba9876543210"
    layers = LAYERS
    device = "cpu"
    speeds = SPEEDS
    vocabulary_size = 3
    slots = 4

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.looking = threading.Event()
        self.fails: Exception | None = None
        self.broken: Exception | None = None
        self.looked: list[tuple[int, int]] = []  # sizes
        self.described: list[tuple[float, int]] = []  # τ and beam
        self.threads: set[str] = set()
        self._making: dict[int, tuple[Caption, int, float]] = {}  # with beam and deadline
        self._over: list[tuple[int, Caption | str]] = []
        self._tickets = 0

    @property
    def free(self) -> int:
        return self.slots - len(self._making)

    @property
    def busy(self) -> bool:
        return bool(self._making)

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

    def begin(
        self,
        batch: Sequence[Regions],
        speeds: Sequence[ResolvedSpeed],
        beams: Sequence[int],
        deadlines: Sequence[float],
    ) -> list[int]:
        tickets = []
        for regions, speed, beam, deadline in zip(batch, speeds, beams, deadlines, strict=True):
            self._tickets += 1
            words = [str(round(number)) for number in regions.features[0].tolist()]
            self._making[self._tickets] = (caption_of(words, speed), beam, deadline)
            tickets.append(self._tickets)
        return tickets

    def cancel(self, ticket: int) -> None:
        self._making.pop(ticket, None)

    def step(self) -> None:
        for ticket, (caption, beam, deadline) in self._making.items():
            late = deadline <= time.monotonic()
            self._over.append((ticket, "late" if late else caption))
            if not late:
                self.described.append((caption.speed.tau, beam))
        self._making.clear()

    def finished(self) -> list[tuple[int, Caption | str]]:
        over, self._over = self._over, []
        return over

    def reset(self) -> None:
        self._making.clear()
        self._over.clear()


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
        self.hangs = False
        self.slow_submit = self.submitting = False  # the former makes `submit` wait, the latter says that it does
        self.submitted: list[Job] = []
        self.cancelled: list[str] = []
        self.workers: tuple[WorkerState, ...] = (worker_state(),)
        self.waiting = {"interactive": 0, "batch": 0}
        self.oldest = 0.0
        self.answered = self.redelivered = self.dead = 0
        self.opened = self.closed = False
        self._outbox: asyncio.Queue[Reply] = asyncio.Queue()

    def say(self, reply: Reply) -> None:
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

    async def replies(self) -> Sequence[Reply]:
        await self._meet()
        while self._outbox.empty():
            await asyncio.sleep(0.002)
            await self._meet()
        return [self._outbox.get_nowait()]

    async def cancel(self, job_id: str) -> None:
        await self._meet()
        self.cancelled.append(job_id)

    async def state(self) -> QueueState:
        await self._meet()
        return QueueState(
            dict(self.waiting),
            self.oldest,
            self.answered,
            self.redelivered,
            self.dead,
            self.workers,  # type: ignore[arg-type]
        )

    async def _meet(self) -> None:
        while self.hangs:
            await asyncio.sleep(0.005)
        if self.raises is not None:
            raise self.raises


LOST = BrokerLostError("made up")
