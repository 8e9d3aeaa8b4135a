"""What the service answers, as types. Members that a newer service adds are passed over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from service.client.errors import ProblemError, problem_error

T = TypeVar("T")


@dataclass(frozen=True)
class Word:
    """One word and how it left the decoder."""

    text: str
    exit_layer: int  # 1 to `Model.layers`
    entropy: float  # nats


@dataclass(frozen=True)
class StreamedWord(Word):
    """A word as soon as it is decided. Where `attempt` grows, the words begin again, and those before are void."""

    index: int  # in the caption, from 0
    attempt: int  # from 1


@dataclass(frozen=True)
class Speed:
    """What the asked speed came to."""

    requested: str | float | None  # None where tau was given
    tier: str | None
    tau: float  # nats
    promised: float  # SpeedUp measured at this tau
    moved_by_load: bool = False  # whether load made it higher than asked for, as `max_speed` allowed


@dataclass(frozen=True)
class Timings:
    """Milliseconds at the service. `total` is from the request's arrival and holds its upload too."""

    queue: float
    decode_image: float
    look: float
    describe: float
    total: float


@dataclass(frozen=True)
class ModelName:
    """Which model answered."""

    name: str
    revision: str


@dataclass(frozen=True)
class Region:
    """A part of the photo that was looked at."""

    box: tuple[float, float, float, float]  # x0, y0, x1, y1, relative to the upright photo


@dataclass(frozen=True)
class CaptionAnswer:
    """A caption and how it came about."""

    caption: str
    confidence: float  # geometric mean of the words' probabilities, 0 to 1
    words: tuple[Word, ...]
    speed: Speed
    speedup: float  # of this caption: layers at full depth over layers used
    timings_ms: Timings
    model: ModelName
    request_id: str
    regions: tuple[Region, ...] | None = None  # None where they were not asked for
    attention: tuple[tuple[float, ...], ...] | None = None  # of each word, the weights of the regions; likewise

    @classmethod
    def read(cls, said: Any) -> CaptionAnswer:
        """Raises `KeyError`, `TypeError` or `ValueError` for what is no caption."""
        regions, attention = said.get("regions"), said.get("attention")
        return cls(
            caption=str(said["caption"]),
            confidence=float(said["confidence"]),
            words=tuple(_read(Word, word) for word in said["words"]),
            speed=_read(Speed, said["speed"]),
            speedup=float(said["speedup"]),
            timings_ms=_read(Timings, said["timings_ms"]),
            model=_read(ModelName, said["model"]),
            request_id=str(said["request_id"]),
            regions=None if regions is None else tuple(_region(region) for region in regions),
            attention=None if attention is None else tuple(tuple(map(float, row)) for row in attention),
        )


@dataclass(frozen=True)
class Job:
    """An asynchronous job as it was when it was asked after."""

    id: str
    state: str  # queued, running, done or failed
    position: int | None = None  # photos before it while it is queued, where that is known
    answer: CaptionAnswer | None = None  # of one that is done
    error: ProblemError | None = None  # of one that failed
    retry_after: float | None = None  # seconds until it is worth another look, where the service says so

    @property
    def over(self) -> bool:
        return self.answer is not None or self.error is not None

    @classmethod
    def read(cls, said: Any) -> Job:
        """Raises `KeyError`, `TypeError` or `ValueError` for what is none."""
        answer = None if said.get("result") is None else CaptionAnswer.read(said["result"])
        error = None if said.get("problem") is None else read_problem(said["problem"])
        return cls(str(said["id"]), str(said["state"]), said.get("position"), answer, error)


def read_problem(said: Any, retry_after: float | None = None) -> ProblemError:
    """A problem within another document. Raises `KeyError`, `TypeError` or `ValueError` for what is none."""
    code, detail, request_id = (str(said[name]) for name in ("code", "detail", "request_id"))
    return problem_error(int(said["status"]), code, detail, request_id, retry_after)


@dataclass(frozen=True)
class Tier:
    """A named speed."""

    name: str
    target: float  # the SpeedUp that it is calibrated to
    tau: float  # nats
    promised: float  # SpeedUp measured at this tau


@dataclass(frozen=True)
class SpeedRow:
    """One threshold as measured on validation data."""

    tau: float
    speedup: float
    executed_speedup: float
    cider: float
    describe_ms: float


@dataclass(frozen=True)
class Speeds:
    """The speeds to choose from: a tier's name, or any number from `lowest` to `highest`."""

    default: str
    tiers: tuple[Tier, ...]
    lowest: float
    highest: float
    table: tuple[SpeedRow, ...]
    measured: Mapping[str, Any]

    @classmethod
    def read(cls, said: Any) -> Speeds:
        """Raises `KeyError`, `TypeError` or `ValueError` for what is none."""
        return cls(
            default=str(said["default"]),
            tiers=tuple(_read(Tier, tier) for tier in said["tiers"]),
            lowest=float(said["range"]["lowest"]),
            highest=float(said["range"]["highest"]),
            table=tuple(_read(SpeedRow, row) for row in said["table"]),
            measured=dict(said["measured"]),
        )


@dataclass(frozen=True)
class Model:
    """The model served."""

    name: str
    revision: str
    layers: int
    device: str
    vocabulary_size: int

    @classmethod
    def read(cls, said: Any) -> Model:
        """Raises `KeyError` or `TypeError` for what is none."""
        return _read(cls, said)


def _read(kind: type[T], said: Mapping[str, Any]) -> T:
    """What an older service does not say has its default, where it has one."""
    wanted = [each for each in fields(kind) if each.name in said or each.default is MISSING]  # type: ignore[arg-type]  # each kind is a dataclass
    return kind(**{each.name: said[each.name] for each in wanted})


def _region(said: Mapping[str, Any]) -> Region:
    x0, y0, x1, y1 = said["box"]
    return Region((x0, y0, x1, y1))
