"""What only the Redis broker can get wrong: several fronts, a store that goes and comes back, foreign entries."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from service.broker import redis_store, rules
from service.broker.base import BrokerError, BrokerLostError, NoWorkerError
from service.broker.redis import RedisBroker
from service.broker.redis_store import Store
from service.jobs import Job, Refusal
from tests.service.broker.making import Pair, ids, job, reply, until, worker_state
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio

Open = Callable[..., Awaitable[RedisBroker]]


@pytest.fixture
def queue() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def opened(closing: AsyncExitStack, queue: str) -> Open:
    """Makes one more broker of this test's queue."""

    async def make(
        server: RedisServer, *, name: str = queue, worker_timeout: float = 30.0, tries: int = 3
    ) -> RedisBroker:
        broker = RedisBroker(server.url, name, {"interactive": 100, "batch": 100}, worker_timeout, tries)
        await broker.open()
        closing.push_async_callback(broker.close)
        return broker

    return make


@pytest.fixture
async def pair(opened: Open, redis_server: RedisServer) -> Pair:
    pair = Pair(await opened(redis_server), await opened(redis_server))
    await pair.join("w")
    return pair


@pytest.fixture
async def frail(opened: Open, own_redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Over a server that the test may stop; what takes longer than a moment is lost."""
    monkeypatch.setattr(redis_store, "ANSWER_SECONDS", 0.4)
    monkeypatch.setattr(redis_store, "CONNECT_SECONDS", 0.4)
    monkeypatch.setattr(redis_store, "BLOCK_SECONDS", 0.2)
    pair = Pair(await opened(own_redis_server), await opened(own_redis_server))
    await pair.join("w")
    return pair


@pytest.fixture
async def raw(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """The shared server, as an operator sees it."""
    async with Redis.from_url(redis_server.url) as client:
        yield client


@pytest.fixture
async def own_raw(own_redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(own_redis_server.url) as client:
        yield client


# Fronts and queues.


async def test_a_reply_goes_to_the_front_that_submitted(opened: Open, redis_server: RedisServer, pair: Pair) -> None:
    other = Pair(await opened(redis_server), pair.worker)
    await pair.submit("a", "b")
    await other.submit("c")
    for delivery in await pair.take("w"):
        assert await pair.answer("w", delivery)
    assert await pair.heard() == ["a", "b"]
    assert await other.heard() == ["c"]
    await other.submit("a")  # answered again, to whoever asks
    assert await other.heard() == ["a"]
    assert await pair.heard() == []


async def test_a_front_that_comes_back_is_answered_under_its_new_name(pair: Pair) -> None:
    await pair.submit("a")
    await pair.front.close()
    await pair.front.open()
    await pair.submit("a")
    assert await pair.answer("w", await pair.take_one("w"))
    assert await pair.heard() == ["a"]


async def test_queues_do_not_mix(opened: Open, redis_server: RedisServer, pair: Pair) -> None:
    other = Pair(*[await opened(redis_server, name="other-" + uuid.uuid4().hex)] * 2)
    with pytest.raises(NoWorkerError):
        await other.submit("a")
    await other.join("w")
    await other.submit("a")
    assert await pair.take("w") == []
    assert ids(await other.take("w")) == ["a"]


async def test_all_keys_of_a_queue_lie_in_one_slot_and_nothing_is_left_behind(
    opened: Open, own_redis_server: RedisServer, own_raw: Redis
) -> None:
    pair = Pair(await opened(own_redis_server, name="photos"), await opened(own_redis_server, name="photos"))
    await pair.join("w", "v")
    await pair.submit(*(f"job{i}" for i in range(20)))
    await pair.submit("cancelled", "waits", priority="batch")
    await pair.front.cancel("cancelled")
    assert {key.split(b"}")[0] for key in await own_raw.keys()} == {b"{deecap:photos"}
    for delivery in await pair.take("w"):
        assert await pair.answer("w", delivery)
    assert len(await pair.heard_all(21)) == 21
    await pair.heard()  # which tells the store that they were read
    await pair.worker.leave("w")
    await pair.worker.leave("v")
    lasting = {key async for key in own_raw.scan_iter() if await own_raw.ttl(key) < 0}
    names = ("interactive", "batch", "counts", "bell", "epoch")
    assert lasting == {b"{deecap:photos}:" + name.encode() for name in names}
    assert await own_raw.xlen("{deecap:photos}:interactive") == await own_raw.xlen("{deecap:photos}:batch") == 0
    assert await own_raw.xlen("{deecap:photos}:bell") == 1
    passing = [key async for key in own_raw.scan_iter() if key not in lasting]
    assert len(passing) == 22  # what became of the jobs, and the front's replies
    for key in passing:
        assert await own_raw.ttl(key) <= rules.REPLY_KEPT
        if b":replies:" in key:
            assert await own_raw.xlen(key) == 0


async def test_close_gives_every_connection_back(opened: Open, own_redis_server: RedisServer, own_raw: Redis) -> None:
    before = asyncio.all_tasks()
    broker = await opened(own_redis_server)
    await broker.beat(worker_state("w"))
    calls = [asyncio.create_task(broker.replies()), asyncio.create_task(broker.take("w", 1, 60))]
    await asyncio.sleep(0.05)
    assert len(await own_raw.client_list()) == 3
    calls[0].cancel()
    await broker.close()
    with pytest.raises(BrokerLostError, match="closed"):
        await calls[1]

    async def alone() -> bool:
        return len(await own_raw.client_list()) == 1

    await until(alone)
    assert asyncio.all_tasks() <= before | set(calls)
    with pytest.raises(BrokerLostError, match="not open"):
        await broker.state()


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


async def test_a_full_store_refuses_and_loses_nothing(
    opened: Open, own_redis_server: RedisServer, own_raw: Redis
) -> None:
    pair = Pair(await opened(own_redis_server), await opened(own_redis_server))
    await pair.join("w")
    await pair.submit("a")
    await own_raw.config_set("maxmemory", "1mb")
    with pytest.raises(BrokerLostError, match="maxmemory"):
        await pair.front.submit(replace(job("b"), image=bytes(1_000_000)))
    await own_raw.config_set("maxmemory", "0")
    assert ids(await pair.take("w")) == ["a"]


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


async def test_calls_that_later_ones_overtook_do_nothing(pair: Pair, redis_server: RedisServer, queue: str) -> None:
    """A hanging server may still get to a call that its worker gave up long ago."""
    store = Store(redis_server.url)
    await store.open()
    key, settings = f"{{deecap:{queue}}}", '{"worker_timeout": 30, "tries": 3, "share": 8}'
    await pair.submit("a", "b")
    first, second = await pair.take_one("w"), await pair.take_one("w")
    await pair.submit("c")
    _, *drawn = await store.safely(store.script("take", key, settings, "w", 10, 2))
    assert drawn == []
    await store.safely(store.script("beat", key, settings, "w", "old", 2))  # it knew nothing of these jobs
    await store.close()
    assert ids(await pair.take("w")) == ["c"]
    assert await pair.answer("w", first)
    assert await pair.answer("w", second)
    assert len((await pair.front.state()).workers) == 1


async def test_a_cancel_waits_for_the_submission_of_its_job(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Store.script

    async def slow(self: Store, name: str, queue: str, *arguments: str | bytes | int | float) -> object:
        if name == "submit":
            await asyncio.sleep(0.05)
        return await script(self, name, queue, *arguments)

    monkeypatch.setattr(Store, "script", slow)
    submitting = asyncio.create_task(pair.submit("a"))
    await asyncio.sleep(0.01)
    submitting.cancel()
    await pair.front.cancel("a")
    await asyncio.sleep(0.1)
    assert await pair.take("w") == []


async def test_scripts_that_the_server_forgot_are_sent_again(pair: Pair, raw: Redis) -> None:
    await pair.submit("a")
    await raw.script_flush()
    delivery = await pair.take_one("w")
    await raw.script_flush()
    assert await pair.answer("w", delivery)
    assert await pair.heard() == ["a"]


# A worker that comes back under its old name.


async def test_a_worker_started_again_under_its_name_may_have_died_of_its_jobs(
    opened: Open, redis_server: RedisServer, pair: Pair
) -> None:
    await pair.submit("a")
    await pair.take("w")
    again = Pair(pair.front, await opened(redis_server))
    await again.join("w")
    delivery = await again.take_one("w")
    assert (delivery.job.id, delivery.attempt) == ("a", 2)


# What others wrote.


async def test_entries_that_are_no_jobs_become_dead_letters(pair: Pair, raw: Redis, queue: str) -> None:
    stream = f"{{deecap:{queue}}}:interactive"
    whole = {"id": "x", "deadline": "1e12", "job": "{}", "image": b"\xff"}
    wrong: list[dict[str, str | bytes]] = [
        {"hello": "world"},
        {f"field{i}": "" for i in range(9000)},  # more than Lua can unpack
        {**whole, "deadline": "soon"},
        {name: value for name, value in whole.items() if name != "image"},
        {**whole, "job": "not json"},
        {**whole, "job": "5"},
        {**whole, "job": '{"id": "x"}'},
        {**whole, "job": b"\xff"},
    ]
    for fields in wrong:
        await raw.xadd(stream, fields)  # type: ignore[arg-type]
    await pair.submit("good")
    assert ids(await pair.take("w")) == ["good"]
    state = await pair.front.state()
    assert (state.dead, state.waiting["interactive"]) == (len(wrong), 0)
    letters = await raw.xrange(f"{{deecap:{queue}}}:dead")
    assert [fields[b"why"] for _, fields in letters] == [b"unreadable"] * len(wrong)
    assert letters[4][1][b"job"] == b"not json"


async def test_the_front_of_an_unreadable_job_is_told(pair: Pair, raw: Redis, queue: str) -> None:
    class OfAnotherVersion(Job):
        def to_wire(self) -> dict[str, bytes]:
            return {"job": b'{"new": 1}', "image": b""}

    await pair.front.submit(OfAnotherVersion(**vars(job("a"))))
    assert await pair.take("w") == []
    assert await pair.heard() == ["a: internal"]


async def test_entries_that_somebody_deleted_are_forgotten(pair: Pair, raw: Redis, queue: str) -> None:
    stream = f"{{deecap:{queue}}}:interactive"
    await pair.submit("waits", "came back", "stays")
    taken = await pair.take("w", 2)
    await pair.worker.give_back("w", taken)
    for delivery in taken:
        await raw.xdel(stream, delivery.receipt.split("/")[1])
    assert ids(await pair.take("w")) == ["stays"]
    await pair.submit("waits")  # it is known no more
    assert ids(await pair.take("w")) == ["waits"]


async def test_a_reply_that_cannot_be_read_does_not_keep_the_others(pair: Pair, raw: Redis, queue: str) -> None:
    await pair.submit("a")
    (front,) = {await raw.hget(key, "front") async for key in raw.scan_iter(f"{{deecap:{queue}}}:job:*")}
    await raw.xadd(f"{{deecap:{queue}}}:replies:{front.decode()}", {"reply": "nonsense"})
    assert await pair.answer("w", await pair.take_one("w"))
    assert await pair.heard() == ["a"]


async def test_a_worker_of_another_version_is_not_listed_but_counts(pair: Pair, raw: Redis, queue: str) -> None:
    await raw.hset(f"{{deecap:{queue}}}:workers", "w", '{"new": 1}')
    assert (await pair.front.state()).workers == ()
    await pair.submit("a")
    assert ids(await pair.take("w")) == ["a"]


async def test_only_the_newest_dead_letters_are_kept_with_the_photo(
    opened: Open, redis_server: RedisServer, raw: Redis, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "DEAD_LETTERS_KEPT", 2)
    broker = await opened(redis_server, worker_timeout=0.2, tries=1)
    pair = Pair(broker, broker)
    await pair.join("w")
    await pair.submit("a", "b", "c")
    await pair.take("w")
    await asyncio.sleep(0.25)
    await pair.join("v")
    assert await pair.take("v") == []
    letters = [fields for _, fields in await raw.xrange(f"{{deecap:{queue}}}:dead")]
    assert [(each[b"id"], each[b"why"], each[b"worker"]) for each in letters] == [
        (b"b", b"poison", b"w"),
        (b"c", b"poison", b"w"),
    ]
    assert letters[0][b"image"] == job("b").image
    assert (await pair.front.state()).dead == 3
    for said in await pair.heard_all(3):
        assert isinstance(said.outcome, Refusal)
        assert said == replace(reply(job(said.job_id), ""), outcome=rules.POISON)
