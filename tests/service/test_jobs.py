"""`Prefer: respond-async` and `/v1/jobs/{id}`: asked now, answered later, once, and only to who asked."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from service.app import create_app
from service.broker.base import BrokerLostError, Found, QueueFullError
from service.jobs import Refusal, Reply
from service.routes.jobs import _fingerprint, is_of, new_id
from service.schemas import CaptionOptions
from service.settings import Settings
from tests.service import pictures
from tests.service.checks import assert_problem, assert_problem_document
from tests.service.fakes import FakeBroker, FakeCaptioner, answer_to
from tests.service.running import running, scrape, until, until_ready

pytestmark = pytest.mark.anyio

JPEG = pictures.jpeg()
OTHER = pictures.encode(pictures.photo((20, 32)))
URL = "/v1/caption"
LATER = {"Prefer": "respond-async"}


async def submit(
    client: httpx.AsyncClient, content: bytes = JPEG, key: str | None = None, **options: Any
) -> httpx.Response:
    headers = LATER if key is None else {**LATER, "Idempotency-Key": key}
    return await client.post(URL, content=content, params=options, headers=headers)


def taken(response: httpx.Response) -> dict[str, Any]:
    """The job, as the 202 tells of it."""
    assert response.status_code == 202, response.text
    assert response.headers["preference-applied"] == "respond-async"
    job: dict[str, Any] = response.json()
    assert set(job) == {"id", "state", "position", "result", "problem"}
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


async def outcome(client: httpx.AsyncClient, id: str) -> dict[str, Any]:
    """The job when it is over."""
    for _ in range(1000):
        response = await client.get(f"/v1/jobs/{id}")
        assert response.status_code == 200, response.text
        job: dict[str, Any] = response.json()
        if job["state"] in ("done", "failed"):
            assert "retry-after" not in response.headers
            return job
        assert response.headers["retry-after"] == "1"
        await asyncio.sleep(0.005)
    raise AssertionError(f"not over in five seconds: {job}")


async def test_a_job_is_captioned_and_found(client: httpx.AsyncClient) -> None:
    headers = {**LATER, "X-Request-ID": "mine"}
    job = taken(await client.post(f"{URL}?speed=fast&regions=true", content=JPEG, headers=headers))
    done = await outcome(client, job["id"])
    assert (done["state"], done["position"], done["problem"]) == ("done", None, None)
    value = await scrape(client)
    assert value('deecap_request_duration_seconds_count{outcome="accepted",route="/v1/caption",speed="fast"}') == 1
    assert value('deecap_request_duration_seconds_count{outcome="ok",route="/v1/jobs/{id}",speed="none"}') >= 1
    alone = (await client.post(f"{URL}?speed=fast&regions=true", content=JPEG)).json()
    assert done["result"].pop("request_id") == "mine"
    del alone["request_id"]
    times = done["result"].pop("timings_ms")
    del alone["timings_ms"]
    assert done["result"] == alone
    assert times["total"] == pytest.approx(sum(value for name, value in times.items() if name != "total"), abs=0.01)
    again = await client.get(f"/v1/jobs/{job['id']}")
    assert again.json()["state"] == "done"
    without = await outcome(client, taken(await submit(client))["id"])
    assert "regions" not in without["result"]


async def test_it_has_a_deadline_of_its_own(settings: Settings) -> None:
    settings = settings.model_copy(update={"job_timeout_s": 60.0, "job_kept_s": 120.0})
    broker = FakeBroker()
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        taken(await submit(client))
        taken(await submit(client, timeout_ms=20_000))
        assert_problem(await submit(client, timeout_ms=60_001), 422, "invalid_option", "at most 60000")
        assert_problem(await client.post(f"{URL}?timeout_ms=20000", content=JPEG), 422, "invalid_option", "5000")
        left = [job.deadline - broker.clock() for job in broker.submitted]
        assert left == pytest.approx([60, 20], abs=2)
        assert {job.kept for job in broker.submitted} == {120.0}
        assert not any(job.stream for job in broker.submitted)


async def test_where_it_stands(client: httpx.AsyncClient, captioner: FakeCaptioner) -> None:
    captioner.go.clear()
    captioner.looking.clear()
    ids = [taken(await submit(client))["id"]]
    await until(captioner.looking.is_set)
    for _ in range(9):  # as many as there is room for
        response = await submit(client)
        if response.status_code == 503:
            assert_problem(response, 503, "overloaded")
            break
        ids.append(taken(response)["id"])
    jobs = [(await client.get(f"/v1/jobs/{id}")).json() for id in ids]
    assert response.status_code == 503
    assert jobs[0]["state"] == "running"
    assert [job["position"] for job in jobs if job["state"] == "queued"] == [0, 1]
    assert all(job["position"] is None for job in jobs if job["state"] == "running")
    captioner.go.set()
    assert [(await outcome(client, id))["state"] for id in ids] == ["done"] * len(ids)


async def test_one_that_fails_says_why(client: httpx.AsyncClient) -> None:
    job = taken(await submit(client, pictures.truncated()["PNG"]))
    failed = await outcome(client, job["id"])
    assert (failed["state"], failed["result"]) == ("failed", None)
    assert failed["problem"]["code"] == "undecodable_image"
    assert_problem_document(failed["problem"], 422, failed["problem"]["request_id"])


async def test_a_code_that_this_front_does_not_know_is_a_failure(settings: Settings) -> None:
    broker = FakeBroker()
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        id = taken(await submit(client))["id"]
        broker.found[id] = Found("done", reply=Reply(id, Refusal("of_tomorrow", "made up")), note="of tomorrow too")
        failed = await outcome(client, id)
    assert failed["problem"]["code"] == "internal"


async def test_what_is_wrong_with_the_request_is_told_at_once(client: httpx.AsyncClient) -> None:
    assert_problem(await submit(client, b"none"), 415, "not_an_image")
    assert_problem(await submit(client, speed="warp"), 422, "unknown_speed")
    assert_problem(await submit(client, sped=1), 422, "unknown_option")


async def assert_gone(client: httpx.AsyncClient, id: str) -> None:
    assert_problem(await client.get(f"/v1/jobs/{id}"), 404, "unknown_job")
    assert_problem(await client.delete(f"/v1/jobs/{id}"), 404, "unknown_job")


async def test_one_that_waits_is_deleted_and_never_captioned(
    client: httpx.AsyncClient, captioner: FakeCaptioner
) -> None:
    described = len(captioner.described)
    captioner.go.clear()
    captioner.looking.clear()
    ids = [taken(await submit(client))["id"]]
    await until(captioner.looking.is_set)
    while (await client.get(f"/v1/jobs/{ids[-1]}")).json()["state"] != "queued":
        ids.append(taken(await submit(client))["id"])
    id = ids.pop()
    response = await client.delete(f"/v1/jobs/{id}")
    assert (response.status_code, response.content) == (204, b"")
    await assert_gone(client, id)
    captioner.go.set()
    assert [(await outcome(client, other))["state"] for other in ids] == ["done"] * len(ids)
    await assert_gone(client, id)
    assert (await client.post(URL, content=JPEG)).status_code == 200
    assert len(captioner.described) == described + len(ids) + 1, "the deleted one was captioned after all"


async def test_one_that_is_being_captioned_is_stopped(
    client: httpx.AsyncClient, captioner: FakeCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as endless:
        endless.setattr(captioner, "steps_of", lambda _: 1_000_000)
        id = taken(await submit(client))["id"]
        await until(lambda: bool(captioner.making))
        assert (await client.get(f"/v1/jobs/{id}")).json()["state"] == "running"
        assert (await client.delete(f"/v1/jobs/{id}")).status_code == 204
        await assert_gone(client, id)
        await until(lambda: not captioner.making)
    assert (await client.post(URL, content=JPEG)).status_code == 200
    await assert_gone(client, id)


async def test_one_that_is_done_is_forgotten(client: httpx.AsyncClient) -> None:
    id = taken(await submit(client))["id"]
    await outcome(client, id)
    assert (await client.delete(f"/v1/jobs/{id}")).status_code == 204
    await assert_gone(client, id)


@pytest.mark.parametrize("id", ["none", "0" * 40, "é", "a" * 999])
async def test_jobs_that_never_were(client: httpx.AsyncClient, id: str) -> None:
    assert_problem(await client.get(f"/v1/jobs/{id}"), 404, "unknown_job")
    assert_problem(await client.delete(f"/v1/jobs/{id}"), 404, "unknown_job")


async def test_a_job_is_kept_as_long_as_the_settings_say_and_no_longer(
    captioner: FakeCaptioner, quick_stop: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.broker.rules.REPLY_KEPT", 0.01)  # the minute of those that are not kept
    async with running(create_app(Settings(job_kept_s=0.5), load=lambda: captioner)) as client:
        await until_ready(client)
        id = taken(await submit(client))["id"]
        await outcome(client, id)
        await asyncio.sleep(0.1)
        assert (await client.get(f"/v1/jobs/{id}")).status_code == 200
        await asyncio.sleep(0.6)
        assert_problem(await client.get(f"/v1/jobs/{id}"), 404, "unknown_job", "no longer kept")


class TestKeys:
    async def test_sent_again_it_is_the_same_job(self, client: httpx.AsyncClient, captioner: FakeCaptioner) -> None:
        described = len(captioner.described)
        first, second = await asyncio.gather(submit(client, key="once"), submit(client, key='"once"'))
        id = taken(first)["id"]
        assert taken(second)["id"] == id
        await outcome(client, id)
        third = await submit(client, key="once")
        assert taken(third)["state"] == "done"
        assert third.json()["result"]["caption"].endswith(" 48 32")
        assert taken(third)["id"] == id
        assert len(captioner.described) == described + 1
        others = []
        for key in ("twice", None, None):
            others.append(taken(await submit(client, key=key))["id"])
            await outcome(client, others[-1])  # the queue has room for two
        assert len({id, *others}) == 4

    def test_a_front_of_another_version_knows_the_request_again(self) -> None:
        class Newer(CaptionOptions):
            a_new_one: bool = False

        assert _fingerprint(JPEG, Newer(speed="fast", beam=1)) == _fingerprint(JPEG, CaptionOptions(speed="fast"))
        asked = [CaptionOptions(), CaptionOptions(speed="fast"), CaptionOptions(beam=2), Newer(a_new_one=True)]
        assert len({_fingerprint(image, each) for image in (JPEG, b"") for each in asked}) == 8

    async def test_for_another_request_it_is_refused(self, client: httpx.AsyncClient) -> None:
        id = taken(await submit(client, key="once", speed="fast"))["id"]
        assert_problem(await submit(client, key="once", speed="full"), 422, "key_reused", "another photo")
        assert_problem(await submit(client, OTHER, key="once", speed="fast"), 422, "key_reused")
        await outcome(client, id)
        assert_problem(await submit(client, OTHER, key="once", speed="fast"), 422, "key_reused")
        # Another form of the same request is the same request.
        headers = {**LATER, "Idempotency-Key": "once"}
        body = {"image": base64.b64encode(JPEG).decode(), "speed": "fast"}
        assert taken(await client.post(URL, json=body, headers=headers))["id"] == id
        assert (await client.delete(f"/v1/jobs/{id}")).status_code == 204
        assert taken(await submit(client, OTHER, key="once"))["id"] == id  # it is free again

    async def test_it_is_free_again_while_the_deleted_job_runs(
        self, client: httpx.AsyncClient, captioner: FakeCaptioner
    ) -> None:
        captioner.looking.clear()
        captioner.go.clear()
        id = taken(await submit(client, key="once"))["id"]
        await until(captioner.looking.is_set)
        assert (await client.delete(f"/v1/jobs/{id}")).status_code == 204
        assert_problem(await client.get(f"/v1/jobs/{id}"), 404, "unknown_job")
        assert taken(await submit(client, OTHER, key="once"))["id"] == id
        captioner.go.set()
        assert (await outcome(client, id))["result"]["caption"].endswith(" 20 32")

    @pytest.mark.parametrize("key", ["", " ", "a" * 256, "a b"])
    @pytest.mark.parametrize("headers", [LATER, {}])
    async def test_what_is_no_key(self, client: httpx.AsyncClient, key: str, headers: dict[str, str]) -> None:
        response = await client.post(URL, content=JPEG, headers={**headers, "Idempotency-Key": key})
        assert_problem(response, 422, "invalid_option", "Idempotency-Key")

    async def test_two_keys_are_none(self, client: httpx.AsyncClient) -> None:
        headers = [("Prefer", "respond-async"), ("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
        assert_problem(await client.post(URL, content=JPEG, headers=headers), 422, "invalid_option", "one")

    async def test_one_that_is_known_is_found_also_where_the_queue_is_full(self, settings: Settings) -> None:
        broker = FakeBroker()
        async with running(create_app(settings, broker=broker)) as client:
            await until_ready(client)
            id = taken(await submit(client, key="once"))["id"]
            broker.found[id] = Found("queued", 5, note=broker.submitted[0].note)
            broker.refuses = QueueFullError(2)
            assert taken(await submit(client, key="once"))["position"] == 5
            assert_problem(await submit(client, OTHER, key="once"), 422, "key_reused")
            broker.found[id] = Found("queued", 5, note="of a front of tomorrow")
            assert taken(await submit(client, OTHER, key="once"))["id"] == id
            assert_problem(await submit(client, key="other"), 503, "overloaded")
            assert len(broker.submitted) == 1


class TestOwners:
    async def test_a_job_of_one_key_is_nothing_to_another(self, captioner: FakeCaptioner, quick_stop: None) -> None:
        settings = Settings(api_keys=SecretStr("robot:correct-horse,other:battery-staple"))
        robot, other = {"X-API-Key": "correct-horse"}, {"X-API-Key": "battery-staple"}
        async with running(create_app(settings, load=lambda: captioner)) as client:
            await until_ready(client)
            jobs = []
            for owner in (robot, other):
                headers = {**LATER, **owner, "Idempotency-Key": "once"}
                jobs.append(taken(await client.post(URL, content=JPEG, headers=headers))["id"])
            assert jobs[0] != jobs[1]
            url = f"/v1/jobs/{jobs[0]}"
            assert (await client.get(url, headers=robot)).status_code == 200
            assert_problem(await client.get(url, headers=other), 404, "unknown_job")
            assert_problem(await client.delete(url, headers=other), 404, "unknown_job")
            assert_problem(await client.get(url), 401, "unauthorized")
            assert (await client.delete(url, headers=robot)).status_code == 204

    def test_ids(self) -> None:
        mine = new_id("robot")
        assert is_of("robot", mine)
        assert not is_of("other", mine)
        assert not is_of("", mine)
        assert is_of("", new_id(""))
        assert new_id("robot", "a") == new_id("robot", "a") != new_id("robot", "b")
        assert new_id("robot", "a")[:24] != new_id("other", "a")[:24]
        assert len({new_id("robot") for _ in range(100)}) == 100
        for wrong in (mine.upper(), mine[:-1], mine + "0", "0" * 40, mine[:39] + "g", mine + "\n"):
            assert not is_of("robot", wrong), wrong


async def test_a_store_that_is_lost(settings: Settings) -> None:
    broker = FakeBroker()
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        id = taken(await submit(client))["id"]
        broker.found[id] = Found("running")
        broker.raises = BrokerLostError("made up")
        response = await client.get(f"/v1/jobs/{id}")
        assert_problem(response, 503, "unavailable")
        assert int(response.headers["retry-after"]) >= 1
        assert_problem(await client.delete(f"/v1/jobs/{id}"), 503, "unavailable")
        broker.raises = None
        broker.refuses = BrokerLostError("made up")
        await until_ready(client)
        assert_problem(await submit(client), 503, "unavailable")


@pytest.mark.parametrize(
    ("prefer", "later"),
    [
        ("respond-async", True),
        ("Respond-Async; x=1, wait=10", True),
        ("return=minimal, respond-async", True),
        ("respond-sync", False),
        ("return=respond-async", False),
        ("", False),
    ],
)
async def test_who_is_answered_later(client: httpx.AsyncClient, prefer: str, later: bool) -> None:
    response = await client.post(URL, content=JPEG, headers={"Prefer": prefer})
    assert response.status_code == (202 if later else 200)


async def test_who_wants_a_stream_gets_that(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, content=JPEG, headers={**LATER, "Accept": "text/event-stream"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream"
    assert "preference-applied" not in response.headers


async def test_a_front_that_was_restarted_finds_what_the_one_before_began(settings: Settings) -> None:
    """All it needs is in the store and in the id."""
    broker = FakeBroker()
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        id = taken(await submit(client, regions=True))["id"]
    (job,) = broker.submitted
    assert broker.cancelled == [], "a front that stopped gave up what nobody waits for"
    broker.found[id] = Found("done", reply=answer_to(job), note=job.note)
    async with running(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        done = await outcome(client, id)
    assert done["result"]["caption"].split()[0] == job.request_id == done["result"]["request_id"]
    assert len(done["result"]["regions"]) == 2
