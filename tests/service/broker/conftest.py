"""Both brokers behind one fixture, and the Redis server that one of them needs."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from service.broker import redis_store
from service.broker.memory import MemoryBroker
from service.broker.redis import RedisBroker
from service.jobs import Priority
from tests.service.broker.making import Meet, Open, Pair
from tests.service.redis_server import MISSING, RedisServer, find_binary


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One for all tests that leave it alone: each uses a queue of its own."""
    yield from _running()


@pytest.fixture
def own_redis_server() -> Iterator[RedisServer]:
    """For a test that stops it or looks at all it holds."""
    yield from _running()


@pytest.fixture
def lasting_redis_server() -> Iterator[RedisServer]:
    """The same, and it keeps what it has when it ends."""
    yield from _running(append_only=True)


def _running(append_only: bool = False) -> Iterator[RedisServer]:
    if find_binary() is None:
        pytest.skip(MISSING)
    server = RedisServer(append_only)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
async def closing() -> AsyncIterator[AsyncExitStack]:
    """What a test opened is closed after it."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture(params=["memory", "redis"])
def meet(request: pytest.FixtureRequest, closing: AsyncExitStack) -> Meet:
    """Makes a broker of each kind, empty; with Redis, front and workers have connections of their own."""
    server: RedisServer | None = request.getfixturevalue("redis_server") if request.param == "redis" else None

    async def make(*, depth: int = 100, batch_depth: int = 100, worker_timeout: float = 30.0, tries: int = 3) -> Pair:
        depths: dict[Priority, int] = {"interactive": depth, "batch": batch_depth}
        if server is None:
            memory = MemoryBroker(depths, worker_timeout, tries)
            await memory.open()
            closing.push_async_callback(memory.close)
            return Pair(memory, memory)
        queue = uuid.uuid4().hex
        sides = [RedisBroker(server.url, queue, depths, worker_timeout, tries) for _ in range(2)]
        for side in sides:
            await side.open()
            closing.push_async_callback(side.close)
        return Pair(*sides)

    return make


# Over Redis alone.


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
