"""`POST /v1/captions`: many photos in one request, each with its own caption or problem."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from service.app import create_app
from service.broker.base import NoWorkerError, QueueFullError
from service.jobs import Job, Refusal, Reply
from service.settings import Settings
from tests.service import pictures
from tests.service.checks import assert_problem, assert_problem_document
from tests.service.fakes import FakeBroker, FakeCaptioner, answer_to
from tests.service.running import running, scrape, until, until_ready

pytestmark = pytest.mark.anyio

URL = "/v1/captions"
JPEG = pictures.jpeg()


def photo(width: int) -> bytes:
    return pictures.encode(pictures.photo((width, 32)))


def files(photos: Sequence[bytes], field: str = "images") -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, (f"{number}.jpg", data)) for number, data in enumerate(photos)]


async def send(client: httpx.AsyncClient, photos: Sequence[bytes], **options: Any) -> httpx.Response:
    return await client.post(URL, files=files(photos), data={name: str(value) for name, value in options.items()})


def outcomes(response: httpx.Response) -> list[Any]:
    """For each photo the width that the captioner saw, or the problem's code. Checks that each item is one of both."""
    assert response.status_code == 200, response.text
    body = response.json()
    assert set(body) == {"results", "request_id"}
    assert body["request_id"] == response.headers["x-request-id"]
    said: list[Any] = []
    for index, item in enumerate(body["results"]):
        assert set(item) == {"index", "status", "caption", "problem", "retry_after"}
        assert item["index"] == index
        assert (item["caption"] is None) != (item["problem"] is None)
        if item["problem"] is None:
            assert (item["status"], item["retry_after"]) == (200, None)
            said.append(int(item["caption"]["caption"].split()[1]))
        else:
            assert_problem_document(item["problem"], item["status"], body["request_id"])
            said.append(item["problem"]["code"])
    return said


async def test_each_photo_has_the_answer_that_it_would_have_alone(client: httpx.AsyncClient) -> None:
    response = await send(client, [photo(20), photo(30)], speed="fast", regions=True)
    assert outcomes(response) == [20, 30]
    alone = (await client.post("/v1/caption?speed=fast&regions=true", content=photo(30))).json()
    of_two = response.json()["results"][1]["caption"]
    for answer in (alone, of_two):
        assert answer.pop("timings_ms")["total"] > 0
        assert answer.pop("request_id")
    assert of_two == alone


async def test_one_that_is_wrong_fails_alone(client: httpx.AsyncClient, captioner: FakeCaptioner) -> None:
    wrong = [
        b"no picture",
        b"",
        pictures.truncated()["PNG"],
        pictures.png_header(50_000, 50_000),
        pictures.png_header(1, 1),
        JPEG + bytes(200_000),
    ]
    mixed = [photo(20), *wrong, photo(30)]
    looked = len(captioner.looked)
    codes = ["not_an_image", "missing_image", "undecodable_image", "too_many_pixels", "image_too_small"]
    assert outcomes(await send(client, mixed)) == [20, *codes, "body_too_large", 30]
    assert sorted(captioner.looked[looked:]) == [(20, 32), (30, 32)], "a broken picture reached the model"


async def test_a_photo_on_which_the_model_fails_fails_alone(settings: Settings) -> None:
    broker = FakeBroker()

    def become(job: Job) -> Reply:
        return Reply(job.id, Refusal("poison", "made up"), "w") if job.image == photo(20) else answer_to(job)

    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        asked = asyncio.create_task(send(client, [photo(30), photo(20), photo(40)]))
        for number in range(3):
            await until(lambda number=number: len(broker.submitted) > number)
            broker.say(become(broker.submitted[number]))
        items = (await asked).json()["results"]
    assert [item["status"] for item in items] == [200, 500, 200]
    assert items[1]["problem"]["code"] == "poison"


