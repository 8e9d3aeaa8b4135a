"""What there is beside captions: probes, speeds, the model, metrics, the OpenAPI page."""

from __future__ import annotations

import asyncio
import base64
import re

import httpx
import pytest
from fastapi import FastAPI

from model.exits import TIERS
from service.app import create_app
from service.errors import KINDS
from service.routes.caption_docs import TINY_PNG
from service.settings import Settings
from tests.service import pictures
from tests.service.checks import assert_problem
from tests.service.fakes import LAYERS, SPEEDS, FakeCaptioner
from tests.service.running import running, scrape, until, until_ready

pytestmark = pytest.mark.anyio

JPEG = pictures.jpeg()


async def test_probes_when_all_is_well(client: httpx.AsyncClient) -> None:
    for url in ("/livez", "/startupz", "/readyz"):
        response = await client.get(url)
        assert (response.status_code, response.json()) == (200, {"status": "ok"}), url


async def test_everything_says_so_while_the_model_loads(app: FastAPI, captioner: FakeCaptioner) -> None:
    captioner.go.clear()
    async with running(app) as client:
        assert (await client.get("/livez")).status_code == 200
        assert_problem(await client.get("/startupz"), 503, "not_ready", "starting")
        for url in ("/readyz", "/v1/speeds", "/v1/model"):
            response = await client.get(url)
            assert_problem(response, 503, "not_ready", "being loaded")
            assert response.headers["retry-after"] == "2"
        assert_problem(await client.post("/v1/caption", content=JPEG), 503, "not_ready")
        captioner.go.set()
        await until_ready(client)
        assert (await client.get("/startupz")).status_code == 200
        assert (await client.post("/v1/caption", content=JPEG)).status_code == 200


async def test_a_broken_model_is_started_but_not_ready_until_it_captions_again(
    client: httpx.AsyncClient, captioner: FakeCaptioner
) -> None:
    captioner.fails = RuntimeError("gone")
    assert_problem(await client.post("/v1/caption", content=JPEG), 500, "internal")
    for _ in range(200):
        if (await client.get("/readyz")).status_code != 200:
            break
        await asyncio.sleep(0.01)
    assert (await client.get("/startupz")).status_code == 200
    assert_problem(await client.get("/readyz"), 503, "not_ready", "cannot caption")
    assert_problem(await client.post("/v1/caption", content=JPEG), 503, "not_ready", "cannot caption")
    captioner.fails = None
    await until_ready(client)
    assert (await client.post("/v1/caption", content=JPEG)).status_code == 200


async def test_a_model_that_cannot_be_loaded_is_reported(settings: Settings) -> None:
    def load() -> FakeCaptioner:
        raise ValueError("no such bundle")

    told: list[bool] = []
    async with running(create_app(settings, load=load, on_failure=lambda: told.append(True))) as client:
        await until(lambda: bool(told))
        assert_problem(await client.get("/readyz"), 503, "not_ready", "being loaded")
    assert told == [True]


