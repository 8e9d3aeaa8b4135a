"""Both brokers behind one fixture, and the Redis server that one of them needs."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from service.broker.memory import MemoryBroker
from service.broker.redis import RedisBroker
from service.jobs import Priority
from tests.service.broker.making import Meet, Pair
from tests.service.redis_server import MISSING, RedisServer, find_binary


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One for all tests that leave it alone: each uses a queue of its own."""
    yield from _running()


@pytest.fixture
def own_redis_server() -> Iterator[RedisServer]:
    """For a test that stops it or looks at all it holds."""
    yield from _running()


def _running() -> Iterator[RedisServer]:
    if find_binary() is None:
        pytest.skip(MISSING)
    server = RedisServer()
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
