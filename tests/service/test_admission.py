"""Who gets in, over HTTP, with a worker in the same process: queues, deadlines, clients that go, a stop."""

from __future__ import annotations

import asyncio
import io
import time
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

import service.worker
from service import images
from service.app import create_app
from service.images import ImageLimits
from service.routes.context import Context
from service.settings import Settings
from tests.service import pictures
from tests.service.checks import assert_problem
from tests.service.fakes import LOST, FakeBroker, FakeCaptioner, answer_to
from tests.service.running import running, scrape, until, until_ready

pytestmark = pytest.mark.anyio

JPEG = pictures.jpeg()
URL = "/v1/caption"


def photo(number: int) -> bytes:
    """No two alike, since the same photo is captioned once for all who ask."""
    return pictures.encode(pictures.photo((40 + number, 32)))


async def fill(client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner) -> list[asyncio.Task[httpx.Response]]:
    """Four requests, two of them in the hands of the worker, which is held, and two that fill the queue."""
    captioner.looking.clear()
    captioner.go.clear()
    front = Context.of(app).front
    tasks = [asyncio.create_task(client.post(URL, content=photo(0)))]
    await until(captioner.looking.is_set)
    for number in (1, 2, 3):
        tasks.append(asyncio.create_task(client.post(URL, content=photo(number))))
        await until(lambda number=number: front.under_way == number + 1)
    await until(lambda: front.state is not None and front.state.waiting["interactive"] == 2)
    return tasks


async def test_one_thread_has_the_model(client: httpx.AsyncClient, captioner: FakeCaptioner) -> None:
    await asyncio.gather(*(client.post(URL, content=photo(number)) for number in range(2)))
    assert captioner.threads == {"model"}


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(
    client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner
) -> None:
    held = await fill(client, app, captioner)
    begin = time.monotonic()
    refused = await client.post(URL, content=photo(9))
    assert time.monotonic() - begin < 0.5
    assert_problem(refused, 503, "overloaded", "2 photos")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    batch = asyncio.create_task(client.post(f"{URL}?priority=batch", content=photo(10)))  # has a queue of its own
    await until(lambda: Context.of(app).front.under_way == 5)
    captioner.go.set()
    assert [(await task).status_code for task in [*held, batch]] == [200] * 5
    value = await scrape(client)
    assert value('deecap_rejections_total{reason="overloaded"}') == 1


