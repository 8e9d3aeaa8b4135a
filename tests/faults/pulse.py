"""How long the store takes to answer a ping, over and over: what no front can be faster than, whatever it does."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import redis

EVERY = 0.02  # seconds
PATIENCE = 5.0  # seconds that a ping may take: more than any refusal


class Pulse:
    """`with`: pings from a thread and over a connection of its own until it is left; fails then where one failed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._beats: list[tuple[float, float]] = []  # when it was sent and answered, by time.monotonic()
        self._failed: Exception | None = None

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._left.set()
        self._thread.join(2 * PATIENCE)
        if kind is None:
            assert not self._thread.is_alive(), "the store answers no ping"
            assert self._failed is None, f"the store answered no ping: {self._failed!r}"

    def held_up(self, begin: float, end: float) -> float:
        """Seconds between two moments, by time.monotonic(), that the ping took which took most of them."""
        shared = (min(answered, end) - max(sent, begin) for sent, answered in self._beats)
        return max(0.0, *shared, 0.0)

    def _beat(self) -> None:
        try:
            with redis.Redis.from_url(self._url, socket_timeout=PATIENCE, retry=None) as store:
                while not self._left.wait(EVERY):
                    sent = time.monotonic()
                    store.ping()
                    self._beats.append((sent, time.monotonic()))
        except redis.RedisError as error:
            self._failed = error
