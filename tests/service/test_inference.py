"""`LocalEngine`: one thread, a bounded queue, deadlines, clients that go away, failures, stopping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import FastAPI

from service.errors import Problem
from service.inference import Job, LocalEngine
from tests.service import pictures
from tests.service.checks import assert_problem
from tests.service.fakes import FakeCaptioner

pytestmark = pytest.mark.anyio

JPEG = pictures.jpeg()
URL = "/v1/caption"


def job(seconds: float = 5.0, image: bytes = JPEG, speed: str | None = None) -> Job:
    return Job(image=image, speed=speed, tau=None, beam=1, deadline=time.monotonic() + seconds)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not come about in five seconds")


@pytest.fixture
async def engine(make_engine: Callable[[], LocalEngine], captioner: FakeCaptioner) -> AsyncIterator[LocalEngine]:
    engine = make_engine()
    await engine.start()
    captioner.looking.clear()
    captioner.looked.clear()
    yield engine
    captioner.go.set()
    await engine.stop()


async def hold(engine: LocalEngine, captioner: FakeCaptioner) -> asyncio.Task[object]:
    """A job that the model is busy with until `captioner.go` is set."""
    captioner.go.clear()
    task: asyncio.Task[object] = asyncio.create_task(engine.caption(job()))  # type: ignore[arg-type]
    await until(captioner.looking.is_set)
    return task


async def test_one_thread_loads_and_captions(engine: LocalEngine, captioner: FakeCaptioner) -> None:
    await asyncio.gather(engine.caption(job()), engine.caption(job()))
    assert captioner.threads == {"model"}
    assert engine.ready
    assert engine.info is not None
    assert engine.info.vocabulary_size == 3


async def test_not_ready_before_the_canary_went_through(
    make_engine: Callable[[], LocalEngine], captioner: FakeCaptioner
) -> None:
    captioner.go.clear()
    engine = make_engine()
    starting = asyncio.create_task(engine.start())
    await until(captioner.looking.is_set)
    assert not engine.ready
    assert engine.info is None
    with pytest.raises(Problem, match="cannot caption"):
        await engine.caption(job())
    captioner.go.set()
    await starting
    assert engine.ready
    await engine.stop()


async def test_a_model_that_cannot_load_says_why(settings: object) -> None:
    def load() -> FakeCaptioner:
        raise ValueError("no such bundle")

    from service.images import ImageLimits

    engine = LocalEngine(load, ImageLimits(1, 1), 1)
    with pytest.raises(ValueError, match="no such bundle"):
        await engine.start()
    assert not engine.ready
    await engine.stop()


async def test_a_full_queue_refuses_and_says_when_to_come_back(engine: LocalEngine, captioner: FakeCaptioner) -> None:
    tasks = [await hold(engine, captioner)]
    tasks += [asyncio.create_task(engine.caption(job())) for _ in range(2)]  # type: ignore[arg-type]
    await until(lambda: engine.waiting == 2)
    with pytest.raises(Problem) as caught:
        await engine.caption(job())
    assert caught.value.code == "overloaded"
    assert int(caught.value.headers["Retry-After"]) >= 1
    captioner.go.set()
    await asyncio.gather(*tasks)
    await engine.caption(job())


async def test_a_job_whose_client_has_gone_is_not_done(engine: LocalEngine, captioner: FakeCaptioner) -> None:
    first = await hold(engine, captioner)
    second = asyncio.create_task(engine.caption(job(image=pictures.encode(pictures.photo((20, 20))))))
    await until(lambda: engine.waiting == 1)
    second.cancel()
    await asyncio.sleep(0)
    captioner.go.set()
    await first
    await engine.caption(job())
    assert captioner.looked == [pictures.SIZE, pictures.SIZE]


async def test_a_job_past_its_deadline_is_not_done(engine: LocalEngine, captioner: FakeCaptioner) -> None:
    first = await hold(engine, captioner)
    late = asyncio.create_task(engine.caption(job(seconds=0.02)))
    await asyncio.sleep(0.05)
    captioner.go.set()
    with pytest.raises(Problem) as caught:
        await late
    assert caught.value.code == "deadline_exceeded"
    await first
    assert captioner.looked == [pictures.SIZE]


async def test_a_deadline_that_passes_while_looking_saves_the_words(
    engine: LocalEngine, captioner: FakeCaptioner
) -> None:
    described = len(captioner.described)
    captioner.go.clear()
    task = asyncio.create_task(engine.caption(job(seconds=0.05)))
    await until(captioner.looking.is_set)
    await asyncio.sleep(0.08)
    captioner.go.set()
    with pytest.raises(Problem) as caught:
        await task
    assert caught.value.code == "deadline_exceeded"
    assert len(captioner.described) == described


async def test_a_speed_that_only_the_model_refuses(engine: LocalEngine) -> None:
    with pytest.raises(Problem) as caught:
        await engine.caption(job(speed="warp"))
    assert caught.value.code == "unknown_speed"
    assert engine.ready


async def test_a_broken_model_is_not_ready_until_the_canary_passes_again(
    engine: LocalEngine, captioner: FakeCaptioner
) -> None:
    captioner.fails = RuntimeError("the GPU has gone")
    with pytest.raises(RuntimeError, match="GPU"):
        await engine.caption(job())
    await until(lambda: not engine.ready)
    with pytest.raises(Problem) as caught:
        await engine.caption(job())
    assert caught.value.code == "not_ready"
    captioner.fails = None
    await until(lambda: engine.ready)
    await engine.caption(job())


async def test_stopping_finishes_the_caption_under_way_and_gives_up_the_rest(
    engine: LocalEngine, captioner: FakeCaptioner
) -> None:
    first = await hold(engine, captioner)
    second = asyncio.create_task(engine.caption(job()))
    await until(lambda: engine.waiting == 1)
    stopping = asyncio.create_task(engine.stop())
    await until(lambda: not engine.ready)
    captioner.go.set()
    await stopping
    await first
    for waiting in (second, engine.caption(job())):
        with pytest.raises(Problem) as caught:
            await waiting
        assert caught.value.code == "stopping"


# The same over HTTP.


async def test_http_queue_full(client: httpx.AsyncClient, captioner: FakeCaptioner, app: FastAPI) -> None:
    captioner.looking.clear()
    captioner.go.clear()
    held = [asyncio.create_task(client.post(URL, content=JPEG))]
    await until(captioner.looking.is_set)
    held += [asyncio.create_task(client.post(URL, content=JPEG)) for _ in range(2)]
    await until(lambda: app.state.context.engine.waiting == 2)
    refused = await client.post(URL, content=JPEG)
    captioner.go.set()
    assert_problem(refused, 503, "overloaded", "2 photos")
    assert int(refused.headers["retry-after"]) >= 1
    assert [(await task).status_code for task in held] == [200, 200, 200]


async def test_http_deadline(client: httpx.AsyncClient, captioner: FakeCaptioner) -> None:
    captioner.go.clear()
    begin = time.monotonic()
    response = await client.post(f"{URL}?timeout_ms=60", content=JPEG)
    took = time.monotonic() - begin
    captioner.go.set()
    assert_problem(response, 504, "deadline_exceeded")
    assert 0.05 < took < 2.0


async def test_http_client_gone(client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner) -> None:
    """The server tells of a closed connection by `http.disconnect`: the job leaves the queue undone."""
    captioner.looking.clear()
    captioner.looked.clear()
    captioner.go.clear()
    held = asyncio.create_task(client.post(URL, content=JPEG))
    await until(captioner.looking.is_set)
    messages = [
        {"type": "http.request", "body": pictures.encode(pictures.photo((20, 20))), "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": URL,
        "raw_path": URL.encode(),
        "query_string": b"",
        "headers": [],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "http_version": "1.1",
        "root_path": "",
    }
    await app(scope, receive, send)  # type: ignore[arg-type]
    captioner.go.set()
    assert sent[0]["status"] == 499
    assert (await held).status_code == 200
    assert (await client.post(URL, content=JPEG)).status_code == 200
    assert captioner.looked == [pictures.SIZE, pictures.SIZE]
