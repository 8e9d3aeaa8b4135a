"""Faults in the middle of a batch, a stream, a job: each photo gets one caption, its own, or a problem that says so."""

from __future__ import annotations

import asyncio
import base64
import itertools
import signal
import time
from typing import Any

import httpx
import pytest

from tests.faults.cluster import WORKER_TIMEOUT, Cluster
from tests.faults.conftest import Books
from tests.faults.load import DEADLINE, MARGIN, Sent, assert_all_answered, codes
from tests.faults.stand_in import Kind, photo
from tests.service.running import Event, events

pytestmark = pytest.mark.anyio

_numbers = itertools.count(500_000)  # none of those that `load` sends
ASYNC = {"Prefer": "respond-async"}


def client_of(cluster: Cluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.front.address, timeout=DEADLINE + MARGIN)


def new(kind: Kind = "good") -> Sent:
    return Sent(next(_numbers), kind, "fast", time.monotonic())


async def captions(client: httpx.AsyncClient, those: list[Sent]) -> None:
    """One request for all of them; each remembers what it was told."""
    files = [("images", (str(sent.number), photo(sent.number, sent.kind, ms=5))) for sent in those]
    response = await client.post("/v1/captions", files=files, data={"speed": "fast"})
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert [item["index"] for item in results] == list(range(len(those))), "each is told once, in order"
    for sent, item in zip(those, results, strict=True):
        hear(sent, item["status"], item["caption"] or item["problem"])
        sent.retry_after = str(item["retry_after"] or "")


def hear(sent: Sent, status: int, said: dict[str, Any]) -> None:
    assert not sent.code, f"told twice: {sent}"
    sent.status, sent.caption, sent.code = status, said.get("caption", ""), said.get("code", "ok")


def kill_all(cluster: Cluster) -> None:
    """And start as many others."""
    for worker in cluster.workers:
        worker.kill()
    cluster.supervise()


async def both_at_work(cluster: Cluster) -> None:
    """Returns when each of the two workers has photos in hand."""
    for _ in range(500):
        if cluster.at_work() == 2:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"only {cluster.at_work()} of the two had something in hand")


