"""The model thread by itself: which photos share a look, and what it says of looks that take too long."""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from model.caption import Regions
from service.handover import Work
from service.model_thread import ModelThread
from service.patience import Patience
from service.worker_metrics import WorkerMetrics
from tests.service.running import until
from tests.service.worker.fakes import CANARY, StepFake, text

pytestmark = pytest.mark.anyio


class DetectorFake(StepFake):
    """Photos keep their sizes, as a detector's do."""

    def prepare(self, image: Image.Image) -> np.ndarray:
        level = super().prepare(image)[0]
        return np.full((image.height, image.width, 3), level)

    def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]:
        assert pixels.ndim == 4
        return super().look_at_pixels(pixels[:, 0, 0])


def work(fake: StepFake, level: int, height: int, photo: str = "") -> Work:
    pixels = fake.prepare(Image.new("L", (16, height), level))
    return Work(photo or f"{level}", fake.speeds.resolve(), 1, float("inf"), pixels)


async def test_photos_of_different_sizes_are_looked_at_in_groups_of_one_size() -> None:
    fake = DetectorFake()
    thread = ModelThread(lambda: fake, WorkerMetrics(CollectorRegistry()), look_batch=3)
    await thread.start()
    fake.look_gate.clear()
    first = asyncio.create_task(thread.caption(work(fake, 1, 20)))
    await until(fake.looking.is_set)
    sizes = {2: 30, 3: 40, 4: 30, 5: 30, 6: 40, 7: 30, 8: 50}
    rest = [asyncio.create_task(thread.caption(work(fake, level, height))) for level, height in sizes.items()]
    again = asyncio.create_task(thread.caption(work(fake, 3, 40)))  # the same photo, for another job
    await asyncio.sleep(0.05)
    fake.look_gate.set()
    made = await asyncio.gather(first, *rest, again)
    assert [each.caption.text for each in made] == [text(level) for level in (1, *sizes, 3)]
    # Each look is of the photo that has waited longest and those of its size.
    assert fake.looks == [[1], [2, 4, 5], [3, 6], [7], [8]]
    await thread.stop()


async def test_a_poison_photo_among_sizes_fails_alone() -> None:
    fake = DetectorFake()
    thread = ModelThread(lambda: fake, WorkerMetrics(CollectorRegistry()), look_batch=3)
    await thread.start()
    fake.fails_look = {3}
    works = [work(fake, level, height) for level, height in ((2, 30), (3, 40), (4, 30), (5, 40))]
    outcomes = await asyncio.gather(*(thread.caption(each) for each in works), return_exceptions=True)
    assert [isinstance(each, Exception) for each in outcomes] == [False, True, False, False]
    await thread.stop()


async def start(fake: StepFake, patience: Patience, look_batch: int = 4) -> ModelThread:
    thread = ModelThread(lambda: fake, WorkerMetrics(CollectorRegistry()), look_batch, patience=patience)
    await thread.start()
    return thread


class SlowFake(StepFake):
    """A look takes `look_seconds`, at the canary `canary_seconds`."""

    def __init__(self, look_seconds: float, canary_seconds: float) -> None:
        super().__init__()
        self._look_seconds, self._canary_seconds = look_seconds, canary_seconds

    def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]:
        time.sleep(self._canary_seconds if pixels[0, 0] == CANARY else self._look_seconds)
        return super().look_at_pixels(pixels)


async def test_a_look_that_would_outlast_the_heartbeat_is_told_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    fake = SlowFake(0.0, 0.15)
    thread = await start(fake, Patience(worker_timeout=1.0, hang_seconds=9.0))  # four of 0.15 are more than half of it
    assert caplog.text.count("DEECAP_WORKER_TIMEOUT_S") == 1
    assert "a look at 4 photos would take about 0." in caplog.text
    await thread.stop()
    caplog.clear()
    thread = await start(fake, Patience(worker_timeout=1.0, hang_seconds=9.0), look_batch=1)
    assert not caplog.text
    await thread.stop()


async def test_a_look_that_takes_too_long_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    fake = SlowFake(0.3, 0.0)
    thread = await start(fake, Patience(worker_timeout=5.0, hang_seconds=0.5))
    assert not caplog.text
    for level in (1, 2):
        await thread.caption(work(fake, level, 16))
    assert caplog.text.count("DEECAP_HANG_TIMEOUT_S") == 1
    assert "a look at 1 photos took 0." in caplog.text
    await thread.stop()


@pytest.mark.parametrize(("timeout", "hang", "warns"), [(5.0, 20.0, False), (1.0, 10.0, False), (1.0, 20.0, True)])
def test_a_hang_that_lasts_far_beyond_the_timeout_is_told(
    timeout: float, hang: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    Patience(timeout, hang).compare()
    assert ("DEECAP_HANG_TIMEOUT_S" in caplog.text) == warns
