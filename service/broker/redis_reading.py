"""Reads what the Redis broker finds in the store, which another version may have written, or anybody."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence

from service.broker.base import Found
from service.broker.rules import UNREADABLE_REPLY
from service.jobs import Job, Progress, Reply, WorkerState

log = logging.getLogger(__name__)

WARN_SECONDS = 60.0  # between two warnings of one kind: workers are read four times a second


class Reading:
    """Of one broker. What cannot be read is told in the log."""

    def __init__(self) -> None:
        self._warned: dict[str, float] = {}  # by what was said: when, by time.monotonic()

    def job(self, job_id: bytes, said: bytes, image: bytes) -> Job | None:
        """None: to be made a dead letter."""
        try:
            job = Job.from_wire({"job": said, "image": image})
            if job.id != job_id.decode():
                raise ValueError(f"its id is {job.id!r:.60} here and {job_id!r:.60} there")
        except ValueError as error:
            log.warning("a job that cannot be read becomes a dead letter: %s: %r", error, said[:200])
            return None
        return job

    def heard(self, fields: Mapping[bytes, bytes]) -> Reply | Progress | None:
        """None: nothing that anybody waits for. Words that cannot be read come with the reply."""
        try:
            if (words := fields.get(b"words")) is not None:
                return Progress.from_wire(words)
            return Reply.from_wire(fields.get(b"reply", b""))
        except ValueError as error:
            self._warn("a reply cannot be read; is its worker of another version?", error)
            return _unreadable(fields.get(b"reply", b""))

    def worker(self, wire: bytes) -> WorkerState | None:
        """None: not to be listed."""
        try:
            return WorkerState.from_wire(wire)
        except ValueError as error:
            self._warn("a worker cannot be listed; is it of another version?", error)
            return None

    def found(self, rows: Sequence[bytes | int]) -> Found | None:
        """Of find.lua."""
        match rows:
            case [b"queued", int(position), bytes(note)]:
                return Found("queued", position, note=note.decode(errors="replace"))
            case [b"running", bytes(note)]:
                return Found("running", note=note.decode(errors="replace"))
            case [b"done", bytes(wire), bytes(note)]:
                said = self.heard({b"reply": wire})
                if isinstance(said, Reply):
                    return Found("done", reply=said, note=note.decode(errors="replace"))
        return None

    def _warn(self, what: str, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._warned.get(what, float("-inf")) + WARN_SECONDS:
            self._warned[what] = now
            log.warning("%s: %s", what, error)


def _unreadable(wire: bytes) -> Reply | None:
    """What its request is told instead, if it can be told which one that is."""
    try:
        job_id = json.loads(wire)["id"]
    except (ValueError, KeyError, TypeError):
        return None
    return Reply(job_id, UNREADABLE_REPLY) if isinstance(job_id, str) else None
