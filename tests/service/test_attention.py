"""`attention=true`: the answer tells where each word looked, and only there where it was asked for."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from service.jobs import Job, Reply
from tests.service import pictures
from tests.service.checks import assert_problem
from tests.service.fakes import FakeCaptioner, answer_to
from tests.service.running import until_ready

pytestmark = pytest.mark.anyio

JPEG = pictures.jpeg()
TURNS = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]  # of three words over two regions, as the fake has it


async def test_it_is_told_where_it_is_asked_for(client: httpx.AsyncClient) -> None:
    for query, told in (("", None), ("?attention=false", None), ("?attention=true", TURNS)):
        answer = (await client.post(f"/v1/caption{query}", content=JPEG)).json()
        assert answer.get("attention") == told
        assert "regions" not in answer
    form = await client.post("/v1/caption", data={"attention": "true", "regions": "true"}, files={"image": JPEG})
    assert (form.json()["attention"], len(form.json()["regions"])) == (TURNS, 2)
    assert_problem(await client.post("/v1/caption?attention=perhaps", content=JPEG), 422, "invalid_option", "attention")


async def test_two_at_once_get_what_each_asked_for(client: httpx.AsyncClient, captioner: FakeCaptioner) -> None:
    captioner.go.clear()
    asked = [asyncio.create_task(client.post(f"/v1/caption?attention={each}", content=JPEG)) for each in (True, False)]
    await asyncio.sleep(0.1)
    captioner.go.set()
    with_it, without = [response.json() for response in await asyncio.gather(*asked)]
    assert (with_it["attention"], without.get("attention")) == (TURNS, None)


async def test_a_failure_ends_that_caption_alone(
    client: httpx.AsyncClient, captioner: FakeCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("made up")

    monkeypatch.setattr(captioner, "attention", fail)
    assert_problem(await client.post("/v1/caption?attention=true", content=JPEG), 500, "internal")
    await until_ready(client)
    assert (await client.post("/v1/caption", content=JPEG)).status_code == 200


async def test_it_travels() -> None:
    job = Job("1", b"x", "fast", None, 1, "interactive", 2e9, attention=True)
    assert Job.from_wire(job.to_wire()) == job
    reply = answer_to(job)
    told = Reply("1", reply.outcome.__class__(**{**vars(reply.outcome), "attention": ((0.25, 0.75), (1.0, 0.0))}), "w")
    assert Reply.from_wire(told.to_wire()) == told
