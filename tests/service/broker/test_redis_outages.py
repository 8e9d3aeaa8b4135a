"""The Redis broker over a server that goes, hangs, comes back empty, or is not as it should be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from service.broker.base import BrokerError, BrokerLostError, NoWorkerError, QueueFullError
from service.broker.redis import RedisBroker
from tests.service.broker.making import Open, Pair, ids, job, until, worker_state
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio


# A server that goes, or that is not as it should be.


async def test_nothing_listens() -> None:
    broker = RedisBroker("redis://user:secret@127.0.0.1:1/0?socket_keepalive=1", "q", {}, 1, 1)
    began = time.monotonic()
    with pytest.raises(BrokerLostError, match=r"redis://127\.0\.0\.1:1/0: ") as lost:
        await broker.open()
    assert "secret" not in str(lost.value)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis://host:port", "", "redis://[::1"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(BrokerError, match="URL"):
        RedisBroker(url, "q", {}, 1, 1)


async def test_a_server_that_would_drop_jobs_is_refused(
    opened: Open, own_redis_server: RedisServer, own_raw: Redis
) -> None:
    await own_raw.config_set("maxmemory-policy", "allkeys-lru")
    await opened(own_redis_server)  # without a limit it drops nothing
    await own_raw.config_set("maxmemory", "100mb")
    with pytest.raises(BrokerError, match="noeviction") as refused:
        await opened(own_redis_server)
    assert not isinstance(refused.value, BrokerLostError)
    await own_raw.config_set("maxmemory-policy", "noeviction")
    await opened(own_redis_server)


async def test_the_server_restarts_empty_and_fronts_submit_again(frail: Pair, own_redis_server: RedisServer) -> None:
    await frail.submit("running", "waiting")
    old = await frail.take_one("w")
    listening = asyncio.create_task(frail.front.replies())
    idle = asyncio.create_task(frail.take("v", seconds=60))
    await asyncio.sleep(0.05)
    own_redis_server.restart()
    with pytest.raises(BrokerLostError):
        await listening
    with pytest.raises(BrokerLostError):
        await idle
    assert not await frail.answer("w", old)  # the store knows nothing of it
    with pytest.raises(NoWorkerError):
        await frail.submit("running")
    await frail.join("w")
    await frail.submit("running", "waiting")
    for delivery in await frail.take("w"):
        assert await frail.answer("w", delivery)
    replies = asyncio.create_task(told_of_loss_then_heard(frail, 2))
    assert await replies == ["running", "waiting"]


async def told_of_loss_then_heard(pair: Pair, count: int) -> list[str]:
    """The ids of so many replies; the broker may say a few times that it was lost."""
    heard: list[str] = []
    async with asyncio.timeout(5):
        while len(heard) < count:
            try:
                heard += [each.job_id for each in await pair.front.replies()]
            except BrokerLostError:
                continue
    return heard


async def test_the_store_is_emptied_without_a_connection_lost(frail: Pair, own_raw: Redis) -> None:
    await frail.submit("a")
    listening = asyncio.create_task(frail.front.replies())
    await asyncio.sleep(0.05)
    await own_raw.flushall()
    with pytest.raises(BrokerLostError, match="empty"):
        async with asyncio.timeout(2):
            await listening
    assert await frail.take("w") == []
    await frail.join("w")
    await frail.submit("a")
    assert await frail.answer("w", await frail.take_one("w"))
    assert await told_of_loss_then_heard(frail, 1) == ["a"]


async def test_a_loss_that_another_call_noticed_is_told_to_the_one_who_waits_for_replies(
    frail: Pair, own_redis_server: RedisServer
) -> None:
    own_redis_server.pause()  # it keeps what it holds, and the loss could go unnoticed
    with pytest.raises(BrokerLostError):
        await frail.front.state()
    own_redis_server.resume()
    await frail.front.state()
    with pytest.raises(BrokerLostError):
        async with asyncio.timeout(2):
            await frail.front.replies()
    await frail.submit("a")
    assert await frail.answer("w", await frail.take_one("w"))
    assert await frail.heard(0.3) == ["a"]  # it is told once


async def test_a_server_that_hangs_is_lost_in_time_and_found_again(frail: Pair, own_redis_server: RedisServer) -> None:
    await frail.submit("a")
    own_redis_server.pause()
    began = time.monotonic()
    calls = (frail.submit("b"), frail.front.state(), frail.join("w"), frail.front.replies(), frail.take("w"))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [BrokerLostError] * len(calls)
    assert time.monotonic() - began < 2
    own_redis_server.resume()
    await frail.submit("b")


async def test_jobs_whose_delivery_never_arrived_are_handed_out_again(
    frail: Pair, own_redis_server: RedisServer
) -> None:
    await frail.submit("a", "b")
    kept = await frail.take_one("w")
    own_redis_server.pause()
    with pytest.raises(BrokerLostError):
        await frail.take("w")
    own_redis_server.resume()

    async def nothing_waits() -> bool:
        return (await frail.front.state()).waiting["interactive"] == 0

    await until(nothing_waits)  # the take arrived; its answer went nowhere
    await frail.join("w")
    again = await frail.take_one("w")
    assert (again.job.id, again.attempt) == ("b", 1)
    assert await frail.answer("w", kept)
    assert await frail.answer("w", again)


async def test_an_answer_whose_confirmation_never_arrived(frail: Pair, own_redis_server: RedisServer) -> None:
    await frail.submit("a")
    delivery = await frail.take_one("w")
    own_redis_server.pause()
    with pytest.raises(BrokerLostError):
        await frail.answer("w", delivery)
    own_redis_server.resume()
    assert await frail.answer("w", delivery)
    assert await told_of_loss_then_heard(frail, 1) == ["a"]
    assert (await frail.front.state()).answered == 1


# A server that was away for longer than a worker may be.


def hang(server: RedisServer) -> None:
    server.pause()
    time.sleep(1.0)
    server.resume()


def end(server: RedisServer) -> None:
    server.kill()
    time.sleep(1.0)
    server.start()


@pytest.mark.parametrize("goes", [hang, end])
async def test_workers_that_could_not_beat_are_not_dead(
    opened: Open, lasting_redis_server: RedisServer, goes: Callable[[RedisServer], None]
) -> None:
    front = await opened(lasting_redis_server, worker_timeout=0.6, tries=1)
    pair = Pair(front, await opened(lasting_redis_server, worker_timeout=0.6, tries=1))
    await pair.join("v", "w", "dead")
    await pair.submit("a", "b", "fatal")
    (a,), (b,), _ = [await pair.take(worker, 1) for worker in ("v", "w", "dead")]
    goes(lasting_redis_server)

    async def back() -> bool:
        try:
            await pair.join("v")
        except BrokerLostError:
            return False
        return True

    await until(back)
    assert await pair.take("v") == []  # what the others have is theirs
    assert {worker.id for worker in (await front.state()).workers} == {"v", "w", "dead"}
    await pair.join("w")
    assert await pair.answer("w", b)
    assert await pair.answer("v", a)
    state = await front.state()
    assert (state.dead, state.redelivered) == (0, 0)
    assert await told_of_loss_then_heard(pair, 2) == ["b", "a"]
    # From now on they could beat.
    for _ in range(10):
        await pair.live(0.1)
        await pair.join("v")
    assert await pair.take("v") == []
    assert (await front.state()).dead == 1
    assert [worker.id for worker in (await front.state()).workers] == ["v"]


# A server without memory.


async def test_a_full_store_takes_no_more_jobs_and_gets_the_others_done(
    opened: Open, own_redis_server: RedisServer, own_raw: Redis
) -> None:
    pair = Pair(await opened(own_redis_server), await opened(own_redis_server))
    await pair.join("w")
    await pair.submit("a", "b", "c")
    await pair.front.cancel("c")
    kept = await pair.take_one("w")
    await own_raw.config_set("maxmemory", "1mb")  # the empty server has that much
    for _ in range(3):
        with pytest.raises(QueueFullError, match="memory") as full:
            await pair.front.submit(replace(job("large"), image=bytes(1_000_000)))
        assert full.value.waiting == 1
    assert await pair.front.find("large") is None
    assert await pair.front.remind("b")
    assert await pair.worker.beat(worker_state("w")) == set()
    assert await pair.answer("w", kept)
    b = await pair.take_one("w")
    await pair.worker.give_back("w", [b])
    b = await pair.take_one("w")
    await pair.tell("w", b, 0, "two")
    assert await pair.answer("w", b)
    assert await pair.heard() == ["a", "b+two", "b"]
    assert (await pair.front.state()).answered == 2
    with pytest.raises(QueueFullError, match="memory"):
        await pair.submit("d")
    await own_raw.config_set("maxmemory", "0")
    await pair.submit("d")
    assert ids(await pair.take("w")) == ["d"]
