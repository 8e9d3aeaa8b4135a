"""What `deecap worker` shows on its own port, and what it is made of."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from service.broker.base import NoWorkerError
from service.broker.redis import RedisBroker
from service.feature_cache import MemoryFeatureCache, RedisFeatureCache
from service.images import ImageLimits
from service.jobs import Answer, Job
from service.model_thread import ModelThread
from service.settings import Settings
from service.wiring import make_cache, make_worker
from service.worker import BEAT_SECONDS, HANG_STATUS, Worker
from service.worker_metrics import WorkerMetrics
from service.worker_process import health_app
from tests.service.redis_server import MISSING, RedisServer, find_binary
from tests.service.running import until
from tests.service.worker.fakes import Stage, StepFake, photo, text

pytestmark = pytest.mark.anyio


@pytest.fixture
async def idle(stage: Stage, fake: StepFake) -> Worker:
    """Not started yet; it is the stage's."""
    metrics = WorkerMetrics(stage.registry)
    worker = Worker(
        stage.broker,
        ModelThread(lambda: fake, metrics),
        ImageLimits(100_000, 8),
        MemoryFeatureCache(0),
        metrics,
        beat_seconds=0.02,
        on_hang=stage.hung.append,
    )
    stage.workers.append(worker)
    return worker


@pytest.fixture
async def client(stage: Stage, idle: Worker) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(health_app(idle, stage.registry))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def statuses(client: httpx.AsyncClient) -> tuple[int, ...]:
    return tuple([(await client.get(path)).status_code for path in ("/livez", "/startupz", "/readyz")])


async def test_probes_from_loading_to_stopping(
    stage: Stage, idle: Worker, fake: StepFake, client: httpx.AsyncClient
) -> None:
    assert await statuses(client) == (200, 503, 503)
    problem = await client.get("/readyz")
    assert problem.headers["content-type"] == "application/problem+json"
    assert problem.json()["code"] == "not_ready"
    await idle.start()
    await until(lambda: idle.ready)
    assert await statuses(client) == (200, 200, 200)
    stage.broker.lost = True
    await until(lambda: not idle.ready)
    assert await statuses(client) == (200, 200, 503)
    stage.broker.lost = False
    await until(lambda: idle.ready)
    fake.raises, fake.fails_step = SystemExit, {1}
    await stage.submit(1)
    await until(lambda: bool(stage.hung))
    assert await statuses(client) == (503, 200, 503)
    assert (await client.get("/elsewhere")).status_code == 404
    idle._drain_seconds = 0.0


async def test_metrics_tell_what_was_done(
    stage: Stage, idle: Worker, fake: StepFake, client: httpx.AsyncClient
) -> None:
    await idle.start()
    await until(lambda: idle.ready)
    for speed in ("full", 1.5):
        assert await stage.caption(await stage.submit(1, speed=speed))
    assert await stage.caption(await stage.submit(1, tau=2.5)) == text(1, 2.5)
    assert await stage.refusal(await stage.submit(1, speed="warp")) == "unknown_speed"
    lines = (await client.get("/metrics")).text.splitlines()
    for line in (
        'deecap_worker_jobs_total{outcome="answered"} 3.0',
        'deecap_worker_jobs_total{outcome="unknown_speed"} 1.0',
        'deecap_words_total{speed="full"} 4.0',
        'deecap_words_total{speed="custom"} 4.0',
        'deecap_words_total{speed="tau"} 4.0',
        'deecap_exit_layer_bucket{le="1.0",speed="full"} 1.0',
        'deecap_exit_layer_bucket{le="5.0",speed="full"} 5.0',
        'deecap_layers_saved_total{speed="full"} 15.0',
        'deecap_word_entropy_nats_count{speed="full"} 5.0',
        'deecap_speed_promised{speed="fast"} 3.0',
        'deecap_stage_duration_seconds_count{stage="describe"} 3.0',
        "deecap_look_batch_photos_count 3.0",
        'deecap_model_info{device="cpu",layers="6",name="fake",revision="0123456789ab"} 1.0',
        "deecap_worker_jobs_running 0.0",
    ):
        assert line in lines
    success = next(line for line in lines if line.startswith("deecap_worker_last_success_timestamp_seconds "))
    assert float(success.split()[1]) == pytest.approx(stage.broker.clock(), abs=10)
    openmetrics = await client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert openmetrics.text.endswith("# EOF\n")