async def test_interactive_photos_go_before_batch(
    client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    def decode(image: bytes, limits: ImageLimits) -> Image.Image:
        with Image.open(io.BytesIO(image)) as header:
            begun.append(header.width - 40)
        return images.decode(image, limits)

    monkeypatch.setattr(service.worker, "decode", decode)
    captioner.looking.clear()
    captioner.go.clear()
    front = Context.of(app).front
    tasks = [asyncio.create_task(client.post(URL, content=photo(0)))]
    await until(captioner.looking.is_set)
    for number, priority in enumerate(("batch", "batch", "batch", "interactive"), start=1):
        tasks.append(asyncio.create_task(client.post(f"{URL}?priority={priority}", content=photo(number))))
        await until(lambda number=number: front.under_way == number + 1)
    await until(lambda: front.state is not None and front.state.waiting == {"interactive": 1, "batch": 2})
    captioner.go.set()
    assert [(await task).status_code for task in tasks] == [200] * 5
    assert begun[:2] == [0, 1]  # in the worker's hands before there was anything else
    assert begun.index(4) < begun.index(3)  # two are decoded at once: either of 2 and 4 may be first


async def test_a_deadline_is_told_in_time_and_spares_the_work(
    client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner
) -> None:
    captioner.looking.clear()
    captioner.go.clear()
    described = len(captioner.described)
    begin = time.monotonic()
    response = await client.post(f"{URL}?timeout_ms=60", content=JPEG)
    took = time.monotonic() - begin
    assert_problem(response, 504, "deadline_exceeded")
    assert 0.05 < took < 2.0
    assert captioner.looking.is_set()
    captioner.go.set()
    assert (await client.post(URL, content=photo(1))).status_code == 200
    assert len(captioner.described) == described + 1
    assert (await scrape(client))('deecap_deadline_misses_total{place="front"}') == 1


async def test_a_job_past_its_deadline_is_not_looked_at(
    client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner
) -> None:
    held = await fill(client, app, captioner)
    held[3].cancel()  # makes room for the one that will be late
    await asyncio.gather(held[3], return_exceptions=True)
    await until(lambda: Context.of(app).front.under_way == 3)
    await asyncio.sleep(0)
    late = await client.post(f"{URL}?timeout_ms=50", content=photo(9))
    assert_problem(late, 504, "deadline_exceeded")
    captioner.go.set()
    assert [(await task).status_code for task in held[:3]] == [200] * 3
    assert (49, 32) not in captioner.looked
    assert (43, 32) not in captioner.looked


async def post_and_hang_up(app: FastAPI, content: bytes) -> list[dict[str, Any]]:
    """What the app sends to a client that closes the connection after its body."""
    messages = [{"type": "http.request", "body": content, "more_body": False}, {"type": "http.disconnect"}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
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
    return sent


async def test_a_client_that_hangs_up_frees_its_place_and_only_its_own(
    client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner
) -> None:
    held = await fill(client, app, captioner)
    held[3].cancel()
    await asyncio.gather(held[3], return_exceptions=True)
    front = Context.of(app).front
    await until(lambda: front.state is not None and front.state.waiting["interactive"] == 1)
    for _ in range(10):  # each takes the one place that is left, and leaves it again
        sent = await post_and_hang_up(app, photo(9))
        assert sent[0]["status"] == 499
        await asyncio.sleep(0)
    captioner.go.set()
    assert [(await task).status_code for task in held[:3]] == [200] * 3
    assert (49, 32) not in captioner.looked
    value = await scrape(client)
    assert value("deecap_disconnects_total") == 10
    assert value("deecap_captions_under_way") == 0


async def test_a_service_that_stops_answers_what_is_under_way(
    client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner
) -> None:
    held = await fill(client, app, captioner)
    draining = asyncio.create_task(Context.of(app).front.drain(5.0))
    await asyncio.sleep(0)
    for response in (await client.get("/readyz"), await client.post(URL, content=photo(9))):
        assert_problem(response, 503, "stopping")
        assert int(response.headers["retry-after"]) >= 1
    assert (await client.get("/livez")).status_code == 200
    captioner.go.set()
    assert [(await task).status_code for task in held] == [200] * 4
    await draining


async def test_a_worker_with_other_speeds_than_those_shown_refuses_in_words(
    client: httpx.AsyncClient, captioner: FakeCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bundles at once, in a rolling update: the front knows one table and the worker has another."""
    monkeypatch.setattr("service.routes.caption.resolve", lambda table, options: table.resolve())
    assert_problem(await client.post(f"{URL}?speed=warp", content=JPEG), 422, "unknown_speed")
    assert (await client.get("/readyz")).status_code == 200


async def test_a_front_alone(settings: Settings) -> None:
    """Over another process's store: no model of its own, and the job carries all that the worker's log needs."""
    broker = FakeBroker()
    broker.workers = ()
    async with running(create_app(settings, broker=broker)) as client:
        await until(lambda: broker.opened)
        await asyncio.sleep(0.02)
        assert (await client.get("/startupz")).status_code == 200
        begin = time.monotonic()
        assert_problem(await client.get("/readyz"), 503, "no_worker")
        assert_problem(await client.post(URL, content=JPEG), 503, "no_worker")
        assert_problem(await client.get("/v1/speeds"), 503, "no_worker")
        assert time.monotonic() - begin < 0.5
        broker.workers = FakeBroker().workers
        await until_ready(client)
        parent = f"00-{'a1' * 16}-{'b2' * 8}-01"
        headers = {"X-Request-ID": "mine", "traceparent": parent}
        asking = asyncio.create_task(client.post(f"{URL}?speed=fast&priority=batch", content=JPEG, headers=headers))
        await until(lambda: bool(broker.submitted))
        [job] = broker.submitted
        assert (job.image, job.speed, job.tau, job.beam) == (JPEG, "fast", None, 1)
        assert (job.priority, job.request_id, job.traceparent) == ("batch", "mine", parent)
        assert 4.0 < job.deadline - time.time() <= 5.0
        broker.say(answer_to(job))
        answer = await asking
        assert answer.json()["caption"] == "mine a b"
        timing = answer.headers["server-timing"]
        assert timing.startswith("queue;dur=10.0, decode;dur=2.0, look;dur=30.0, describe;dur=4.0, total;dur=")
        broker.raises = LOST
        await until(lambda: not broker.submitted[1:])
        for _ in range(100):
            if (await client.get("/readyz")).json().get("code") == "unavailable":
                break
            await asyncio.sleep(0.01)
        begin = time.monotonic()
        assert_problem(await client.post(URL, content=JPEG), 503, "unavailable")
        assert time.monotonic() - begin < 0.5
        assert (await scrape(client))("deecap_store_up") == 0
        broker.raises = None


async def test_an_invalid_traceparent_is_ignored(settings: Settings) -> None:
    broker = FakeBroker()
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        asking = asyncio.create_task(client.post(URL, content=JPEG, headers={"traceparent": "00-zz-zz-01"}))
        await until(lambda: bool(broker.submitted))
        assert broker.submitted[0].traceparent == ""
        broker.say(answer_to(broker.submitted[0]))
        assert (await asking).status_code == 200
