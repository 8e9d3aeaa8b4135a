"""Workers that are killed, stopped, hung or told to end while they caption: every photo is answered exactly once."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from service.worker import HANG_STATUS
from tests.faults.cluster import WORKER_TIMEOUT, Cluster, Process, until
from tests.faults.conftest import Books
from tests.faults.load import DEADLINE, Load, Sent, assert_all_answered, assert_in_order, codes, listed
from tests.faults.stand_in import DEADLY_STATUS, caption_of, photo
from tests.service.fakes import SPEEDS

pytestmark = pytest.mark.anyio

RATE = 22  # photos per second, of about 50 that two workers can and 25 that one can
RUNNING = "deecap_worker_jobs_running"
IN_HAND = 3  # of them at least: one could be done, or on its way, in the moment of the fault
BURST = 16  # of them at once make it certain that each worker has some in hand when the fault comes


async def some_in_hand(cluster: Cluster, load: Load) -> list[Sent]:
    """Returns when both workers are in the middle of a batch; the batch takes them 300 ms.

    A busy machine may need more than one burst until that is seen of both at once.
    """
    sent: list[Sent] = []
    for _ in range(10):
        sent += load.burst(BURST)
        for _ in range(5):
            await asyncio.sleep(0.03)
            running = [await asyncio.to_thread(worker.metrics) for worker in cluster.workers]
            if all(each.value(RUNNING) >= IN_HAND for each in running):
                return sent
    raise AssertionError("the workers never had photos in hand at once")


async def stopped_in_hand(cluster: Cluster, load: Load) -> Process:
    """The first worker, stopped (SIGSTOP) with photos in hand; the other goes on.

    Both are stopped for a moment, so that what the store says they hold is not what they held a moment ago.
    """
    for _ in range(10):
        await some_in_hand(cluster, load)
        for worker in cluster.workers:
            worker.signal(signal.SIGSTOP)
        caught = cluster.at_work() == len(cluster.workers)
        for worker in cluster.workers[caught:]:
            worker.signal(signal.SIGCONT)
        if caught:
            return cluster.workers[0]
    raise AssertionError("the workers were never stopped with photos in hand")


async def test_a_worker_killed_in_the_middle_of_a_batch(cluster: Cluster, books: Books) -> None:
    async with Load(cluster.front.address) as load:
        await load.run(RATE, 0.5)
        (await stopped_in_hand(cluster, load)).kill()
        await load.run(RATE, 2.0)
    assert_all_answered(load.all)
    books.check(load.all)
    assert books.new_redelivered > 0, "the killed worker had nothing in hand: the test shows nothing"
    assert books.new_dead == 0, f"{books.new_dead} good photos were given up for dead"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_worker_ended_in_the_middle_of_a_stream(cluster: Cluster, books: Books, how: signal.Signals) -> None:
    """Killed, its words begin again with another worker; told to end, it finishes them first."""
    sent = Sent(4, "slow", "balanced", time.monotonic())
    words: list[dict[str, Any]] = []
    others: list[tuple[str, dict[str, Any]]] = []
    holder: Process | None = None
    async with httpx.AsyncClient(base_url=cluster.front.address, timeout=DEADLINE) as client:
        headers = {"Accept": "text/event-stream"}
        async with client.stream("POST", "/v1/caption", content=photo(4, "slow"), headers=headers) as response:
            sent.status = response.status_code
            async for event, data in events(response):
                if event != "word":
                    others.append((event, data))
                    continue
                words.append(data)
                if len(words) == 2:
                    [holder] = [each for each in cluster.workers if each.metrics().value(RUNNING)]
                    holder.signal(how)
    assert holder is not None, f"too few words came: {words}; {others}"
    first = [word for word in words if word["attempt"] == 1]
    last = [word for word in words if word["attempt"] == words[-1]["attempt"]]
    [(_, document)] = [each for each in others if each[0] == "caption"]
    assert document["caption"].startswith(caption_of(4, SPEEDS.resolve().tau) + " ")
    assert [(word["index"], word["text"]) for word in last] == list(enumerate(document["caption"].split()))
    assert [word["index"] for word in first] == list(range(len(first)))
    if how == signal.SIGKILL:
        assert [event for event, _ in others] == ["restart", "caption"]
        assert others[0][1] == {"attempt": 2}
        assert [word["attempt"] for word in words] == [1] * len(first) + [2] * len(last)
        assert 2 <= len(first) < len(last)
    else:
        assert [event for event, _ in others] == ["caption"]
        assert holder.ended(5) == 0
    sent.code, sent.caption = "ok", document["caption"]
    books.check([sent])
    assert (books.new_redelivered, books.new_dead) == (int(how == signal.SIGKILL), 0)


async def events(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Names and data of the events, as they come."""
    event = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield event, json.loads(line.removeprefix("data: "))


async def test_a_worker_stopped_and_continued_answers_nothing_twice(cluster: Cluster, books: Books) -> None:
    stopped = cluster.workers[0]
    async with Load(cluster.front.address) as load:
        await load.run(RATE, 0.5)
        assert await stopped_in_hand(cluster, load) is stopped
        await load.run(RATE, WORKER_TIMEOUT + 1.5)
        taken_over = books.new_redelivered
        stopped.signal(signal.SIGCONT)
        await load.run(RATE, 0.7)
    assert_all_answered(load.all)
    books.check(load.all)
    assert taken_over > 0, "the other worker took nothing over while this one was stopped: the test shows nothing"
    # It found out by itself: what it finishes now was another's by then, and is not sent.
    refused = 'deecap_worker_jobs_total{outcome="not_ours"}'
    until(lambda: stopped.metrics().value(refused) > 0, 5, "the continued worker was refused at least one answer")
    await works(cluster, stopped)