@pytest.mark.parametrize("field", ["images", "image"])
async def test_the_files_have_either_name_and_the_query_works_too(client: httpx.AsyncClient, field: str) -> None:
    response = await client.post(f"{URL}?speed=turbo", files=files([JPEG, JPEG], field), data={"beam": "2"})
    assert outcomes(response) == [48, 48]
    assert response.json()["results"][0]["caption"]["speed"]["tier"] == "turbo"


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"speed": "warp"}, "unknown_speed", "full"),
        ({"tau": 1, "speed": "fast"}, "invalid_option", "not both"),
        ({"timeout_ms": 5001}, "invalid_option", "at most 5000"),
        ({"sped": 1}, "unknown_option", "sped"),
    ],
)
async def test_wrong_options_fail_the_request(
    client: httpx.AsyncClient, options: dict[str, Any], code: str, says: str
) -> None:
    assert_problem(await send(client, [JPEG], **options), 422, code, says)


async def test_requests_that_are_none(client: httpx.AsyncClient, app: FastAPI) -> None:
    most = app.state.context.settings.max_batch_images
    assert_problem(await send(client, [b"x"] * (most + 1)), 422, "too_many_images", f"At most {most}")
    assert_problem(await send(client, [b"x"] * (most + 9)), 422, "too_many_images", f"At most {most}")
    assert outcomes(await send(client, [b"x"] * most)) == ["not_an_image"] * most
    assert_problem(await client.post(URL, content=JPEG), 415, "unsupported_media_type", "images=@a.jpg")
    assert_problem(await client.post(URL, json={"images": []}), 415, "unsupported_media_type")
    assert_problem(await client.post(URL, files=files([JPEG], "photo")), 422, "unknown_option", "photo")
    assert_problem(await client.post(URL, files={"images": (None, b"x")}), 422, "missing_image", "must be a file")
    assert_problem(await client.post(URL, files={"speed": (None, b"fast")}), 422, "missing_image", "`images`")
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_problem(await client.post(URL, content=b"", headers=form), 400, "empty_body")
    assert_problem(await client.post(URL, content=b"nonsense", headers=form), 400, "malformed_multipart")
    no_boundary = {"Content-Type": "multipart/form-data"}
    assert_problem(await client.post(URL, content=b"x", headers=no_boundary), 400, "malformed_multipart", "boundary")
    gzip = await client.post(URL, files=files([JPEG]), headers={"Content-Encoding": "gzip"})
    assert_problem(gzip, 415, "unsupported_media_type", "gzip")
    assert_problem(await client.get(URL), 405, "method_not_allowed")


async def test_the_bytes_of_all_together_are_bounded(captioner: FakeCaptioner, quick_stop: None) -> None:
    settings = Settings(max_batch_bytes=50_000)
    async with running(create_app(settings, load=lambda: captioner)) as client:
        await until_ready(client)
        assert outcomes(await send(client, [JPEG, JPEG])) == [48, 48]
        assert_problem(await send(client, [JPEG, bytes(50_000)]), 413, "body_too_large", "50,000")

        async def lying() -> Any:
            for _ in range(100):
                yield bytes(1_000)

        form = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": "10"}
        response = await client.post(URL, content=lying(), headers=form)
        assert response.status_code in (400, 413), response.text  # nonsense, or too much of it


async def test_what_is_not_ready_by_the_deadline_is_told_so_and_the_rest_is_there(settings: Settings) -> None:
    broker = FakeBroker()
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        begin = time.monotonic()
        asked = asyncio.create_task(send(client, [photo(20), photo(30), b"none", photo(40)], timeout_ms=700))
        await until(lambda: len(broker.submitted) == 1)
        broker.say(answer_to(broker.submitted[0]))
        await until(lambda: len(broker.submitted) == 2)
        broker.places[broker.submitted[1].id] = "queued"
        response = await asked
        assert 0.6 < time.monotonic() - begin < 2
        await until(lambda: broker.cancelled == [broker.submitted[1].id])
        value = await scrape(client)
        missed = [value(f'deecap_deadline_misses_total{{place="{place}"}}') for place in ("front", "queue", "worker")]
        statuses = [item["status"] for item in response.json()["results"]]
        codes = [item["problem"] and item["problem"]["code"] for item in response.json()["results"]]
    assert statuses == [200, 504, 415, 504]
    assert codes[1] == codes[3] == "deadline_exceeded"
    assert len(broker.submitted) == 2, "what could not be ready any more was put into the queue"
    assert missed == [1, 1, 0], "the first of them is the one that the queue never had"


