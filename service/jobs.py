"""What travels between a front and a worker: a job, its words and reply, what a worker says of itself; wire forms.

The other side may be of another version: `from_wire` passes over fields that it does not know, and what is added here
must have a default. `from_wire` raises `ValueError` for what cannot be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from model.caption import Caption, Word
from model.exits import ResolvedSpeed, SpeedTable
from service import wire
from service.errors import KINDS, Problem

Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "batch")  # the more urgent first
Box = tuple[float, float, float, float]  # x0, y0, x1, y1, relative to the upright image


@dataclass(frozen=True)
class Job:
    """One photo to caption. It carries the image as it came, which is small and can travel, and not its pixels."""

    id: str  # of the job: unique, and the same when a front submits it again
    image: bytes
    speed: str | float | None  # as asked for: the worker turns it into τ with its own table
    tau: float | None  # nats
    beam: int
    priority: Priority
    deadline: float  # by the broker's clock, seconds since 1970
    request_id: str = ""  # for the worker's log
    traceparent: str = ""  # W3C trace context, for the worker's log
    min_speed: float | None = None  # SpeedUp; with max_speed: what the client allows under load
    max_speed: float | None = None
    attention: bool = False  # where its words looked is wanted too
    regions: bool = True  # the boxes are wanted; an older front does not say, and may want them
    stream: bool = False  # its words are told as they are decided, as `Progress`
    kept: float = 0.0  # seconds that its outcome can be found; 0: as long as resubmission needs it, a minute
    note: str = ""  # of the front that submitted it first, kept with the outcome: `Found.note`; workers pass it over

    def to_wire(self) -> dict[str, bytes]:
        """The image as it is, all else as JSON."""
        said = {name: value for name, value in wire.changed(self).items() if name != "image"}
        return {"job": json.dumps(said).encode(), "image": self.image}

    @classmethod
    def from_wire(cls, fields: Mapping[str, bytes]) -> Job:
        job = wire.read(cls, {**_object(fields["job"]), "image": fields["image"]})
        numbers = (job.speed, job.tau, job.deadline, job.min_speed, job.max_speed, job.kept)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise ValueError("a job's numbers must be finite")
        return job


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds. `describe` is the encoder and the words."""

    queue: float
    decode_image: float
    look: float
    describe: float


@dataclass(frozen=True)
class Answer:
    """A job done."""

    caption: Caption
    boxes: tuple[Box, ...]  # of the regions looked at; none where they were not asked for
    timings: Timings
    model: str
    revision: str
    asked: ResolvedSpeed | None = None  # what the client asked for, where load moved the speed: `caption.speed` is used
    attention: tuple[tuple[float, ...], ...] | None = None  # of each word, the weights of the regions; where asked for


@dataclass(frozen=True)
class Refusal:
    """A job that failed, as the problem that the client is told."""

    code: str  # of `service.errors.KINDS`
    detail: str
    retry_after: int | None = None  # seconds

    def to_problem(self) -> Problem:
        """A worker newer than this front may know codes that this front does not: those are `internal`."""
        return Problem(self.code if self.code in KINDS else "internal", self.detail, retry_after=self.retry_after)


@dataclass(frozen=True)
class Reply:
    """What became of a job."""

    job_id: str
    outcome: Answer | Refusal
    worker: str = ""  # the id of the one that answered

    def to_wire(self) -> bytes:
        kind = "answer" if isinstance(self.outcome, Answer) else "refusal"
        # `vars` of each record within: `asdict` copies every box and takes ten times as long.
        return json.dumps({"id": self.job_id, "worker": self.worker, kind: self.outcome}, default=vars).encode()

    @classmethod
    def from_wire(cls, data: bytes) -> Reply:
        said = _object(data)
        kinds: Mapping[str, type[Answer | Refusal]] = {"answer": Answer, "refusal": Refusal}
        found = [wire.read(kind, said[name]) for name, kind in kinds.items() if name in said]
        if len(found) != 1 or not isinstance(said.get("id"), str):
            raise ValueError("a reply has an id, and an answer or a refusal")
        return cls(said["id"], found[0], str(said.get("worker", "")))


@dataclass(frozen=True)
class Progress:
    """Words decided since the last one, of a job with `stream`."""

    job_id: str
    attempt: int  # of the delivery: a later attempt begins again at word 0
    begin: int  # place in the caption of the first of `words`
    words: tuple[Word, ...]

    def to_wire(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_wire(cls, data: bytes) -> Progress:
        return wire.read(cls, _object(data))


@dataclass(frozen=True)
class ModelInfo:
    """What a worker serves."""

    name: str
    revision: str
    layers: int  # N of the decoder
    device: str
    speeds: SpeedTable
    vocabulary_size: int  # words, special ones included


@dataclass(frozen=True)
class WorkerState:
    """What a worker says with each heartbeat."""

    id: str
    model: ModelInfo
    ready: bool  # captions go through
    slots: int  # captions it can have in the making
    running: int  # jobs it has taken and not answered
    last_success: float  # by the broker's clock; 0.0 before the first caption

    def to_wire(self) -> bytes:
        model = {**asdict(self.model), "speeds": self.model.speeds.to_json()}
        return json.dumps({**asdict(self), "model": model}).encode()

    @classmethod
    def from_wire(cls, data: bytes) -> WorkerState:
        return wire.read(cls, _object(data))


@dataclass(frozen=True)
class QueueState:
    """What a broker knows at one moment."""

    waiting: Mapping[Priority, int]  # jobs that no worker has taken
    oldest: float  # seconds that the oldest of them has waited; 0.0 for none
    answered: int  # jobs answered since the queue began; its growth is the drain rate
    redelivered: int  # jobs taken over from dead workers since the queue began
    dead: int  # jobs given up after too many of that
    workers: tuple[WorkerState, ...] = field(default=())  # those whose heart beats


def _object(data: bytes) -> dict[str, Any]:
    """Raises `ValueError` for what is no JSON object."""
    said = json.loads(data)
    if not isinstance(said, dict):
        raise ValueError(f"must be a JSON object, not {type(said).__name__}")
    return said
