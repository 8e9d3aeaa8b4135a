"""Tells the words of captions in the making to the broker, for jobs that stream.

Invariants:

- Each word of a job is told once, in order, and none after `finish` or `drop`.
- There is one call to the broker at a time, for all jobs; what is decided meanwhile goes with the next.
- Nothing here holds an answer up for more than `FINISH_SECONDS`, or fails it: words are a courtesy, the answer has all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from model.caption import Word
from service.broker.base import BrokerLostError, Delivery
from service.jobs import Progress

log = logging.getLogger(__name__)

FINISH_SECONDS = 0.05  # that an answer waits for its last words to be told: a store that is well takes one
Told = Sequence[tuple[Delivery, Progress]]


@dataclass(eq=False)
class WordStream:
    """The words of one job, as they are decided."""

    delivery: Delivery
    words: list[Word] = field(default_factory=list)  # all that are known
    told: int = 0  # of them, or being told


class WordTeller:
    """Of one worker, on its event loop."""

    def __init__(self, tell: Callable[[Told], Awaitable[None]]) -> None:
        """`tell` is the broker's; whatever it raises is dropped."""
        self._tell = tell
        self._open: set[WordStream] = set()
        self._behind: dict[WordStream, None] = {}  # with words to tell, the longest waiting first
        self._telling: frozenset[WordStream] = frozenset()
        self._told = asyncio.Event()  # of the call under way; set when it has ended, and replaced
        self._task: asyncio.Task[None] | None = None
        self._failed = False  # told once

    def begin(self, delivery: Delivery) -> WordStream:
        stream = WordStream(delivery)
        self._open.add(stream)
        return stream

    def hear(self, stream: WordStream, begin: int, words: Sequence[Word]) -> None:
        """More words, the first at place `begin` of the caption; what is known already is passed over."""
        new = words[max(0, len(stream.words) - begin) :]
        if not new or stream not in self._open:
            return
        stream.words += new
        self._behind[stream] = None
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def finish(self, stream: WordStream) -> None:
        """Before the answer: returns once all its words are told, or the time for that is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINISH_SECONDS):
                while stream in self._behind or stream in self._telling:
                    await self._told.wait()
        self.drop(stream)

    def drop(self, stream: WordStream) -> None:
        """Nothing more is told of it. Without effect on one that has ended."""
        self._open.discard(stream)
        self._behind.pop(stream, None)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while self._behind:
            batch, self._behind = list(self._behind), {}
            self._telling = frozenset(batch)
            try:
                await self._tell([(stream.delivery, _progress(stream)) for stream in batch])
            except BrokerLostError:
                pass  # said elsewhere
            except Exception:
                if not self._failed:
                    self._failed = True
                    log.exception("the words of %d captions cannot be told", len(batch))
            finally:
                self._telling = frozenset()
                self._told.set()
                self._told = asyncio.Event()


def _progress(stream: WordStream) -> Progress:
    """The words not told yet; notes that they are."""
    begin, stream.told = stream.told, len(stream.words)
    delivery = stream.delivery
    return Progress(delivery.job.id, delivery.attempt, begin, tuple(stream.words[begin:]))
