"""How long the store takes to answer a ping, over and over: what no front can be faster than, whatever it does."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import redis

EVERY = 0.02  # seconds


class Pulse:
    """`with`: pings from a thread of its own until it is left."""

    def __init__(self, store: redis.Redis) -> None:
        self._store = store
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._beats: list[tuple[float, float]] = []  # when it was sent and answered, by time.monotonic()

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._left.set()
        self._thread.join()

    def slowest(self, begin: float, end: float) -> float:
        """Seconds that the slowest ping took which was under way between two moments, by time.monotonic()."""
        return max((answered - sent for sent, answered in self._beats if sent < end and answered > begin), default=0.0)

    def _beat(self) -> None:
        while not self._left.wait(EVERY):
            sent = time.monotonic()
            self._store.ping()
            self._beats.append((sent, time.monotonic()))
