"""Whether this machine and the store were there all the while: what they held up says nothing of the service."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import redis

EVERY = 0.02  # seconds
PATIENCE = 5.0  # seconds that a ping may take
HELD_UP = 0.15  # seconds: from here on speeds move and refusals come late, whoever's fault it is


class Pulse:
    """`with`: pings from a thread and over a connection of its own until it is left; fails then where one failed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._longest = 0.0  # seconds from when a ping was due until it was answered
        self._failed: Exception | None = None

    @property
    def held_up(self) -> bool:
        """Whether a ping was sent, or answered, so late that what was measured meanwhile is to be measured again."""
        return self._longest > HELD_UP

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._left.set()
        self._thread.join(2 * PATIENCE)
        if kind is None:
            assert not self._thread.is_alive(), "the store answers no ping"
            assert self._failed is None, f"the store answered no ping: {self._failed!r}"

    def _beat(self) -> None:
        try:
            with redis.Redis.from_url(self._url, socket_timeout=PATIENCE, retry=None) as store:
                store.ping()  # the first one connects
                due = time.monotonic() + EVERY
                while not self._left.wait(max(0.0, due - time.monotonic())):
                    store.ping()
                    answered = time.monotonic()
                    self._longest = max(self._longest, answered - due)
                    due = answered + EVERY
        except redis.RedisError as error:
            self._failed = error
