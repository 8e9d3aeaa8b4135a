"""A captioner without a network that is stepped, a broker that can be lost, and one stage with all the parts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry

from model.caption import Regions, Word
from model.exits import ResolvedSpeed
from service.broker.base import BrokerLostError, Delivery
from service.broker.memory import MemoryBroker
from service.feature_cache import FeatureCache, MemoryFeatureCache
from service.images import ImageLimits
from service.jobs import Answer, Job, Priority, Progress, Refusal, Reply, WorkerState
from service.model_thread import ModelThread
from service.worker import Worker
from service.worker_metrics import WorkerMetrics
from tests.service import pictures
from tests.service.fakes import InMaking, MadeUpCaptioner
from tests.service.running import until

STEPS = 5  # of each caption: four words and the end
CANARY = 128  # the grey of the canary's ramp


def photo(level: int) -> bytes:
    """A photo that the fake knows again by its grey."""
    return pictures.encode(Image.new("L", (16, 16), level))


def text(level: int, tau: float = 1.0, beam: int = 1) -> str:
    """What the fake says of it; balanced is τ = 1."""
    return f"grey {level} tau{tau:g} beam{beam}"


class StepFake(MadeUpCaptioner):
    """Clear `look_gate` or `step_gate` to hold it there. It fails where a level of the sets takes part."""

    def __init__(self, step_seconds: float = 0.0) -> None:
        super().__init__()
        self.step_seconds = step_seconds
        self.frozen = False  # steps are made, and no caption gets on
        self.fails_look: set[int] = set()
        self.fails_begin: set[int] = set()
        self.fails_step: set[int] = set()
        self.raises: Callable[[], BaseException] = lambda: RuntimeError("poison")
        self.looks: list[list[int]] = []  # levels that shared a look
        self.steps: list[list[int]] = []  # and a step
        self.threads: set[str] = set()
        self.look_gate, self.step_gate, self.looking = threading.Event(), threading.Event(), threading.Event()
        self.look_gate.set()
        self.step_gate.set()

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
        self._maybe_fail([int(regions.features[0, 0]) for regions in batch], self.fails_begin)
        return super().begin(batch, speeds, beams, deadlines)

    def words_of(self, each: InMaking) -> tuple[Word, ...]:
        words = [*text(_level(each), each.speed.tau, each.beam).split(), ""]
        return tuple(Word(word, 1 + at, 0.5, -0.1) for at, word in enumerate(words))

    def step(self) -> None:
        levels = [_level(each) for each in self.making.values()]
        if levels != [CANARY]:
            assert self.step_gate.wait(10)
            if self.frozen:
                time.sleep(0.005)
                return
            self.steps.append(levels)
            time.sleep(self.step_seconds)
        self._maybe_fail(levels, self.fails_step)
        super().step()

    def _maybe_fail(self, levels: Sequence[int], poison: set[int]) -> None:
        if poison.intersection(levels):
            raise self.raises()


def _level(each: InMaking) -> int:
    return int(each.regions.features[0, 0])


class LossyBroker(MemoryBroker):
    """Raises `BrokerLostError` from all that a worker calls while `lost`; counts beats, and notes what was told.

    `on_tell` is awaited before words are taken.
    """

    lost = False
    beats = 0
    on_tell: Callable[[], Awaitable[None]] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[list[str]] = []  # the ids of the jobs in each call of `tell`

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

    async def tell(self, worker: str, words: Sequence[tuple[Delivery, Progress]]) -> None:
        self.calls.append([progress.job_id for _, progress in words])
        if self.on_tell is not None:
            await self.on_tell()
        self._reach()
        await super().tell(worker, words)

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
        self.heard: defaultdict[str, list[Progress | Reply]] = defaultdict(list)  # the same, and words before them
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
        stall_seconds: float = 5.0,
        drain_seconds: float = 5.0,
        target_wait: float = 60.0,
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
            stall_seconds=stall_seconds,
            drain_seconds=drain_seconds,
            target_wait=target_wait,
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
        **options: Any,
    ) -> Job:
        data = photo(level) if image is None else image
        number = f"job-{len(self.jobs)}"
        deadline = self.broker.clock() + seconds
        job = Job(number, data, speed, tau, beam, priority, deadline, f"request-{number}", **options)
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

    def words(self, job: Job) -> list[str]:
        """Told of its latest attempt so far. Fails where there is a gap, a word told twice, or one after the reply."""
        found: list[str] = []
        attempt, heard = 0, self.heard[job.id]
        assert not any(isinstance(each, Reply) for each in heard[:-1]), "something came after the reply"
        for each in heard:
            if isinstance(each, Progress):
                assert each.attempt >= attempt
                found = [] if each.attempt > attempt else found
                attempt = each.attempt
                assert (each.begin, bool(each.words)) == (len(found), True)
                found += [word.text for word in each.words]
        return found

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
            for each in await self.broker.replies():
                self.heard[each.job_id].append(each)
                if isinstance(each, Reply):
                    self.replies[each.job_id].append(each)
