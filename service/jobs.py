"""What travels between a front and a worker: a job, its reply, what a worker says of itself; and their wire form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from model.caption import Caption, Word
from model.exits import ResolvedSpeed, SpeedTable

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

    def to_wire(self) -> dict[str, bytes]:
        """The image as it is, all else as JSON."""
        said = {name: value for name, value in asdict(self).items() if name != "image"}
        return {"job": json.dumps(said).encode(), "image": self.image}

    @classmethod
    def from_wire(cls, fields: Mapping[str, bytes]) -> Job:
        """Raises `ValueError`, `KeyError` or `TypeError` for what is no job."""
        return cls(image=fields["image"], **json.loads(fields["job"]))


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
    boxes: tuple[Box, ...]  # of the regions looked at
    timings: Timings
    model: str
    revision: str


@dataclass(frozen=True)
class Refusal:
    """A job that failed, as the problem that the client is told."""

    code: str  # of `service.errors.KINDS`
    detail: str
    retry_after: int | None = None  # seconds


@dataclass(frozen=True)
class Reply:
    """What became of a job."""

    job_id: str
    outcome: Answer | Refusal
    worker: str = ""  # the id of the one that answered

    def to_wire(self) -> bytes:
        kind = "answer" if isinstance(self.outcome, Answer) else "refusal"
        return json.dumps({"id": self.job_id, "worker": self.worker, kind: asdict(self.outcome)}).encode()

    @classmethod
    def from_wire(cls, data: bytes) -> Reply:
        """Raises `ValueError`, `KeyError` or `TypeError` for what is no reply."""
        said = json.loads(data)
        outcome = _answer(said["answer"]) if "answer" in said else Refusal(**said["refusal"])
        return cls(said["id"], outcome, said["worker"])


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
        """Raises `ValueError`, `KeyError` or `TypeError` for what is none."""
        said = json.loads(data)
        model = {**said["model"], "speeds": SpeedTable.from_json(said["model"]["speeds"])}
        return cls(**{**said, "model": ModelInfo(**model)})


@dataclass(frozen=True)
class QueueState:
    """What a broker knows at one moment."""

    waiting: Mapping[Priority, int]  # jobs that no worker has taken
    oldest: float  # seconds that the oldest of them has waited; 0.0 for none
    answered: int  # jobs answered since the queue began; its growth is the drain rate
    redelivered: int  # jobs taken over from dead workers since the queue began
    dead: int  # jobs given up after too many of that
    workers: tuple[WorkerState, ...] = field(default=())  # those whose heart beats


def _answer(said: dict[str, Any]) -> Answer:
    caption = said["caption"]
    steps = tuple(Word(**step) for step in caption["steps"])
    made = Caption(steps, ResolvedSpeed(**caption["speed"]), caption["layers"])
    boxes = tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in said["boxes"])
    return Answer(made, boxes, Timings(**said["timings"]), said["model"], said["revision"])
