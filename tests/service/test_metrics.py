"""What a front tells Prometheus, in both formats."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from service.app import create_app
from service.metrics import SECONDS
from service.settings import Settings
from tests.service import pictures
from tests.service.fakes import LOST, FakeBroker, worker_state
from tests.service.running import running, scrape, until, until_ready

pytestmark = pytest.mark.anyio

JPEG = pictures.jpeg()
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0; q=0.8, text/plain; q=0.5"}


async def exemplar_ids(client: httpx.AsyncClient) -> set[str]:
    response = await client.get("/metrics", headers=OPENMETRICS)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    samples = families["deecap_request_duration_seconds"].samples
    return {sample.exemplar.labels["request_id"] for sample in samples if sample.exemplar}


async def test_openmetrics_has_request_ids_as_exemplars(client: httpx.AsyncClient) -> None:
    await client.post("/v1/caption", content=JPEG, headers={"X-Request-ID": "find-me"})
    await client.get("/v1/speeds", headers={"X-Request-ID": "x" * 128})  # too long for an exemplar: left out
    ids = await exemplar_ids(client)
    assert "find-me" in ids
    assert "x" * 128 not in ids
    text = (await client.get("/metrics")).text
    assert "find-me" not in text, "the text format has no exemplars"


@pytest.mark.parametrize("accept", ["", "*/*", "application/openmetrics-text; version=next", ";;=", "text/html"])
async def test_any_accept_header_gets_something(client: httpx.AsyncClient, accept: str) -> None:
    response = await client.get("/metrics", headers={"Accept": accept})
    assert response.status_code == 200
    assert "deecap_request_duration_seconds_bucket" in response.text


def test_the_promised_times_are_edges() -> None:
    assert {0.1, 0.25} <= set(SECONDS)
    assert len([edge for edge in SECONDS if 0.01 <= edge <= 0.1]) >= 7  # where captions are
    assert list(SECONDS) == sorted(SECONDS)


async def test_rejections_are_counted_by_reason_and_probes_are_none(client: httpx.AsyncClient) -> None:
    for content, query in ((b"x", ""), (b"x", ""), (JPEG, "?speed=warp"), (JPEG, "")):
        await client.post(f"/v1/caption{query}", content=content)
    await client.get("/nowhere")
    value = await scrape(client)
    assert value('deecap_rejections_total{reason="not_an_image"}') == 2
    assert value('deecap_rejections_total{reason="unknown_speed"}') == 1
    assert (await client.get("/metrics")).text.count("deecap_rejections_total{") == 2


async def test_queue_and_workers_as_the_store_says(settings: Settings) -> None:
    broker = FakeBroker()
    broker.workers = (worker_state("a"), worker_state("b"), worker_state("c", ready=False))
    broker.waiting = {"interactive": 7, "batch": 3}
    broker.oldest, broker.answered, broker.redelivered, broker.dead = 1.5, 100, 4, 1
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        value = await scrape(client)
        expected = {
            'deecap_queue_jobs{priority="interactive"}': 7,
            'deecap_queue_jobs{priority="batch"}': 3,
            "deecap_queue_oldest_seconds": 1.5,
            "deecap_queue_answered_total": 100,
            "deecap_redeliveries_total": 4,
            "deecap_dead_letters_total": 1,
            'deecap_workers{state="alive"}': 3,
            'deecap_workers{state="ready"}': 2,
            "deecap_slots": 12,
            "deecap_jobs_running": 0,
            "deecap_store_up": 1,
            "deecap_store_losses_total": 0,
            "deecap_resubmissions_total": 0,
            'deecap_deadline_misses_total{place="worker"}': 0,
        }
        assert {series: value(series) for series in expected} == expected
        broker.waiting = {"interactive": 0, "batch": 0}  # else there is no room
        asking = asyncio.create_task(client.post("/v1/caption", content=JPEG))
        await until(lambda: len(broker.submitted) == 1)
        assert (await scrape(client))("deecap_captions_under_way") == 1
        broker.raises = LOST
        for _ in range(200):
            if (await client.get("/readyz")).status_code == 503:
                break
            await asyncio.sleep(0.01)
        text = (await client.get("/metrics")).text
        assert "deecap_store_up 0.0" in text
        assert "deecap_queue_jobs" not in text, "nobody knows"
        broker.submitted.clear()  # the store comes back empty
        broker.raises = None
        await until(lambda: len(broker.submitted) == 1)
        await until_ready(client)
        value = await scrape(client)
        assert (value("deecap_store_losses_total"), value("deecap_resubmissions_total")) == (1, 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