async def words(client: httpx.AsyncClient, sent: Sent, said: list[Event]) -> None:
    """A stream; `said` has what it said so far."""
    headers = {"Accept": "text/event-stream"}
    image = photo(sent.number, sent.kind)
    async with client.stream("POST", "/v1/caption?speed=fast", content=image, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for event in events(response):
            said.append(event)
    name, data = said[-1]
    assert [each for each, _ in said].count("caption") + [each for each, _ in said].count("problem") == 1
    hear(sent, 200 if name == "caption" else data["status"], data)


def assert_one_after_the_other(said: list[Event]) -> None:
    """The words since the last restart are those of the caption, in their order and once each."""
    names = [name for name, _ in said]
    begin = len(names) - names[::-1].index("restart") if "restart" in names else 0
    told = [data for name, data in said[begin:] if name == "word"]
    assert [data["index"] for data in told] == list(range(len(told)))
    assert " ".join(data["text"] for data in told) == said[-1][1]["caption"]


async def some(said: list[Event], name: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while name not in [each for each, _ in said]:
        assert time.monotonic() < end, f"no {name} within {seconds:g} seconds: {said}"
        await asyncio.sleep(0.01)


async def test_a_worker_killed_during_batches(cluster: Cluster, books: Books) -> None:
    async with client_of(cluster) as client:
        batches = [[new("raises" if n == 5 else "good") for n in range(12)] for _ in range(4)]
        asked = [asyncio.create_task(captions(client, batch)) for batch in batches]
        await both_at_work(cluster)
        cluster.workers[0].kill()
        await asyncio.gather(*asked)
    those = [sent for batch in batches for sent in batch]
    assert_all_answered([sent for sent in those if sent.kind == "good"])
    assert codes([sent for sent in those if sent.kind == "raises"]) == {"internal": 4}
    books.check(those, front=False)
    assert books.new_redelivered > 0, "the killed worker had nothing in hand: the test shows nothing"
    assert books.new_dead == 0


async def infer(client: httpx.AsyncClient, those: list[Sent]) -> None:
    """One request of the Open Inference Protocol: all of its captions, or one error for the whole."""
    data = [base64.b64encode(photo(sent.number, sent.kind, ms=5)).decode() for sent in those]
    images = {"name": "image", "shape": [len(those)], "datatype": "BYTES", "data": data}
    speed = {"name": "speed", "shape": [1], "datatype": "BYTES", "data": ["fast"]}
    response = await client.post("/v2/models/stand-in/infer", json={"inputs": [images, speed]})
    assert response.status_code == 200, response.text
    (found,) = [output for output in response.json()["outputs"] if output["name"] == "caption"]
    assert found["shape"] == [len(those)]
    for sent, caption in zip(those, found["data"], strict=True):
        hear(sent, 200, {"caption": caption})


async def test_a_worker_killed_during_requests_of_the_open_inference_protocol(cluster: Cluster, books: Books) -> None:
    async with client_of(cluster) as client:
        requests = [[new() for _ in range(12)] for _ in range(4)]
        asked = [asyncio.create_task(infer(client, those)) for those in requests]
        await both_at_work(cluster)
        cluster.workers[0].kill()
        await asyncio.gather(*asked)
    those = [sent for request in requests for sent in request]
    assert_all_answered(those)
    books.check(those, front=False)
    assert books.new_redelivered > 0, "the killed worker had nothing in hand: the test shows nothing"
    assert books.new_dead == 0


async def test_batches_while_no_worker_is_left_say_so_of_each_photo(cluster: Cluster, books: Books) -> None:
    """What was taken before waits for the next worker; what comes after is refused, each photo with its own problem."""
    async with client_of(cluster) as client:
        batches = [[new() for _ in range(30)] for _ in range(2)]
        asked = [asyncio.create_task(captions(client, batch)) for batch in batches]
        await both_at_work(cluster)
        for worker in cluster.workers:
            worker.kill()
        await asyncio.sleep(WORKER_TIMEOUT + 0.5)
        cluster.supervise()
        await asyncio.gather(*asked)
    those = [sent for batch in batches for sent in batch]
    assert_all_answered(those, but=("no_worker",))
    assert codes(those)["ok"] > 0
    books.check(those, front=False)


async def test_a_worker_killed_during_a_stream(cluster: Cluster, books: Books) -> None:
    sent, said = new("slow"), list[Event]()
    async with client_of(cluster) as client:
        asked = asyncio.create_task(words(client, sent, said))
        await some(said, "word")
        await asyncio.to_thread(kill_all, cluster)
        await asked
    assert_all_answered([sent])
    restarts = [data["attempt"] for name, data in said if name == "restart"]
    assert restarts == [2], said
    assert {data["attempt"] for name, data in said if name == "word"} == {1, 2}
    assert_one_after_the_other(said)
    books.check([sent])
    assert books.new_redelivered == 1


async def test_streams_of_a_crowd_while_a_worker_is_killed(cluster: Cluster, books: Books) -> None:
    those = [new() for _ in range(24)]
    said: list[list[Event]] = [[] for _ in those]
    async with client_of(cluster) as client:
        asked = [asyncio.create_task(words(client, *each)) for each in zip(those, said, strict=True)]
        await both_at_work(cluster)
        cluster.workers[0].kill()
        await asyncio.gather(*asked)
    assert_all_answered(those)
    for each in said:
        assert_one_after_the_other(each)
    books.check(those)
    assert books.new_redelivered > 0, "the killed worker had nothing in hand: the test shows nothing"


async def test_a_stream_is_finished_by_a_front_that_was_told_to_end(cluster: Cluster) -> None:
    front = cluster.front
    sent, said = new("slow"), list[Event]()
    async with client_of(cluster) as client:
        asked = asyncio.create_task(words(client, sent, said))
        await some(said, "word")
        front.signal(signal.SIGTERM)
        await asked
        status = await asyncio.to_thread(front.ended, 15)
    assert status == 0, f"exit status {status}:\n{front.said[-2000:]}"
    assert_all_answered([sent])
    assert_one_after_the_other(said)
    assert "Traceback" not in front.said, front.said[-3000:]


async def test_who_hangs_up_on_a_stream_frees_its_place(cluster: Cluster, books: Books) -> None:
    sent, said = new("slow"), list[Event]()
    async with client_of(cluster) as client:
        asked = asyncio.create_task(words(client, sent, said))
        await some(said, "word")
        asked.cancel()
        begin = time.monotonic()
        await asyncio.to_thread(cluster.settle)
        assert time.monotonic() - begin < 1.0, "it was captioned to its end, which takes 1.4 seconds"
    assert cluster.count("answered") == books.answered


async def submit(client: httpx.AsyncClient, sent: Sent) -> str:
    """The job's address. Safe to call again."""
    headers = {**ASYNC, "Idempotency-Key": str(sent.number)}
    image = photo(sent.number, sent.kind)
    end = time.monotonic() + DEADLINE
    while True:
        response = await client.post("/v1/caption?speed=fast", content=image, headers=headers)
        if response.status_code == 202:
            return response.headers["location"]
        # Workers that were killed may be missed before others beat; a client then tries again.
        assert response.json()["code"] == "no_worker", response.text
        assert time.monotonic() < end, response.text
        await asyncio.sleep(0.1)


async def outcome(client: httpx.AsyncClient, url: str, sent: Sent) -> None:
    end = time.monotonic() + DEADLINE
    while True:
        response = await client.get(url)
        assert response.status_code == 200, response.text
        job = response.json()
        if job["state"] in ("done", "failed"):
            said = job["result"] or job["problem"]
            hear(sent, said.get("status", 200), said)
            return
        assert time.monotonic() < end, f"never over: {job}"
        await asyncio.sleep(0.1)


async def test_workers_killed_during_jobs(cluster: Cluster, books: Books) -> None:
    those = [new("raises" if n == 7 else "good") for n in range(20)]
    async with client_of(cluster) as client:
        async with asyncio.TaskGroup() as submitting:
            tasks = [submitting.create_task(submit(client, sent)) for sent in those]
            await both_at_work(cluster)  # at the first of them; the last may be submitted after they have ended
            await asyncio.to_thread(kill_all, cluster)
        urls = [task.result() for task in tasks]
        assert len(set(urls)) == len(those)
        again = await asyncio.gather(*(submit(client, sent) for sent in those))
        assert again == urls, "a key made two jobs"
        await asyncio.gather(*(outcome(client, *each) for each in zip(urls, those, strict=True)))
    assert_all_answered([sent for sent in those if sent.kind == "good"])
    assert codes([sent for sent in those if sent.kind == "raises"]) == {"internal": 1}
    books.check(those, front=False)
    assert books.new_redelivered > 0, "the killed workers had nothing in hand: the test shows nothing"


async def test_jobs_survive_the_front_that_took_them(cluster: Cluster, books: Books) -> None:
    those = [new("slow") for _ in range(6)]
    async with client_of(cluster) as client:
        urls = [await submit(client, sent) for sent in those]
    cluster.front.kill()
    await asyncio.to_thread(cluster.heal)  # with another front; returns when no work is left
    async with client_of(cluster) as client:
        await asyncio.gather(*(outcome(client, *each) for each in zip(urls, those, strict=True)))
        assert [await submit(client, sent) for sent in those] == urls
        assert (await client.delete(urls[0])).status_code == 204
        assert (await client.get(urls[0])).status_code == 404
    assert_all_answered(those)
    books.check(those, front=False)


async def test_jobs_survive_a_restart_of_the_store_that_writes_down(cluster: Cluster, books: Books) -> None:
    those = [new() for _ in range(12)]
    async with client_of(cluster) as client:
        urls = [await submit(client, sent) for sent in those]
        await asyncio.sleep(1.1)  # the store writes down once a second
        await asyncio.to_thread(cluster.redis.restart)
        end = time.monotonic() + 10
        while (await client.get("/readyz")).status_code != 200:
            assert time.monotonic() < end, "the front does not find the store again"
            await asyncio.sleep(0.05)
        await asyncio.gather(*(outcome(client, *each) for each in zip(urls, those, strict=True)))
    assert_all_answered(those)
    await asyncio.to_thread(cluster.settle)