async def works(cluster: Cluster, worker: object) -> None:
    """The worker takes jobs: with only two of them, a handful of photos at once reaches both."""
    done = 'deecap_worker_jobs_total{outcome="answered"}'
    found = next(each for each in cluster.workers if each is worker)
    before = found.metrics().value(done)
    async with Load(cluster.front.address) as load:
        load.burst(2 * BURST)
    assert_all_answered(load.all)
    assert found.metrics().value(done) > before, f"{found.name} is there and takes nothing any more"


async def test_sigterm_drains_a_worker(cluster: Cluster, books: Books) -> None:
    told = cluster.workers[0]
    before = len(told.said)  # by other tests, in which photos fail
    async with Load(cluster.front.address) as load:
        await load.run(RATE, 0.5)
        await some_in_hand(cluster, load)
        told.signal(signal.SIGTERM)
        await load.run(RATE, 1.0)
        status = told.ended(10)
    assert status == 0, f"exit status {status}:\n{told.said[-2000:]}"
    assert "Traceback" not in told.said[before:], told.said[-3000:]
    assert_all_answered(load.all)
    books.check(load.all)
    assert books.new_redelivered == 0, f"{books.new_redelivered} photos were left behind, for others to find"


async def test_a_hung_model_ends_its_process_and_loses_nothing(cluster: Cluster, books: Books) -> None:
    hung = cluster.workers[0]
    async with Load(cluster.front.address) as load:
        await load.run(RATE, 0.3)
        hung.signal(signal.SIGUSR1)
        await some_in_hand(cluster, load)
        await load.run(RATE / 2, 2.0)
        status = await asyncio.to_thread(hung.ended, 15)
    assert status == HANG_STATUS, f"exit status {status}:\n{hung.said[-2000:]}"
    assert "made no progress" in hung.said, hung.said[-2000:]
    assert_all_answered(load.all)
    books.check(load.all)
    assert books.new_redelivered > 0, "the hung worker had nothing in hand: the test shows nothing"


async def test_a_photo_that_kills_its_workers_harms_no_other(cluster: Cluster, books: Books) -> None:
    async with Load(cluster.front.address) as load:
        good = load.burst(4)
        poison = load.send("deadly")
        good += load.burst(4)
        began, ended = time.monotonic(), []
        while not poison.code and time.monotonic() < began + 15:
            ended += cluster.supervise()
            good.append(load.send())
            await asyncio.sleep(0.1)
    statuses = [process.popen.returncode for process in ended]
    assert statuses == [DEADLY_STATUS] * 3, f"three tries should have killed three workers; exit statuses: {statuses}"
    assert (poison.status, poison.code) == (500, "poison"), f"the poison: {poison}"
    # While no worker lives, new photos are refused. Those that were taken before are answered.
    assert_all_answered(good, but=("no_worker",))
    assert_all_answered(good[:8])
    assert books.new_dead == 1, f"{books.new_dead} dead letters, and not the one"
    told = "deecap_dead_letters_total"  # as of the front's last look at the store
    until(lambda: cluster.front.metrics().value(told) >= 1, 2, "the front's metrics tell of a dead letter")
    books.check(load.all)


async def test_a_photo_that_merely_fails_fails_alone(cluster: Cluster, books: Books) -> None:
    async with Load(cluster.front.address) as load:
        kinds = [("raises" if count % 5 == 2 else "good") for count in range(30)]
        sent = [load.send(kind) for kind in kinds]
    bad = [each for each in sent if each.kind == "raises"]
    assert codes(bad) == {"internal": len(bad)}, listed(bad, "bad photos, all to be told `internal`")
    assert_all_answered([each for each in sent if each.kind == "good"])
    books.check(load.all)
    assert (books.new_redelivered, books.new_dead) == (0, 0), "a photo that fails is no reason to try others again"
    assert all(worker.alive for worker in cluster.workers), "a worker ended"


async def test_without_any_worker_there_is_an_answer_in_time(cluster: Cluster, books: Books) -> None:
    async with Load(cluster.front.address) as load:
        await load.run(RATE, 0.3)
        before = await some_in_hand(cluster, load)
        for worker in cluster.workers:
            worker.kill()
        killed = time.monotonic()
        while not (refused := [sent for sent in load.all if sent.code == "no_worker"]):
            assert time.monotonic() < killed + WORKER_TIMEOUT + 2, "nobody is told that there is no worker"
            load.send()
            await asyncio.sleep(0.1)
        late = load.burst(10)
        await asyncio.sleep(1.0)
        waiting = [sent for sent in late if not sent.status]
        assert not waiting, listed(waiting, "still wait, a second later, for an answer that nobody can give")
        assert codes(late) == {"no_worker": 10}, listed(late, "should be told no_worker")
        for sent in [*refused, *late]:
            assert_in_order(sent)
        # Those that were accepted before are kept until somebody comes.
        cluster.supervise()
    assert_all_answered([sent for sent in load.all if sent not in late], but=("no_worker",))
    assert_all_answered(before)
    books.check(load.all)