async def test_one_request_cannot_fill_the_queue_by_itself() -> None:
    settings = Settings(queue_depth=8, batch_queue_depth=12)
    broker = FakeBroker()
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        for priority, share in (("interactive", 2), ("batch", 3)):
            before = len(broker.submitted)
            asked = asyncio.create_task(send(client, [photo(20)] * 7, priority=priority))
            await until(lambda before=before, share=share: len(broker.submitted) == before + share)
            await asyncio.sleep(0.05)
            assert len(broker.submitted) == before + share
            for number in range(7):
                await until(lambda at=before + number: len(broker.submitted) > at)
                broker.say(answer_to(broker.submitted[before + number]))
            assert [item["status"] for item in (await asked).json()["results"]] == [200] * 7


@pytest.mark.parametrize(("refusal", "code"), [(QueueFullError(2), "overloaded"), (NoWorkerError(), "no_worker")])
async def test_those_that_are_refused_say_so_each(settings: Settings, refusal: Exception, code: str) -> None:
    broker = FakeBroker()
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        asked = asyncio.create_task(send(client, [photo(20), photo(30), b"none"]))
        await until(lambda: len(broker.submitted) == 1)
        broker.refuses = refusal
        broker.say(answer_to(broker.submitted[0]))
        items = (await asked).json()["results"]
        assert [item["status"] for item in items] == [200, 503, 415]
        assert items[1]["problem"]["code"] == code
        assert items[1]["retry_after"] >= 1
        assert items[2]["retry_after"] is None
        value = await scrape(client)
        for outcome in ("ok", code, "not_an_image"):
            assert value(f'deecap_batch_images_total{{outcome="{outcome}"}}') == 1


async def test_a_client_that_hangs_up_gives_all_of_it_up(settings: Settings) -> None:
    broker = FakeBroker()
    app = create_app(settings, broker=broker)
    async with running(app) as client:
        await until_ready(client)
        asked = asyncio.create_task(send(client, [photo(20)] * 3))
        await until(lambda: len(broker.submitted) == 1)
        asked.cancel()
        await until(lambda: broker.cancelled == [broker.submitted[0].id])
        await asyncio.sleep(0.05)
        assert len(broker.submitted) == 1
        assert app.state.context.front.under_way == 0


async def test_every_photo_counts_for_the_quota(captioner: FakeCaptioner, quick_stop: None) -> None:
    settings = Settings(api_keys=SecretStr("robot:correct-horse"), quota_per_minute=5)
    async with running(create_app(settings, load=lambda: captioner)) as client:
        client.headers["X-API-Key"] = "correct-horse"
        await until_ready(client)
        assert outcomes(await send(client, [JPEG] * 4)) == [48] * 4
        refused = await send(client, [JPEG] * 2)
        assert_problem(refused, 429, "quota_exceeded", "5 captions per minute")
        assert int(refused.headers["retry-after"]) >= 1
        assert_problem(await client.post(URL, files=files([JPEG]), headers={"X-API-Key": "x"}), 401, "unauthorized")


async def test_what_the_service_could_not_do_is_not_charged(settings: Settings) -> None:
    keys = {"api_keys": SecretStr("robot:correct-horse"), "quota_per_minute": 4}
    broker = FakeBroker()
    async with running(create_app(settings.model_copy(update=keys), broker=broker)) as client:
        client.headers["X-API-Key"] = "correct-horse"
        await until_ready(client)
        broker.refuses = QueueFullError(2)
        for _ in range(2):
            assert outcomes(await send(client, [JPEG, JPEG, b"none"])) == ["overloaded", "overloaded", "not_an_image"]
        refused = await send(client, [JPEG, JPEG, JPEG])
        assert_problem(refused, 429, "quota_exceeded")  # since two bad photos were its own fault


async def test_nobody_sends_photos_to_who_cannot_caption(settings: Settings) -> None:
    broker = FakeBroker()
    broker.workers = ()
    async with running(create_app(settings, broker=broker)) as client:
        await until(lambda: broker.opened)
        await asyncio.sleep(0.02)
        assert_problem(await send(client, [JPEG]), 503, "no_worker")
