"""The shipped model in a worker: the same captions as without one, at every speed, all at once, told word by word.

In float32: int8 rounds a little differently with whatever shares a step, and a worker's batches are a matter of time.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from model.caption import Caption
from model.captioner import Captioner
from model.exits import TIERS
from service.feature_cache import MemoryFeatureCache
from service.images import ImageLimits
from service.jobs import Answer
from service.model_thread import ModelThread
from service.settings import shipped_bundle
from service.worker import Worker
from service.worker_metrics import WorkerMetrics
from tests.service.worker.fakes import Stage

pytestmark = pytest.mark.anyio
SAMPLES = sorted((Path(__file__).parents[3] / "samples").glob("*.jpg"))


async def test_a_worker_captions_as_the_captioner_does() -> None:
    captioner = Captioner.load(shipped_bundle(), "cpu", "float32", threads=1)
    expected: dict[tuple[Path, str, int], Caption] = {}
    for path in SAMPLES:
        with Image.open(path) as image:
            regions = captioner.look(image)
        expected |= {(path, tier, 1): captioner.describe(regions, tier) for tier in TIERS}
        expected[path, "fast", 3] = captioner.describe(regions, "fast", beam=3)
    stage = Stage(worker_timeout=30.0)
    metrics = WorkerMetrics(CollectorRegistry())
    worker = Worker(
        stage.broker,
        ModelThread(lambda: captioner, metrics),
        ImageLimits(10_000_000, 8),
        MemoryFeatureCache(10_000_000),
        metrics,
        on_hang=stage.hung.append,
    )
    stage.workers.append(worker)
    await worker.start()
    while not (await stage.broker.state()).workers:
        await asyncio.sleep(0.01)
    for _ in range(2):  # the second time from the cache
        jobs = {
            asked: await stage.submit(0, image=asked[0].read_bytes(), speed=asked[1], beam=asked[2], stream=True)
            for asked in expected
        }
        for asked, job in jobs.items():
            answer = await stage.outcome(job)
            assert isinstance(answer, Answer), answer
            assert answer.caption.text == expected[asked].text
            assert answer.caption.speed == expected[asked].speed
            exits = [step.exit_layer for step in answer.caption.steps]
            assert stage.words(job) == (answer.caption.text.split() if asked[2] == 1 else [])
            assert exits == [step.exit_layer for step in expected[asked].steps]
    shared = metrics.registry.get_sample_value("deecap_step_batch_captions_bucket", {"le": "1.0"})
    steps = metrics.registry.get_sample_value("deecap_step_batch_captions_count")
    assert shared is not None
    assert steps is not None
    assert steps - shared > 5  # most were made with others
    await stage.close()