async def test_speeds(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/v1/speeds")).json()
    assert answer["default"] == "balanced"
    assert answer["range"] == {"lowest": 1.0, "highest": 4.5}
    assert [tier["name"] for tier in answer["tiers"]] == list(TIERS)
    assert answer["tiers"][3] == {"name": "turbo", "target": 4.0, "tau": 3.0, "promised": 4.0}
    assert len(answer["table"]) == len(SPEEDS.rows)
    assert answer["table"][1] == {
        "tau": 1.0,
        "speedup": 2.0,
        "executed_speedup": 1.5,
        "cider": 49.0,
        "describe_ms": 19.0,
    }
    assert answer["measured"] == {"split": "made up"}


async def test_model(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/model")).json() == {
        "name": "fake",
        "revision": "0123456789ab",
        "layers": LAYERS,
        "device": "cpu",
        "vocabulary_size": 3,
    }


async def test_metrics(client: httpx.AsyncClient) -> None:
    for query in (
        "",
        "?speed=full",
        "?speed=fast",
        "?speed=turbo",
        "?speed=1.7",
        "?speed=2.9",
        "?tau=1",
        "?speed=warp",
    ):
        await client.post(f"/v1/caption{query}", content=JPEG)
    await client.post("/caption", content=b"x")
    await client.get("/nowhere")
    await client.get("/problems/internal")
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    value = await scrape(client)
    speeds = set(re.findall(r'deecap_exit_layer_count{speed="(\w+)"}', response.text))
    assert speeds == {"full", "balanced", "fast", "turbo", "custom", "tau"}
    buckets = re.findall(r'deecap_exit_layer_bucket{le="([^"]+)",speed="custom"}', response.text)
    assert buckets == ["1.0", "2.0", "3.0", "4.0", "5.0", "6.0", "+Inf"]
    # Two captions, each leaving at layers 1, 3, 2 and, for the end of the sentence, 6.
    assert [value(f'deecap_exit_layer_bucket{{le="{n}.0",speed="custom"}}') for n in range(1, 7)] == [2, 4, 6, 6, 6, 8]
    assert value('deecap_exit_layer_sum{speed="custom"}') == 24
    assert value('deecap_words_total{speed="custom"}') == 6
    assert value('deecap_layers_saved_total{speed="custom"}') == 2 * (5 + 3 + 4 + 0)
    requests = "deecap_request_duration_seconds_count"
    assert value(f'{requests}{{outcome="ok",route="/v1/caption",speed="custom"}}') == 2
    assert value(f'{requests}{{outcome="unknown_speed",route="/v1/caption",speed="none"}}') == 1
    assert value(f'{requests}{{outcome="not_an_image",route="/caption",speed="balanced"}}') == 1
    assert value(f'{requests}{{outcome="not_found",route="unmatched",speed="none"}}') == 1
    assert value(f'{requests}{{outcome="ok",route="/problems/{{code}}",speed="none"}}') == 1
    for stage in ("queue", "decode_image", "look", "describe"):
        assert value(f'deecap_stage_duration_seconds_count{{stage="{stage}"}}') == 7
    assert value("deecap_requests_in_flight") == 1  # this one
    assert value('deecap_queue_jobs{priority="interactive"}') == 0
    assert value('deecap_model_info{device="cpu",layers="6",name="fake",revision="0123456789ab"}') == 1


async def test_two_apps_count_apart(settings: Settings, client: httpx.AsyncClient, app: FastAPI) -> None:
    other = create_app(settings)
    assert other.state.context.metrics.registry is not app.state.context.metrics.registry


async def test_openapi_shows_all_three_forms_and_the_problems(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    post = document["paths"]["/v1/caption"]["post"]
    content = post["requestBody"]["content"]
    assert {"multipart/form-data", "application/json", "image/jpeg"} <= set(content)
    names = {parameter["name"] for parameter in post["parameters"] if parameter["in"] == "query"}
    assert names == {"speed", "tau", "beam", "regions", "attention", "timeout_ms", "priority", "min_speed", "max_speed"}
    for form in ("multipart/form-data", "application/json"):
        assert set(content[form]["schema"]["properties"]) == names | {"image"}
    assert "ProblemOut" in document["components"]["schemas"]
    shown = {
        code
        for response in post["responses"].values()
        for code in response["content"].get("application/problem+json", {}).get("examples", {})
    }
    # Those that no caption request can get, the one of a head that is no request, and the one that nobody reads.
    others = {"bad_request", "not_found", "unknown_job", "method_not_allowed", "too_many_images", "invalid_request"}
    assert shown == set(KINDS) - others - {"head_too_large", "client_gone"}
    assert (await client.get("/docs")).status_code == 200
    assert "/docs" in document["info"]["description"] or "v1/speeds" in document["info"]["description"]


async def test_every_reference_in_the_openapi_document_leads_somewhere(client: httpx.AsyncClient) -> None:
    response = await client.get("/openapi.json")
    for reference in set(re.findall(r'"\$ref": ?"([^"]+)"', response.text)):
        place = response.json()
        for step in reference.removeprefix("#/").split("/"):
            assert step in place, reference
            place = place[step]


async def test_the_examples_of_the_documentation_work(client: httpx.AsyncClient) -> None:
    examples = (await client.get("/openapi.json")).json()["paths"]["/v1/caption"]["post"]["requestBody"]["content"]
    assert base64.b64decode(TINY_PNG).startswith(b"\x89PNG")
    for example in examples["application/json"]["examples"].values():
        assert (await client.post("/v1/caption", json=example["value"])).status_code == 200


async def test_home_leads_to_the_documentation(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert 'href="docs"' in response.text


async def test_a_problems_type_leads_to_what_it_means(client: httpx.AsyncClient) -> None:
    problem = (await client.post("/v1/caption", content=b"x")).json()
    assert (await client.get(problem["type"])).json() == {
        "code": "not_an_image",
        "status": 415,
        "title": problem["title"],
    }
