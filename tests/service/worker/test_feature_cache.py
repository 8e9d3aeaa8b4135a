"""Both feature caches: what goes in comes out bit for bit, old things go first, and a fault is a miss."""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
from redis.asyncio import Redis

from model.caption import Regions
from service.feature_cache import MemoryFeatureCache, RedisFeatureCache, cache_key, from_bytes, to_bytes
from tests.service.redis_server import MISSING, RedisServer, find_binary

pytestmark = pytest.mark.anyio


def regions(seed: int, count: int = 5, width: int = 7) -> Regions:
    random = np.random.default_rng(seed)
    return Regions(random.random((count, 4), np.float32), random.standard_normal((count, width), np.float32))


def same(one: Regions | None, other: Regions) -> bool:
    return one is not None and np.array_equal(one.boxes, other.boxes) and np.array_equal(one.features, other.features)


SIZE = regions(0).boxes.nbytes + regions(0).features.nbytes


def test_a_key_tells_apart_all_that_regions_depend_on() -> None:
    keys = {cache_key(*parts) for parts in (("a", "b", "c"), ("x", "b", "c"), ("a", "x", "c"), ("a", "b", "x"))}
    assert len(keys) == 4


async def test_memory_keeps_what_fits_and_the_least_recently_used_goes() -> None:
    cache = MemoryFeatureCache(2 * SIZE)
    for seed in (1, 2):
        await cache.put(str(seed), regions(seed))
    assert same(await cache.get("1"), regions(1))
    await cache.put("3", regions(3))
    assert await cache.get("2") is None
    assert same(await cache.get("1"), regions(1))
    assert same(await cache.get("3"), regions(3))
    await cache.put("1", regions(1))  # again: it is not counted twice
    assert same(await cache.get("3"), regions(3))
    await cache.put("large", regions(4, count=50))
    assert await cache.get("large") is None
    await cache.close()
    assert await cache.get("1") is None


async def test_no_memory_keeps_nothing() -> None:
    cache = MemoryFeatureCache(0)
    await cache.put("1", regions(1))
    assert await cache.get("1") is None


async def test_memory_does_not_keep_the_batch_alive() -> None:
    batch = np.zeros((100, 5, 7), np.float32)
    cache = MemoryFeatureCache(10 * SIZE)
    await cache.put("1", Regions(regions(1).boxes, batch[0]))
    kept = await cache.get("1")
    assert kept is not None
    assert kept.features.base is None


@pytest.mark.parametrize(("count", "width"), [(1, 1), (5, 7), (81, 1280)])
def test_bytes_are_the_regions_bit_for_bit(count: int, width: int) -> None:
    kept = regions(1, count, width)
    assert same(from_bytes("k", to_bytes("k", kept)), kept)


def test_bytes_that_are_not_this_photo_are_nothing() -> None:
    good = to_bytes("k", regions(1))
    assert from_bytes("other", good) is None
    assert from_bytes("k", b"DCR0" + good[4:]) is None
    for broken in (b"", good[:20], good[:-1], good + b"x", good[:36] + struct.pack("<II", 2**31, 7) + good[44:]):
        assert from_bytes("k", broken) is None


# Redis.


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    if find_binary() is None:
        pytest.skip(MISSING)
    server = RedisServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
def failures() -> list[None]:
    return []


@pytest.fixture
async def cache(server: RedisServer, failures: list[None]) -> AsyncIterator[RedisFeatureCache]:
    cache = RedisFeatureCache(server.url, 60.0, lambda: failures.append(None))
    yield cache
    await cache.close()


async def test_redis_gives_back_what_it_got_to_all_workers(server: RedisServer, cache: RedisFeatureCache) -> None:
    await cache.put("photo", regions(1, 81, 1280))
    other = RedisFeatureCache(server.url, 60.0)
    assert same(await other.get("photo"), regions(1, 81, 1280))
    assert await other.get("another") is None
    await other.close()


async def test_redis_forgets_in_time(server: RedisServer) -> None:
    cache = RedisFeatureCache(server.url, 0.05)
    await cache.put("short", regions(1))
    assert await cache.get("short") is not None
    await asyncio.sleep(0.08)
    assert await cache.get("short") is None
    await cache.close()


async def test_a_redis_that_fails_is_a_miss_told_once(
    server: RedisServer,
    cache: RedisFeatureCache,
    failures: list[None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("service.feature_cache.PAUSE_SECONDS", 0.0)
    await cache.put("photo", regions(1))
    server.stop()
    for _ in range(3):
        assert await cache.get("photo") is None
        await cache.put("photo", regions(1))
    assert len(failures) == 6
    assert caplog.text.count("does not answer") == 1
    server.start()
    assert await cache.get("photo") is None
    await cache.put("photo", regions(1))
    assert same(await cache.get("photo"), regions(1))
    assert caplog.text.count("answers again") == 1


async def test_a_redis_that_hangs_costs_little(server: RedisServer, cache: RedisFeatureCache) -> None:
    await cache.put("photo", regions(1))
    server.pause()
    try:
        begin = time.monotonic()
        for _ in range(20):
            assert await cache.get("photo") is None
        assert time.monotonic() - begin < 1.0  # one timeout, and then it is not asked for a while
    finally:
        server.resume()


async def test_a_get_that_was_cancelled_gives_nobody_anothers_regions(cache: RedisFeatureCache) -> None:
    """redis-py once left the answer in the connection for the next to read (redis-py issues 2624, 2665)."""
    for seed in range(20):
        await cache.put(str(seed), regions(seed, 81, 1280))
    for seed in range(20):
        task = asyncio.create_task(cache.get(str(seed)))
        for _ in range(seed % 7):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        other = (seed + 1) % 20
        assert same(await cache.get(str(other)), regions(other, 81, 1280))


async def test_a_redis_that_is_not_there_fails_nothing(failures: list[None]) -> None:
    cache = RedisFeatureCache("redis://127.0.0.1:1/0", 60.0, lambda: failures.append(None))
    assert await cache.get("photo") is None
    await cache.put("photo", regions(1))  # not even tried
    assert len(failures) == 1
    await cache.close()


@pytest.mark.parametrize(
    ("maxmemory", "policy", "told"),
    [("0", "allkeys-lru", "no maxmemory"), ("100mb", "noeviction", "noeviction"), ("100mb", "allkeys-lfu", "")],
)
async def test_a_redis_that_nothing_bounds_is_told_of_once(
    server: RedisServer, caplog: pytest.LogCaptureFixture, maxmemory: str, policy: str, told: str
) -> None:
    client = Redis.from_url(server.url)
    await client.config_set("maxmemory", maxmemory)
    await client.config_set("maxmemory-policy", policy)
    cache = RedisFeatureCache(server.url, 60.0)
    try:
        for _ in range(2):
            await cache.get("photo")
        assert caplog.text.count("the feature cache's Redis") == bool(told)
        assert told in caplog.text
    finally:
        await client.config_set("maxmemory", "0")
        await client.config_set("maxmemory-policy", "noeviction")
        await client.aclose()
        await cache.close()
