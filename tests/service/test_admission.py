"""Who gets in, over HTTP, with a worker in the same process: queues, deadlines, clients that go, a stop."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

import service.caption_maker
from service import images
from service.app import create_app
from service.errors import Problem
from service.images import ImageLimits
from service.routes.context import Context
from service.settings import Settings
from service.uploads import Uploads
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


async def test_a_full_queue_does_not_keep_a_client_from_the_job_that_it_has(
    client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner
) -> None:
    def submit(key: str) -> Coroutine[Any, Any, httpx.Response]:
        headers = {"Prefer": "respond-async", "Idempotency-Key": key}
        return client.post(URL, content=photo(9), headers=headers)

    known = (await submit("before")).json()
    async with asyncio.timeout(5):
        while (await client.get(f"/v1/jobs/{known['id']}")).json()["state"] != "done":
            await asyncio.sleep(0.01)
    held = await fill(client, app, captioner)
    assert_problem(await submit("after"), 503, "overloaded")
    again = await submit("before")
    assert again.status_code == 202
    assert again.json()["id"] == known["id"]
    captioner.go.set()
    assert [(await task).status_code for task in held] == [200] * 4


async def test_interactive_photos_go_before_batch(
    client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    def decode(image: bytes, limits: ImageLimits, sufficient_side: int) -> Image.Image:
        with Image.open(io.BytesIO(image)) as header:
            begun.append(header.width - 40)
        return images.decode(image, limits, sufficient_side)

    monkeypatch.setattr(service.caption_maker, "decode", decode)
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
    assert (await scrape(client))('deecap_deadline_misses_total{place="worker"}') == 1


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
    return await exchange(app, [{"type": "http.request", "body": content, "more_body": False}])


async def exchange(
    app: FastAPI, messages: list[dict[str, Any]], query: str = "", hold: asyncio.Event | None = None, **headers: str
) -> list[dict[str, Any]]:
    """What the app sends to a client whose body comes in these messages, and who hangs up then, or after `hold`."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        if hold is not None:
            await hold.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": URL,
        "raw_path": URL.encode(),
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "http_version": "1.1",
        "root_path": "",
    }
    await app(scope, receive, send)
    return sent


async def told_at_the_head(app: FastAPI, query: str = "", **headers: str) -> tuple[int, bytes]:
    """Status and Retry-After of a request with nothing but a head: 499 where the body was waited for."""
    start, _ = await exchange(app, [], query, **headers)
    return start["status"], dict(start["headers"]).get(b"retry-after", b"")


BODY_WANTED = (499, b"")
FORM = {"content_type": "multipart/form-data; boundary=x"}


async def test_a_full_queue_refuses_before_the_body_is_sent(
    client: httpx.AsyncClient, app: FastAPI, captioner: FakeCaptioner
) -> None:
    """As far as the head tells the priority: that of a form, or of JSON, may be within."""
    assert await told_at_the_head(app) == BODY_WANTED
    held = await fill(client, app, captioner)
    for query in ("", "priority=interactive", "priority=interactive&speed=fast"):
        status, retry_after = await told_at_the_head(app, query)
        assert status == 503
        assert 1 <= int(retry_after) <= 60
    assert (await told_at_the_head(app, "priority=interactive", **FORM))[0] == 503
    assert await told_at_the_head(app, **FORM) == BODY_WANTED
    assert await told_at_the_head(app, content_type="application/json") == BODY_WANTED
    assert await told_at_the_head(app, "priority=batch") == BODY_WANTED
    front = Context.of(app).front
    for number in (4, 5):
        held.append(asyncio.create_task(client.post(f"{URL}?priority=batch", content=photo(number))))
        await until(lambda number=number: front.under_way == number + 1)
    await until(lambda: front.state is not None and front.state.waiting["batch"] == 2)
    assert (await told_at_the_head(app, **FORM))[0] == 503  # whatever it says within
    captioner.go.set()
    assert [(await task).status_code for task in held] == [200] * 6
    assert await told_at_the_head(app) == BODY_WANTED  # at once, although the last look saw a full queue


async def test_without_a_worker_or_while_it_stops_a_front_refuses_before_the_body(settings: Settings) -> None:
    broker = FakeBroker()
    broker.workers = ()
    app = create_app(settings, broker=broker)
    async with running(app) as client:
        await until(lambda: broker.opened)
        await until(lambda: Context.of(app).front.state is not None)
        assert await told_at_the_head(app) == (503, b"2")
        broker.workers = FakeBroker().workers
        await until_ready(client)
        assert await told_at_the_head(app) == BODY_WANTED
        await Context.of(app).front.drain(0)
        assert await told_at_the_head(app) == (503, b"1")


def piece(size: int, begin: bytes = b"") -> dict[str, Any]:
    return {"type": "http.request", "body": begin + bytes(size), "more_body": True}


async def test_the_bodies_of_all_requests_have_a_bound_and_go_with_their_requests(
    settings: Settings, captioner: FakeCaptioner, quick_stop: None
) -> None:
    settings = settings.model_copy(update={"max_uploads_bytes": 300_000, "queue_depth": 10})
    app = create_app(settings, load=lambda: captioner)
    async with running(app) as client:
        await until_ready(client)
        uploads = Context.of(app).uploads
        leave = asyncio.Event()
        slow = asyncio.create_task(exchange(app, [piece(100_000), piece(100_000)], hold=leave))
        await until(lambda: uploads.held == 200_000)
        refused = await client.post(URL, content=bytes(150_000))
        assert_problem(refused, 503, "overloaded", "uploaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert await told_at_the_head(app, content_length="150000") == (503, b"2")
        assert await told_at_the_head(app, content_length="90000") == BODY_WANTED
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for headers, begin in (({}, b""), (FORM, part)):  # nothing announced: counted
            unannounced = await exchange(app, [piece(60_000, begin), piece(60_000)], **headers)
            assert unannounced[0]["status"] == 503
        assert uploads.held == 200_000
        assert (await scrape(client))("deecap_uploads_bytes") == 200_000
        assert (await client.post(URL, content=photo(1))).status_code == 200
        assert uploads.held == 200_000
        leave.set()
        assert (await slow)[0]["status"] == 499
        assert uploads.held == 0
        captioner.looking.clear()
        captioner.go.clear()
        waiting = asyncio.create_task(client.post(URL, content=photo(2)))
        await until(captioner.looking.is_set)
        assert uploads.held == len(photo(2)), "a photo is held until its answer"
        captioner.go.set()
        assert (await waiting).status_code == 200
        for content in (b"no photo", photo(3)[:500], b""):
            assert (await client.post(URL, content=content)).status_code >= 400
        assert uploads.held == 0


def test_what_a_request_holds_is_freed_once() -> None:
    uploads = Uploads(100)
    one, other = uploads.begin(0), uploads.begin(60)
    one.add(60)
    with pytest.raises(Problem, match="uploaded"):
        other.add(50)
    other.add(40)
    with pytest.raises(Problem, match="uploaded"):
        uploads.begin(1)
    one.close()
    one.close()
    assert uploads.held == 40
    one.add(30)  # a straggler: its request is over
    assert uploads.held == 40
    other.close()
    assert uploads.held == 0


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
    monkeypatch.setattr("service.routes.asking._resolve", lambda table, *_: table.resolve())
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
