"""A captioner without a network that is stepped, a broker that can be lost, and one stage with all the parts."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry

from model.caption import Caption, Regions, Word
from model.exits import ResolvedSpeed
from service.broker.base import BrokerLostError, Delivery
from service.broker.memory import MemoryBroker
from service.feature_cache import FeatureCache, MemoryFeatureCache
from service.images import ImageLimits
from service.jobs import Answer, Job, Priority, Refusal, Reply, WorkerState
from service.model_thread import ModelThread
from service.worker import Worker
from service.worker_metrics import WorkerMetrics
from tests.service import pictures
from tests.service.fakes import LAYERS, SPEEDS
from tests.service.running import until

STEPS = 5  # of each caption: four words and the end
CANARY = 128  # the grey of the canary's ramp


def photo(level: int) -> bytes:
    """A photo that the fake knows again by its grey."""
    return pictures.encode(Image.new("L", (16, 16), level))


def text(level: int, tau: float = 1.0, beam: int = 1) -> str:
    """What the fake says of it; balanced is τ = 1."""
    return f"grey {level} tau{tau:g} beam{beam}"


@dataclass
class _InMaking:
    level: int
    speed: ResolvedSpeed
    beam: int
    deadline: float
    steps: int = 0


@dataclass
class StepFake:
    """Clear `look_gate` or `step_gate` to hold it there. It fails where a level of the sets takes part."""

    slots: int = 8
    name: str = "fake"
    revision: str = "0123456789ab"
    extractor_revision: str = "ba9876543210"
    layers: int = LAYERS
    device: str = "cpu"
    vocabulary_size: int = 3
    speeds = SPEEDS
    step_seconds: float = 0.0
    frozen: bool = False  # steps are made, and no caption gets on
    fails_look: set[int] = field(default_factory=set)
    fails_begin: set[int] = field(default_factory=set)
    fails_step: set[int] = field(default_factory=set)
    raises: Callable[[], BaseException] = lambda: RuntimeError("poison")
    looks: list[list[int]] = field(default_factory=list)  # levels that shared a look
    steps: list[list[int]] = field(default_factory=list)  # and a step
    threads: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.look_gate, self.step_gate, self.looking = threading.Event(), threading.Event(), threading.Event()
        self.look_gate.set()
        self.step_gate.set()
        self._tickets = itertools.count(1)
        self._making: dict[int, _InMaking] = {}
        self._over: list[tuple[int, Caption | str]] = []

    @property
    def free(self) -> int:
        return self.slots - sum(each.beam for each in self._making.values())

    @property
    def busy(self) -> bool:
        return bool(self._making)

    def prepare(self, image: Image.Image) -> np.ndarray:
        return np.array([round(float(np.asarray(image.convert("L")).mean()))])

    def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]:
        levels = pixels[:, 0].tolist()
        self.threads.add(threading.current_thread().name)
        if CANARY not in levels:
            self.looking.set()
            assert self.look_gate.wait(10)
            self.looks.append(levels)
        self._maybe_fail(levels, self.fails_look)
        box = np.array([[0, 0, 1, 1]], np.float32)
        return [Regions(box, np.array([[level]], np.float32)) for level in levels]

    def begin(
        self,
        batch: Sequence[Regions],
        speeds: Sequence[ResolvedSpeed],
        beams: Sequence[int],
        deadlines: Sequence[float],
    ) -> list[int]:
        levels = [int(regions.features[0, 0]) for regions in batch]
        self._maybe_fail(levels, self.fails_begin)
        new = {next(self._tickets): _InMaking(*each) for each in zip(levels, speeds, beams, deadlines, strict=True)}
        self._making.update(new)
        assert self.free >= 0
        return list(new)

    def cancel(self, ticket: int) -> None:
        if self._making.pop(ticket, None):
            self._over.append((ticket, "cancelled"))

    def step(self) -> None:
        levels = [each.level for each in self._making.values()]
        if levels != [CANARY]:
            assert self.step_gate.wait(10)
            if self.frozen:
                time.sleep(0.005)
                return
            self.steps.append(levels)
            time.sleep(self.step_seconds)
        self._maybe_fail(levels, self.fails_step)
        for ticket, each in list(self._making.items()):
            each.steps += 1
            if each.deadline <= time.monotonic():
                self._over.append((ticket, "deadline"))
            elif each.steps == STEPS:
                words = [*text(each.level, each.speed.tau, each.beam).split(), ""]
                steps = tuple(Word(word, 1 + at, 0.5, -0.1) for at, word in enumerate(words))
                self._over.append((ticket, Caption(steps, each.speed, LAYERS)))
            else:
                continue
            del self._making[ticket]

    def finished(self) -> list[tuple[int, Caption | str]]:
        over, self._over = self._over, []
        return over

    def reset(self) -> None:
        self._making.clear()
        self._over.clear()

    def _maybe_fail(self, levels: Sequence[int], poison: set[int]) -> None:
        if poison.intersection(levels):
            raise self.raises()


class LossyBroker(MemoryBroker):
    """Raises `BrokerLostError` from all that a worker calls while `lost`; counts beats."""

    lost = False
    beats = 0

    def _reach(self) -> None:
        if self.lost:
            raise BrokerLostError("somebody pulled the plug")

    async def beat(self, state: WorkerState) -> frozenset[str]:
        self._reach()
        self.beats += 1
        return await super().beat(state)

    async def take(self, worker: str, count: int, seconds: float) -> Sequence[Delivery]:
        self._reach()
        return await super().take(worker, count, seconds)

    async def answer(self, worker: str, delivery: Delivery, reply: Reply) -> bool:
        self._reach()
        return await super().answer(worker, delivery, reply)

    async def give_back(self, worker: str, deliveries: Collection[Delivery]) -> None:
        self._reach()
        await super().give_back(worker, deliveries)


class Stage:
    """A broker with a front that notes all replies, and workers with captioners of their own."""

    def __init__(self, worker_timeout: float = 2.0, tries: int = 3) -> None:
        self.broker = LossyBroker({"interactive": 1000, "batch": 1000}, worker_timeout, tries)
        self.workers: list[Worker] = []
        self.hung: list[str] = []
        self.replies: defaultdict[str, list[Reply]] = defaultdict(list)  # by job
        self.jobs: dict[str, Job] = {}
        self.registry = CollectorRegistry()
        self._listening = asyncio.create_task(self._listen())

    async def add_worker(
        self,
        captioner: StepFake,
        *,
        look_batch: int = 4,
        canary_seconds: float = 30.0,
        cache: FeatureCache | None = None,
        hang_seconds: float = 5.0,
        drain_seconds: float = 5.0,
    ) -> Worker:
        metrics = WorkerMetrics(CollectorRegistry() if self.workers else self.registry)
        worker = Worker(
            self.broker,
            ModelThread(lambda: captioner, metrics, look_batch, canary_seconds),
            ImageLimits(100_000, 8),
            cache or MemoryFeatureCache(1_000_000),
            metrics,
            beat_seconds=0.02,
            hang_seconds=hang_seconds,
            drain_seconds=drain_seconds,
            on_hang=self.hung.append,
        )
        self.workers.append(worker)
        await worker.start()
        await until(lambda: worker.ready)
        return worker

    async def submit(
        self,
        level: int,
        *,
        speed: str | float | None = None,
        tau: float | None = None,
        beam: int = 1,
        seconds: float = 20.0,
        priority: Priority = "interactive",
        image: bytes | None = None,
    ) -> Job:
        data = photo(level) if image is None else image
        number = f"job-{len(self.jobs)}"
        job = Job(number, data, speed, tau, beam, priority, self.broker.clock() + seconds, f"request-{number}")
        self.jobs[number] = job
        await self.broker.submit(job)
        return job

    async def outcome(self, job: Job) -> Answer | Refusal:
        """The one reply there is."""
        await until(lambda: job.id in self.replies)
        [reply] = self.replies[job.id]
        return reply.outcome

    async def caption(self, job: Job) -> str:
        outcome = await self.outcome(job)
        assert isinstance(outcome, Answer), outcome
        return outcome.caption.text

    async def refusal(self, job: Job) -> str:
        outcome = await self.outcome(job)
        assert isinstance(outcome, Refusal), outcome
        return outcome.code

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def outcomes(self) -> Counter[str]:
        """Of the first worker's jobs."""
        [family] = [each for each in self.registry.collect() if each.name == "deecap_worker_jobs"]
        return Counter(
            {each.labels["outcome"]: int(each.value) for each in family.samples if each.name.endswith("_total")}
        )

    async def close(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        self._listening.cancel()
        with suppress(asyncio.CancelledError):
            await self._listening

    async def _listen(self) -> None:
        while True:
            for reply in await self.broker.replies():
                self.replies[reply.job_id].append(reply)
