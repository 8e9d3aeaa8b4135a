"""`POST /v1/caption`: the three forms of a request, the options, and the answer."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from typing import Any

import httpx
import pytest

from model.exits import SpeedTable
from service.app import create_app
from service.jobs import Answer
from service.settings import Settings
from tests.service import pictures
from tests.service.checks import assert_problem
from tests.service.fakes import LAYERS, SPEEDS, FakeBroker, FakeCaptioner, answer_to, worker_state
from tests.service.running import running, until, until_ready

pytestmark = pytest.mark.anyio

JPEG = pictures.jpeg()
URL = "/v1/caption"


async def send(client: httpx.AsyncClient, form: str, options: dict[str, Any]) -> httpx.Response:
    """The photo and the options in one of the forms that a request can have."""
    if form == "raw":
        return await client.post(URL, params=options, content=JPEG, headers={"Content-Type": "image/jpeg"})
    if form == "multipart":
        data = {name: str(value) for name, value in options.items()}
        return await client.post(URL, data=data, files={"image": ("a.jpg", JPEG)})
    if form == "multipart and query":
        return await client.post(URL, params=options, files={"image": ("a.jpg", JPEG)})
    return await client.post(URL, json={"image": base64.b64encode(JPEG).decode(), **options})


FORMS = ["raw", "multipart", "multipart and query", "json"]


async def test_the_answer_has_what_the_contract_says(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, content=JPEG, headers={"X-Request-ID": "abc-1"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "abc-1"
    answer = response.json()
    timings = answer.pop("timings_ms")
    words = answer["caption"].split()
    assert words[1:] == ["48", "32"]
    assert answer == {
        "caption": " ".join(words),
        "confidence": pytest.approx(0.904837, abs=1e-5),
        "words": [
            {"text": word, "exit_layer": layer, "entropy": layer / 2}
            for word, layer in zip(words, (1, 3, 2), strict=True)
        ],
        "speed": {
            "requested": "balanced",
            "tier": "balanced",
            "tau": 1.0,
            "promised": 2.0,
            "moved_by_load": False,
        },
        "speedup": LAYERS * 4 / 12,  # the end of the sentence counts
        "model": {"name": "fake", "revision": "0123456789ab"},
        "request_id": "abc-1",
    }
    assert set(timings) == {"queue", "decode_image", "look", "describe", "total"}
    assert all(value >= 0 for value in timings.values())
    assert timings["total"] >= timings["queue"] + timings["decode_image"] + timings["look"] + timings["describe"] - 0.01


@pytest.mark.parametrize("form", FORMS)
async def test_options_work_the_same_in_every_form(
    client: httpx.AsyncClient, captioner: FakeCaptioner, form: str
) -> None:
    options = {
        "speed": 2.5,
        "beam": 3,
        "regions": "true",
        "timeout_ms": 4000,
        "priority": "batch",
        "min_speed": "full",
        "max_speed": 3,
    }
    response = await send(client, form, options)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["speed"] == {"requested": 2.5, "tier": None, "tau": 1.5, "promised": 2.5, "moved_by_load": False}
    assert answer["regions"] == [{"box": [0, 0, 1, 1]}, {"box": [0.25, 0.5, 0.75, 1]}]
    assert captioner.described[-1] == (1.5, 3)


@pytest.mark.parametrize("form", FORMS)
async def test_tau_and_tiers(client: httpx.AsyncClient, form: str) -> None:
    assert (await send(client, form, {"tau": 0.25})).json()["speed"] == {
        "requested": None,
        "tier": None,
        "tau": 0.25,
        "promised": 1.25,
        "moved_by_load": False,
    }
    assert (await send(client, form, {"speed": "turbo"})).json()["speed"]["tier"] == "turbo"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"speed": "warp"}, "unknown_speed", "full, balanced, fast, turbo or a number from 1 to 4.50"),
        ({"speed": ""}, "unknown_speed", "full"),
        ({"speed": 0.99}, "unknown_speed", "from 1 to 4.50"),
        ({"speed": 4.51}, "unknown_speed", "from 1 to 4.50"),
        ({"speed": "nan"}, "unknown_speed", "from 1 to 4.50"),
        ({"speed": "1e999"}, "unknown_speed", "from 1 to 4.50"),
        ({"tau": "nan"}, "invalid_option", "tau"),
        ({"tau": "inf"}, "invalid_option", "tau"),
        ({"tau": -0.1}, "invalid_option", "tau"),
        ({"tau": "much"}, "invalid_option", "tau"),
        ({"tau": 1, "speed": "fast"}, "invalid_option", "speed or tau, not both"),
        ({"beam": 0}, "invalid_option", "beam"),
        ({"beam": 6}, "invalid_option", "beam"),
        ({"beam": 1.5}, "invalid_option", "beam"),
        ({"regions": "perhaps"}, "invalid_option", "regions"),
        ({"timeout_ms": 0}, "invalid_option", "timeout_ms"),
        ({"timeout_ms": 5001}, "invalid_option", "at most 5000"),
        ({"priority": "urgent"}, "invalid_option", "priority"),
        ({"min_speed": "slow"}, "unknown_speed", "full"),
        ({"max_speed": 99}, "unknown_speed", "4.50"),
        ({"min_speed": "fast", "max_speed": 2}, "invalid_option", "min_speed: must not be above max_speed"),
        ({"speed": "fast", "max_speed": 2.9}, "invalid_option", "speed: must not be above max_speed"),
        ({"speed": 1.5, "min_speed": "balanced"}, "invalid_option", "speed: must not be below min_speed"),
        ({"tau": 1, "max_speed": 2}, "invalid_option", "tau is exact"),
        ({"tau": 1, "min_speed": 2}, "invalid_option", "tau is exact"),
        ({"sped": "fast", "beem": 2}, "unknown_option", "beem, sped"),
        ({"spé": 1}, "unknown_option", "spé"),
    ],
)
async def test_wrong_options(
    client: httpx.AsyncClient, form: str, options: dict[str, Any], code: str, says: str
) -> None:
    assert_problem(await send(client, form, options), 422, code, says)


@pytest.mark.parametrize(
    "body", ['{"image": "", "speed": NaN}', '{"image": "%s", "tau": NaN}', '{"image": "%s", "tau": true}']
)
async def test_values_that_only_json_can_say(client: httpx.AsyncClient, body: str) -> None:
    body = body.replace("%s", base64.b64encode(JPEG).decode())
    response = await client.post(URL, content=body, headers={"Content-Type": "application/json"})
    assert_problem(response, 422, "missing_image" if '""' in body else "invalid_option")


@pytest.mark.parametrize("options", [{"speed": True}, {"speed": [1]}, {"speed": {"a": 1}}, {"beam": True}])
async def test_json_types_that_are_no_option(client: httpx.AsyncClient, options: dict[str, Any]) -> None:
    assert_problem(await send(client, "json", options), 422, "invalid_option", next(iter(options)))


async def test_null_in_json_is_as_good_as_nothing(client: httpx.AsyncClient) -> None:
    assert (await send(client, "json", {"speed": None, "tau": None})).json()["speed"]["tier"] == "balanced"


@pytest.mark.parametrize(
    ("options", "speed", "bounds"),
    [
        ({}, None, (None, None)),
        ({"max_speed": "turbo"}, "balanced", (None, 4.0)),
        ({"min_speed": "full", "max_speed": 3.5}, "balanced", (1.0, 3.5)),
        ({"min_speed": "fast"}, "fast", (3.0, None)),  # the default is raised to it
        ({"min_speed": 2.5, "max_speed": "turbo"}, 2.5, (2.5, 4.0)),
        ({"max_speed": 1.5}, 1.5, (None, 1.5)),  # and lowered
        ({"speed": "fast", "max_speed": 3}, "fast", (None, 3.0)),
        ({"speed": "fast", "min_speed": 3}, "fast", (3.0, None)),
        ({"speed": 2.25, "min_speed": "balanced", "max_speed": "fast"}, 2.25, (2.0, 3.0)),
    ],
)
async def test_the_speeds_that_are_allowed_travel_as_numbers(
    settings: Settings, options: dict[str, Any], speed: str | float | None, bounds: tuple[float | None, float | None]
) -> None:
    broker = FakeBroker()
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        asked = asyncio.create_task(send(client, "raw", options))
        await until(lambda: len(broker.submitted) == 1)
        job = broker.submitted[0]
        broker.say(answer_to(job))
        assert (await asked).status_code == 200
    assert (job.speed is None) == (speed is None)
    assert SPEEDS.resolve(job.speed) == SPEEDS.resolve(speed)
    assert (job.min_speed, job.max_speed) == bounds


async def test_a_tier_that_promises_a_little_more_than_its_number_is_within_that_number(settings: Settings) -> None:
    """As calibration leaves it: `fast` reaches 3.02, and who allows 3 allows it."""
    speeds = SpeedTable(SPEEDS.rows, {**SPEEDS.tiers, "fast": 2.02, "balanced": 0.98})
    broker = FakeBroker()
    state = worker_state()
    broker.workers = (replace(state, model=replace(state.model, speeds=speeds)),)
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        for options, bounds in (
            ({"speed": "fast", "max_speed": 3}, (None, 3.02)),
            ({"speed": "balanced", "min_speed": 2}, (1.98, None)),
        ):
            asked = asyncio.create_task(send(client, "raw", options))
            await until(lambda: bool(broker.submitted))
            job = broker.submitted.pop()
            broker.say(answer_to(job))
            assert (await asked).status_code == 200
            assert (job.min_speed, job.max_speed) == pytest.approx(bounds)


async def test_the_answer_says_where_load_moved_the_speed(settings: Settings) -> None:
    broker = FakeBroker()
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        asked = asyncio.create_task(send(client, "raw", {"speed": "fast", "max_speed": "turbo"}))
        await until(lambda: len(broker.submitted) == 1)
        reply = answer_to(replace(broker.submitted[0], speed=3.5))
        assert isinstance(reply.outcome, Answer)
        broker.say(replace(reply, outcome=replace(reply.outcome, asked=SPEEDS.resolve("fast"))))
        said = (await asked).json()["speed"]
    assert said == {"requested": "fast", "tier": None, "tau": 2.5, "promised": 3.5, "moved_by_load": True}


async def test_an_option_given_twice(client: httpx.AsyncClient) -> None:
    twice = await client.post(f"{URL}?speed=fast&speed=full", content=JPEG)
    assert_problem(twice, 422, "repeated_field", "speed")
    both = await client.post(f"{URL}?beam=2", data={"beam": "3"}, files={"image": JPEG})
    assert_problem(both, 422, "repeated_field", "beam")


async def test_the_alias_answers_the_same(client: httpx.AsyncClient) -> None:
    answers = [(await client.post(url, content=JPEG)).json() for url in (URL, "/caption")]
    assert answers[0]["words"] == answers[1]["words"]
    assert answers[0]["request_id"] != answers[1]["request_id"]


@pytest.mark.parametrize(
    "declared", ["image/png", "application/octet-stream", "application/x-www-form-urlencoded", None]
)
async def test_the_bytes_decide_the_format_and_not_the_declared_type(
    client: httpx.AsyncClient, declared: str | None
) -> None:
    headers = {} if declared is None else {"Content-Type": declared}
    assert (await client.post(URL, content=JPEG, headers=headers)).status_code == 200


@pytest.mark.parametrize("dress", ["data:image/jpeg;base64,{}", "{}\n", " {}"])
async def test_base64_as_people_send_it(client: httpx.AsyncClient, dress: str) -> None:
    encoded = base64.encodebytes(JPEG).decode()  # with line breaks
    assert (await client.post(URL, json={"image": dress.format(encoded)})).status_code == 200


@pytest.mark.parametrize("sent", ["", "a" * 129, "a b", "ab\x7f", "{x}"])
async def test_an_unsafe_request_id_is_replaced(client: httpx.AsyncClient, sent: str) -> None:
    response = await client.get("/livez", headers={"X-Request-ID": sent})
    assert len(response.headers["x-request-id"]) == 32
    assert response.headers["x-request-id"] != sent


async def test_a_safe_request_id_comes_back_on_every_answer(client: httpx.AsyncClient) -> None:
    for url in ("/livez", "/v1/speeds", "/nowhere", "/metrics", "/"):
        response = await client.get(url, headers={"X-Request-ID": "a" * 128})
        assert response.headers["x-request-id"] == "a" * 128, url