async def test_the_settings_reach_the_worker(stage: Stage) -> None:
    settings = Settings(
        look_batch=3,
        hang_timeout_s=7.0,
        worker_timeout_s=4.0,
        load_timeout_s=8.0,
        drain_timeout_s=9.0,
        feature_cache_mb=2,
        min_side=9,
        target_wait_ms=400,
    )
    worker = make_worker(settings, stage.broker, CollectorRegistry())
    assert (worker._look_ahead, worker._hang_seconds, worker._drain_seconds) == (6, 7.0, 9.0)
    assert (worker._stall_seconds, worker._load_seconds) == (4.0, 8.0)
    assert worker._load._target == 0.4
    assert worker._maker._limits == ImageLimits(settings.max_pixels, 9)
    assert worker.id != make_worker(settings, stage.broker, CollectorRegistry()).id
    metrics = WorkerMetrics(CollectorRegistry())
    assert isinstance(make_cache(settings, metrics), MemoryFeatureCache)
    over_redis = make_cache(Settings(redis_cache="redis://127.0.0.1:1/0"), metrics)
    assert isinstance(over_redis, RedisFeatureCache)
    assert await over_redis.get("photo") is None
    assert metrics.registry.get_sample_value("deecap_cache_errors_total", {"cache": "redis"}) == 1
    await over_redis.close()


def test_several_beats_may_be_late_before_a_worker_is_dead() -> None:
    least = next(each.ge for each in Settings.model_fields["worker_timeout_s"].metadata if hasattr(each, "ge"))
    assert least / 3 > BEAT_SECONDS
    with pytest.raises(ValidationError):
        Settings(worker_timeout_s=least - 0.01)


# The process itself, with the fake for a model.

PROGRAM = """
import service.wiring
import service.worker_process as process
from service.settings import Settings
from tests.service.worker.fakes import StepFake
service.wiring.bundle_loader = lambda settings: lambda: StepFake(step_seconds={step_seconds})
process.run_worker(Settings.load())
"""


@dataclass
class Running:
    """A worker's process, and the broker that it works for."""

    process: subprocess.Popen[bytes]
    said: Path  # all that it printed and logged
    broker: RedisBroker
    http: httpx.AsyncClient

    async def submit(self, level: int) -> None:
        job = Job(f"job-{level}", photo(level), None, None, 1, "interactive", self.broker.clock() + 20)
        for _ in range(500):
            try:
                return await self.broker.submit(job)
            except NoWorkerError:
                assert self.process.poll() is None, self.said.read_text()
                await asyncio.sleep(0.02)
        raise AssertionError("no worker joined")

    async def ready(self) -> int:
        return (await self.http.get("/readyz")).status_code

    async def running(self) -> None:
        """Returns once the worker has a job in hand."""
        for _ in range(500):
            if any(worker.running for worker in (await self.broker.state()).workers):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("nothing is taken")

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait, 10)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Running]]]:
    if find_binary() is None:
        pytest.skip(MISSING)
    async with AsyncExitStack() as stack:
        server = RedisServer()
        server.start()
        stack.callback(server.close)

        async def start(step_seconds: float, **settings: object) -> Running:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            settings |= {"broker": server.url, "metrics_port": port, "log_format": "json"}
            environment = {f"DEECAP_{name.upper()}": str(value) for name, value in settings.items()}
            said = stack.enter_context((tmp_path / "said").open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(step_seconds=step_seconds)],
                env={**os.environ, **environment},
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[3],
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            broker = RedisBroker(server.url, "deecap", {"interactive": 64, "batch": 64}, 5.0, 3)
            await broker.open()
            stack.push_async_callback(broker.close)
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}"))
            return Running(process, tmp_path / "said", broker, http)

        yield start


async def test_sigterm_drains_the_process(start: Callable[..., Awaitable[Running]]) -> None:
    worker = await start(step_seconds=0.15)
    await worker.submit(1)
    await worker.running()
    assert await worker.ready() == 200
    await asyncio.sleep(0.2)  # its words are being made
    worker.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.1)
    assert await worker.ready() == 503  # and it still answers
    [reply] = await worker.broker.replies()
    assert isinstance(reply.outcome, Answer)
    assert reply.outcome.caption.text == text(1)
    assert await worker.ended() == 0
    state = await worker.broker.state()
    assert (state.workers, state.redelivered) == ((), 0)
    with pytest.raises(httpx.ConnectError):
        await worker.ready()
    told = worker.said.read_text()
    assert "works for the queue deecap" in told
    assert "Traceback" not in told


async def test_a_hanging_process_ends_itself(start: Callable[..., Awaitable[Running]]) -> None:
    worker = await start(step_seconds=60.0, hang_timeout_s=0.5)
    await worker.submit(1)
    assert await worker.ended() == HANG_STATUS
    told = worker.said.read_text()
    assert "made no progress: the process ends" in told
