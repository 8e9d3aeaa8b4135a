"""What was seen in photos, kept for their next caption: in this process's memory, or in a Redis of its own.

A photo's regions do not depend on the speed, and to find them is the dear part: the same photo at another speed costs
little. They are kept as float32, just as the extractor gave them, so that a caption cannot depend on the cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import numpy as np
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from model.caption import Regions

log = logging.getLogger(__name__)

SECONDS = 0.25  # that Redis may take; to look at the photo again is not dearer
PAUSE_SECONDS = 2.0  # without asking a Redis that has just failed, so that it cannot slow every photo down
_HEADER = struct.Struct("<4s32sII")  # version, SHA-256 of the key, regions, numbers per region
_VERSION = b"DCR1"


class FeatureCache(Protocol):
    """Regions by a key. It never raises, and never holds a request up for long: what fails is not there."""

    @property
    def name(self) -> str:
        """For the metrics."""

    async def get(self, key: str) -> Regions | None: ...

    async def put(self, key: str, regions: Regions) -> None: ...

    async def close(self) -> None: ...


def cache_key(digest: str, extractor: str, decoded: str) -> str:
    """`digest` of the image's bytes; `extractor` is what looks at it, revision and device; `decoded` says all that
    decides what pixels the bytes became, or whether any."""
    return f"{digest}:{extractor}:{decoded}"


class MemoryFeatureCache:
    """The least recently used go first. Of one event loop."""

    name = "memory"

    def __init__(self, max_bytes: int) -> None:
        """With 0 bytes nothing is kept."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, Regions] = OrderedDict()  # the least recently used first

    async def get(self, key: str) -> Regions | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    async def put(self, key: str, regions: Regions) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        # Copies: what the extractor gives are views, each of which would keep its whole batch alive.
        self._kept[key] = Regions(regions.boxes.copy(), regions.features.copy())
        self._bytes += _size(regions)
        while self._bytes > self._max_bytes:
            self._bytes -= _size(self._kept.popitem(last=False)[1])

    async def close(self) -> None:
        self._kept.clear()
        self._bytes = 0


class RedisFeatureCache:
    """Shared by all workers, in an instance of its own, whose `maxmemory` and eviction policy bound it."""

    name = "redis"

    def __init__(self, url: str, ttl_seconds: float, on_error: Callable[[], None] = lambda: None) -> None:
        """`on_error` is called for each failure. Raises `ValueError` for a URL that is none."""
        self._redis = Redis.from_url(
            url, socket_timeout=SECONDS, socket_connect_timeout=SECONDS, retry=Retry(NoBackoff(), 0)
        )
        self._ttl_ms = max(1, int(1000 * ttl_seconds))
        self._on_error = on_error
        self._failing = False
        self._checked = False  # whether its bounds were looked at
        self._retry_at = 0.0  # by time.monotonic()

    async def get(self, key: str) -> Regions | None:
        if time.monotonic() < self._retry_at:
            return None
        try:
            async with asyncio.timeout(SECONDS):
                if not self._checked:
                    await self._check()
                data = await self._redis.get(_redis_key(key))
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)
            return None
        self._works()
        return from_bytes(key, data) if isinstance(data, bytes) else None

    async def put(self, key: str, regions: Regions) -> None:
        if time.monotonic() < self._retry_at:
            return
        try:
            async with asyncio.timeout(SECONDS):
                await self._redis.set(_redis_key(key), to_bytes(key, regions), px=self._ttl_ms)
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)
        else:
            self._works()

    async def close(self) -> None:
        await self._redis.aclose()

    async def _check(self) -> None:
        """Warns, once, where nothing bounds what is kept, or where it is bounded by refusing what is new."""
        bounds = await self._redis.info("memory")
        self._checked = True
        if not int(bounds.get("maxmemory", 0)):
            log.warning("the feature cache's Redis has no maxmemory: it grows until its machine is full")
        elif str(bounds.get("maxmemory_policy", "noeviction")) == "noeviction":
            log.warning("the feature cache's Redis has maxmemory-policy noeviction: once full it keeps no new photo")

    def _failed(self, error: Exception) -> None:
        self._on_error()
        self._retry_at = time.monotonic() + PAUSE_SECONDS
        if not self._failing:
            self._failing = True
            reason = str(error) or type(error).__name__
            log.warning("the feature cache does not answer, so photos are looked at anew: %s", reason)

    def _works(self) -> None:
        if self._failing:
            self._failing = False
            log.info("the feature cache answers again")


def to_bytes(key: str, regions: Regions) -> bytes:
    """Header, boxes and features; little-endian. The key is in there so that no other photo's are ever taken for it."""
    header = _HEADER.pack(_VERSION, _digest(key), *regions.features.shape)
    return header + regions.boxes.astype("<f4").tobytes() + regions.features.astype("<f4").tobytes()


def from_bytes(key: str, data: bytes) -> Regions | None:
    """The regions, None where the data is of another version, of another key or broken."""
    if len(data) < _HEADER.size:
        return None
    version, digest, count, width = _HEADER.unpack_from(data)
    whole = _HEADER.size + 4 * count * (4 + width)
    if version != _VERSION or digest != _digest(key) or len(data) != whole:
        return None
    numbers = np.frombuffer(data, "<f4", offset=_HEADER.size).astype(np.float32)
    return Regions(numbers[: 4 * count].reshape(count, 4), numbers[4 * count :].reshape(count, width))


def _redis_key(key: str) -> str:
    return f"deecap:regions:{key}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _size(regions: Regions) -> int:
    return regions.boxes.nbytes + regions.features.nbytes
