"""The Redis server behind a broker: scripts and blocking reads, safe under cancellation, bounded in time."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Coroutine, Mapping, Sequence
from importlib import resources
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError, ResponseError

from service.broker.base import BrokerError, BrokerLostError

log = logging.getLogger(__name__)

T = TypeVar("T")
Entry = tuple[bytes, Mapping[bytes, bytes]]  # of a stream: its id, its fields

CONNECT_SECONDS = 2.0  # a server in the same data centre answers in milliseconds, or is not there
ANSWER_SECONDS = 3.0  # no script takes longer; also bounds the wait for a free connection
BLOCK_SECONDS = 1.0  # the longest blocking read; well below ANSWER_SECONDS, after which the server counts as lost
HEALTH_CHECK_SECONDS = 15.0  # a connection idle for longer is pinged before it is used
CONNECTIONS = 64  # of one process at most; more calls wait for a free one
OLDEST_SERVER = (6, 2)  # the first with XTRIM MINID and exclusive ranges


class StoreFullError(BrokerError):
    """The server has no memory left for what was sent."""


class Store:
    """One Redis server, for one broker. Used from one event loop.

    Nothing is ever sent twice: redis-py's own retries are off, since not all of the scripts may run twice. After a
    failure the next call connects anew.

    redis-py once gave a request the answer of one that was cancelled before (its issues 2624 and 2665). Here no
    cancellation ever reaches it: each call runs in a task of its own, to its end, whoever waits for it.
    """

    def __init__(self, url: str) -> None:
        """Raises `BrokerError` for a URL that is none. Connects to nothing."""
        self.failures = 0  # calls that got no answer; its growth says that something may have been lost
        self._url = url
        self._client: Redis | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._blocked: set[asyncio.Task[Any]] = set()  # those among them that only wait for something to happen
        try:
            self.address = redacted(url)
            parse_url(url)
        except ValueError as error:
            raise BrokerError(f"the broker's URL is not that of a Redis server: {error}") from None

    async def open(self) -> None:
        """Raises `BrokerLostError` where no server answers, `BrokerError` where it is one that would lose jobs."""
        if self._client is None:
            self._client = self._new_client()
        try:
            info = await self.safely(self._info(self._client))
            self._check(info)
        except BrokerError:
            await self.close()
            raise

    async def close(self) -> None:
        """Lets calls under way end, gives blocking reads up, and disconnects."""
        while self._tasks:  # one task can start another
            for task in self._blocked:
                task.cancel()
            await asyncio.wait(set(self._tasks))
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    def start(self, work: Coroutine[Any, Any, T], *, blocks: bool = False) -> asyncio.Task[T]:
        """Runs it to its end, whatever becomes of the caller; `close` waits for it, or cancels it if it `blocks`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        if blocks:
            self._blocked.add(task)
        task.add_done_callback(self._ended)
        return task

    async def result(self, task: asyncio.Task[T]) -> T:
        """Of a task of `start`. Cancelling this leaves the task alone."""
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # by `close`, which is no cancellation of the caller
                raise BrokerLostError(f"{self.address}: closed meanwhile") from None
            raise

    async def safely(self, work: Coroutine[Any, Any, T]) -> T:
        return await self.result(self.start(work))

    # To be called within `start` or `safely` only.

    async def script(self, name: str, queue: str, *arguments: str | bytes | int | float) -> Any:
        """Runs `scripts/NAME.lua` on the queue. The server keeps scripts; it is sent those that it lost or never had.

        Raises `BrokerLostError`; `StoreFullError` where it `ADMITS` something and the server's memory is full.
        """
        text, digest = _SCRIPTS[name]
        client = self._connected()
        try:
            try:
                return await client.evalsha(digest, 1, queue, *arguments)
            except NoScriptError:
                return await client.eval(text, 1, queue, *arguments)
        except ResponseError as error:
            # Before Redis 7 the word stands within the message of the script that failed.
            if isinstance(error, OutOfMemoryError) or "OOM command not allowed" in str(error):
                raise StoreFullError(f"{self.address}: its memory is full") from error
            await self._lost(error)
        except (RedisError, OSError) as error:
            await self._lost(error)

    async def wait(self, stream: str, after: str, seconds: float) -> bool:
        """Waits, `BLOCK_SECONDS` at most, until the stream has an entry after this one; whether it has.

        Raises `BrokerLostError`.
        """
        try:
            return bool(await self._connected().xread({stream: after}, block=_block(seconds)))
        except (RedisError, OSError) as error:
            await self._lost(error)

    async def read_on(self, stream: str, after: str, seconds: float, key: str) -> tuple[Sequence[Entry], bytes | None]:
        """Waits like `wait` for entries after this one, and returns them and then the value of a key.

        Entries up to `after` are deleted: they were read. Raises `BrokerLostError`.
        """
        milliseconds, number = after.split("-")
        try:
            async with self._connected().pipeline(transaction=False) as pipeline:
                pipeline.xtrim(stream, minid=f"{milliseconds}-{int(number) + 1}", approximate=False)
                pipeline.xread({stream: after}, block=_block(seconds))
                pipeline.get(key)
                _, streams, value = await pipeline.execute()
        except (RedisError, OSError) as error:
            await self._lost(error)
        return (streams[0][1] if streams else ()), value

    def _connected(self) -> Redis:
        if self._client is None:
            raise BrokerLostError(f"{self.address}: not open")
        return self._client

    async def _info(self, client: Redis) -> Mapping[str, Any]:
        try:
            info: Mapping[str, Any] = await client.info()
        except (RedisError, OSError) as error:
            await self._lost(error)
        return info

    async def _lost(self, error: Exception) -> NoReturn:
        self.failures += 1
        if self._client is not None:
            # The idle ones are as dead as this one: each of them would fail a call of its own.
            await self._client.connection_pool.disconnect(inuse_connections=False)
        raise BrokerLostError(f"{self.address}: {error or type(error).__name__}") from error

    def _check(self, info: Mapping[str, Any]) -> None:
        version = str(info["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
            raise BrokerError(f"{self.address}: Redis {version} is too old, it must be 6.2 or newer")
        policy = str(info.get("maxmemory_policy", "noeviction"))
        if int(info.get("maxmemory", 0)) and policy != "noeviction":
            raise BrokerError(
                f"{self.address}: its maxmemory-policy is {policy}, by which it would drop jobs: set it to noeviction"
            )

    def _new_client(self) -> Redis:
        pool = BlockingConnectionPool.from_url(
            self._url,
            max_connections=CONNECTIONS,
            timeout=ANSWER_SECONDS,
            socket_connect_timeout=CONNECT_SECONDS,
            socket_timeout=ANSWER_SECONDS,
            socket_keepalive=True,
            health_check_interval=HEALTH_CHECK_SECONDS,
            retry=Retry(NoBackoff(), 0),
            protocol=2,  # one shape of answers with every version of redis-py and Redis
        )
        return Redis.from_pool(pool)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._blocked.discard(task)
        if not task.cancelled():
            task.exception()  # it was told to whoever waited; if nobody did, nobody needs to know


def redacted(url: str) -> str:
    """The URL without user, password and options."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _block(seconds: float) -> int:
    """As milliseconds; 0 would be for ever."""
    return max(1, int(min(seconds, BLOCK_SECONDS) * 1000))


def _load_scripts() -> dict[str, tuple[str, str]]:
    """By name: the text, with the shared part and whether it may be refused by a full store before it; and its SHA-1,
    by which the server knows it."""
    folder = resources.files("service.broker") / "scripts"
    texts = {path.name: path.read_text("utf-8") for path in folder.iterdir() if path.name.endswith(".lua")}
    common = texts.pop("common.lua")
    whole = {
        name.removesuffix(".lua"): f"local ADMITS = {str(name == 'submit.lua').lower()}\n{common}{text}"
        for name, text in texts.items()
    }
    return {name: (text, hashlib.sha1(text.encode()).hexdigest()) for name, text in whole.items()}


_SCRIPTS = _load_scripts()
