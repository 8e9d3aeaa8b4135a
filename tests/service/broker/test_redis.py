"""What only the Redis broker can get wrong: several fronts, a store that goes and comes back, foreign entries."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from service.broker import rules
from service.broker.base import BrokerLostError, Found, NoWorkerError
from service.broker.redis_store import Store
from service.jobs import Refusal
from tests.service.broker.making import Open, Pair, ids, job, reply, until, worker_state
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.anyio

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


async def test_words_and_reply_go_to_the_front_that_asked_last(
    opened: Open, redis_server: RedisServer, pair: Pair
) -> None:
    other = Pair(await opened(redis_server), pair.worker)
    await pair.submit("a")
    delivery = await pair.take_one("w")
    await pair.tell("w", delivery, 0, "two")
    assert await other.front.remind("a")
    await pair.tell("w", delivery, 1, "dogs")
    assert await pair.front.cancel("a") is None  # it is another's now
    assert await pair.worker.beat(worker_state("w")) == set()
    assert await pair.answer("w", delivery)
    assert await pair.heard() == ["a+two"]
    assert await other.heard() == ["a+dogs", "a"]


async def test_a_job_is_found_after_its_front_died(opened: Open, redis_server: RedisServer, pair: Pair) -> None:
    broker = await opened(redis_server)
    for name in ("a", "b", "c"):
        await broker.submit(replace(job(name), kept=3600.0, note=f"note {name}"))
    a = await pair.take_one("w")
    assert await pair.answer("w", a)
    await pair.take_one("w")
    await broker.close()
    again = await opened(redis_server)
    seen = [await again.find(name) for name in ("a", "b", "c")]
    assert seen[0] == Found("done", reply=reply(a.job, "w"), note="note a")
    assert seen[1:] == [Found("running", note="note b"), Found("queued", 0, note="note c")]
    await again.forget("b")
    assert await pair.worker.beat(worker_state("w")) == {"b"}


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
    names = ("interactive", "batch", "counts", "bell", "epoch", "seen")
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


# Calls that cross each other.


async def test_calls_that_later_ones_overtook_do_nothing(pair: Pair, redis_server: RedisServer, queue: str) -> None:
    """A hanging server may still get to a call that its worker gave up long ago."""
    store = Store(redis_server.url)
    await store.open()
    key, settings = f"{{deecap:{queue}}}", rules.for_scripts(30, 3)
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


# What others did.


async def test_entries_that_somebody_deleted_are_forgotten(pair: Pair, raw: Redis, queue: str) -> None:
    stream = f"{{deecap:{queue}}}:interactive"
    await pair.submit("waits", "came back", "stays")
    taken = await pair.take("w", 2)
    await pair.worker.give_back("w", taken)
    for delivery in taken:
        await raw.xdel(stream, delivery.receipt.split("/")[1])
    assert ids(await pair.take("w")) == ["stays"]
    assert not await pair.front.remind("waits")
    await pair.submit("waits")  # it is known no more
    assert ids(await pair.take("w")) == ["waits"]


async def test_a_deleted_entry_that_nobody_had_is_known_no_more(pair: Pair, raw: Redis, queue: str) -> None:
    await pair.submit("deleted", "stays")
    ((entry, _),) = await raw.xrange(f"{{deecap:{queue}}}:interactive", count=1)
    await raw.xdel(f"{{deecap:{queue}}}:interactive", entry)
    assert ids(await pair.take("w")) == ["stays"]
    assert await pair.front.find("deleted") is None
    assert not await pair.front.remind("deleted")
    assert await raw.exists(f"{{deecap:{queue}}}:line:interactive") == 0


async def test_only_the_newest_dead_letters_are_kept_with_the_photo(
    opened: Open, redis_server: RedisServer, raw: Redis, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "DEAD_LETTERS_KEPT", 2)
    broker = await opened(redis_server, worker_timeout=0.2, tries=1)
    pair = Pair(broker, broker)
    await pair.join("w")
    await pair.submit("a", "b", "c")
    await pair.take("w")
    await pair.live(0.25)
    await pair.join("v")
    assert await pair.take("v") == []
    letters = [fields for _, fields in await raw.xrange(f"{{deecap:{queue}}}:dead")]
    assert [(each[b"id"], each[b"why"], each[b"worker"]) for each in letters] == [
        (b"b", b"poison", b"w"),
        (b"c", b"poison", b"w"),
    ]
    assert letters[0][b"image"] == job("b").image
    assert rules.DEAD_SECONDS_KEPT - 60 < await raw.ttl(f"{{deecap:{queue}}}:dead") <= rules.DEAD_SECONDS_KEPT
    assert (await pair.front.state()).dead == 3
    for said in await pair.heard_all(3):
        assert isinstance(said.outcome, Refusal)
        assert said == replace(reply(job(said.job_id), ""), outcome=rules.POISON)


async def test_dead_letters_are_bounded_in_bytes_and_in_time(
    opened: Open, redis_server: RedisServer, raw: Redis, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "DEAD_BYTES_KEPT", 250_000)
    monkeypatch.setattr(rules, "DEAD_SECONDS_KEPT", 1.0)
    broker = await opened(redis_server, worker_timeout=0.2, tries=1)
    pair = Pair(broker, broker)
    dead = f"{{deecap:{queue}}}:dead"

    async def kill(*names: str) -> list[bytes]:
        """The ids of the letters there are after these became some."""
        await pair.join("w")
        for name in names:
            await broker.submit(replace(job(name), image=bytes(100_000)))
        await pair.take("w")
        await pair.live(0.25)
        await pair.join("v")
        assert await pair.take("v") == []
        return [fields[b"id"] for _, fields in await raw.xrange(dead)]

    assert await kill("a", "b", "c", "d") == [b"c", b"d"]
    await pair.live(0.5)
    assert await kill("e") == [b"d", b"e"]
    await pair.live(0.6)
    assert [fields[b"id"] for _, fields in await raw.xrange(dead)] == [b"d", b"e"]
    await pair.join("v")  # while workers live, a letter goes when its time is up
    assert [fields[b"id"] for _, fields in await raw.xrange(dead)] == [b"e"]
    await asyncio.sleep(0.6)
    assert await raw.exists(dead) == 0
