"""The requests that wait at this front, by the id of their job, and what each of them is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from service.errors import Problem
from service.jobs import Job, Progress, Reply


@dataclass(eq=False)
class Waiting:
    """One request that waits for a job."""

    job: Job
    inbox: asyncio.Queue[Progress | Reply | Problem] = field(default_factory=asyncio.Queue)
    due: float | None = None  # by time.monotonic(), when to remind the broker; None until it took the job
    over: bool = False  # the last thing that it will be told is in the inbox
    told: int = 0  # words
    attempt: int = 0  # that they are of
    shift: int = 0  # of the attempts' numbers: a lost store or a worker that left in order begins to count anew

    def hear(self, said: Progress | Reply | Problem) -> None:
        """Nothing more after a reply or a problem; words once each, and a new attempt wherever they begin again."""
        if self.over:
            return
        if isinstance(said, Progress):
            fresh = self._fresh(said)
            if fresh is None:
                return
            said = fresh
        else:
            self.over = True
        self.inbox.put_nowait(said)

    def _fresh(self, said: Progress) -> Progress | None:
        """What is new of it."""
        attempt = said.attempt + self.shift
        if attempt < self.attempt or (attempt == self.attempt and said.begin == 0 and self.told):
            self.shift = self.attempt + 1 - said.attempt
            attempt = self.attempt + 1
        if attempt > self.attempt:
            self.attempt, self.told = attempt, 0
        words = said.words[max(0, self.told - said.begin) :]
        begin = max(said.begin, self.told)
        self.told = begin + len(words)
        return replace(said, attempt=attempt, begin=begin, words=words) if words else None


class UnderWay:
    """All that wait, each for a job of its own."""

    def __init__(self) -> None:
        self._by_id: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Waiting]:
        """Of a copy: they may come and go meanwhile."""
        return iter(list(self._by_id.values()))

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._by_id

    def add(self, job: Job) -> Waiting:
        waiting = self._by_id[job.id] = Waiting(job)
        return waiting

    def remove(self, waiting: Waiting) -> None:
        del self._by_id[waiting.job.id]

    def hear(self, said: Reply | Progress) -> None:
        """Tells whoever waits for it, if anybody still does."""
        if waiting := self._by_id.get(said.job_id):
            waiting.hear(said)
