"""What goes in and out over HTTP, as types: the options of a caption and the answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from model.exits import TIERS
from service.errors import Problem, printable
from service.jobs import Priority

_SPEED = f"{', '.join(TIERS)}, or a number from 1 to the end of the table in `/v1/speeds`"


def _no_boolean(value: object) -> object:
    # JSON's true would pass as the number 1.
    if isinstance(value, bool):
        raise ValueError("must not be a boolean")
    return value


Speed = Annotated[str | float, BeforeValidator(_no_boolean)]


class CaptionOptions(BaseModel):
    """How to caption; the same names in a query string, a form and JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    speed: Speed | None = Field(None, description=f"{_SPEED}. Default: balanced.", examples=["fast", 2.5])
    tau: Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_boolean)] | None = Field(
        None,
        description="Instead of `speed`: the entropy in nats below which a word leaves the decoder.",
    )
    beam: Annotated[int, BeforeValidator(_no_boolean)] = Field(
        1, ge=1, le=5, description="Beam width. The speed table was measured with 1."
    )
    regions: bool = Field(False, description="Whether to answer with the regions that were looked at.")
    attention: bool = Field(
        False, description="Whether to answer with where each word looked: one more pass of the decoder."
    )
    timeout_ms: Annotated[int, Field(ge=1), BeforeValidator(_no_boolean)] | None = Field(
        None,
        description="Milliseconds from the request's arrival until 504; at most, and by default, the "
        "service's DEECAP_TIMEOUT_MS, or with `Prefer: respond-async` its DEECAP_JOB_TIMEOUT_S. "
        "A body that is still arriving has the server's limit, whatever is asked for here.",
    )
    priority: Priority = Field(
        "interactive",
        description="`interactive` goes first. `batch` waits in a longer queue and gets one place in eight while "
        "interactive photos keep coming.",
    )
    min_speed: Speed | None = Field(
        None,
        description=f"The lowest speed that may be given: {_SPEED}. Where no `speed` is asked for, the default is "
        "raised to it.",
        examples=["balanced"],
    )
    max_speed: Speed | None = Field(
        None,
        description=f"The highest speed that may be given: {_SPEED}. The answer comes at `speed`, and, while more "
        "photos wait than can be captioned in time, at up to this one; `speed.moved_by_load` then says so. Without it "
        "load moves nothing.",
        examples=["turbo"],
    )

    @model_validator(mode="after")
    def _speed_or_tau(self) -> CaptionOptions:
        if self.speed is not None and self.tau is not None:
            raise ValueError("give speed or tau, not both")
        if self.tau is not None and (self.min_speed is not None or self.max_speed is not None):
            raise ValueError("tau is exact: min_speed and max_speed go with a speed")
        return self


def read_options(pairs: list[tuple[str, object]]) -> CaptionOptions:
    """The options that a request gave as names and values.

    Raises `Problem`: `unknown_option`, `repeated_field`, `invalid_option`; each names the options it is about.
    """
    options: dict[str, object] = {}
    for name, value in pairs:
        if name not in CaptionOptions.model_fields:
            known = ", ".join(CaptionOptions.model_fields)
            unknown = sorted({name for name, _ in pairs} - set(CaptionOptions.model_fields))
            raise Problem("unknown_option", f"Not known: {printable(', '.join(unknown), 200)}. Known: {known}.")
        if name in options:
            raise Problem("repeated_field", f"The option {name} was given more than once.")
        options[name] = value
    try:
        return CaptionOptions.model_validate(options)
    except ValidationError as error:
        said = [f"{each['loc'][0] if each['loc'] else 'options'}: {each['msg']}" for each in error.errors()]
        raise Problem("invalid_option", "; ".join(said)) from error


class WordOut(BaseModel):
    """One word and how it left the decoder."""

    text: str
    exit_layer: int = Field(description="The layer it left at, 1 to `layers` of `/v1/model`.")
    entropy: float = Field(description="Nats, of the distribution it was taken from.")


class SpeedOut(BaseModel):
    """What the asked speed came to."""

    requested: str | float | None = Field(description="As asked for; null where tau was.")
    tier: str | None = Field(description="The tier's name, where one was asked for.")
    tau: float = Field(description="The entropy threshold used, nats.")
    promised: float = Field(description="SpeedUp measured at this tau on validation data, greedy.")
    moved_by_load: bool = Field(
        False,
        description="Whether `tau` and `promised` are not those of the asked speed: many photos waited, and "
        "`max_speed` allowed a higher one.",
    )


class TimingsOut(BaseModel):
    """Milliseconds. `total` is from the request's arrival and holds its upload too; of an asynchronous job it is the
    sum of the others."""

    queue: float
    decode_image: float
    look: float
    describe: float
    total: float


class ModelName(BaseModel):
    """Which model answered."""

    name: str
    revision: str


class RegionOut(BaseModel):
    """A part of the image that was looked at."""

    box: tuple[float, float, float, float] = Field(description="x0, y0, x1, y1, relative to the upright image.")


class CaptionOut(BaseModel):
    """A caption and how it came about."""

    caption: str
    confidence: float = Field(description="Geometric mean of the words' probabilities, 0 to 1.")
    words: list[WordOut]
    speed: SpeedOut
    speedup: float = Field(description="Of this caption: layers at full depth over layers used, end of sentence too.")
    timings_ms: TimingsOut
    model: ModelName
    request_id: str
    regions: list[RegionOut] | None = Field(None, description="Only there when asked for.")
    attention: list[list[float]] | None = Field(
        None,
        description="Only there when asked for: of each word, the weights of the regions in the layer that it left at, "
        "mean over the heads. A row's sum is 1, but for rounding.",
    )


class WordEventOut(WordOut):
    """The event `word`: one more word is decided."""

    index: int = Field(ge=0, description="Its place in the caption, from 0.")
    attempt: int = Field(ge=1, description="Grows where the caption had to be begun again: see the event `restart`.")


class RestartEventOut(BaseModel):
    """The event `restart`: the words so far are void, since another worker begins the caption again at index 0."""

    attempt: int = Field(ge=1)


class TierOut(BaseModel):
    """A named speed."""

    name: str
    target: float = Field(description="The SpeedUp it is calibrated to.")
    tau: float = Field(description="Nats.")
    promised: float = Field(description="SpeedUp measured at this tau.")


class RangeOut(BaseModel):
    """Numbers that can be asked for as speed."""

    lowest: float
    highest: float


class SpeedRowOut(BaseModel):
    """One threshold as measured on validation data, greedy."""

    tau: float
    speedup: float = Field(description="The paper's: layers of full depth over exit layers.")
    executed_speedup: float = Field(description="Layer-rows at full depth over those run, catch-up included.")
    cider: float = Field(description="CIDEr-D x 100.")
    describe_ms: float = Field(description="Encoder and words, mean per photo, on the machine in `measured`.")


class SpeedsOut(BaseModel):
    """The speeds that the model offers."""

    default: str
    tiers: list[TierOut]
    range: RangeOut
    table: list[SpeedRowOut]
    measured: dict[str, object] = Field(description="How the table was measured.")


class ModelOut(BaseModel):
    """The model served."""

    name: str
    revision: str = Field(description="First 12 hex digits of the sha256 over the bundle's files.")
    layers: int = Field(description="Of the decoder.")
    device: str
    vocabulary_size: int = Field(description="Words, special ones included.")


class StatusOut(BaseModel):
    """A probe's good answer."""

    status: Literal["ok"] = "ok"


class ProblemOut(BaseModel):
    """RFC 9457, `application/problem+json`."""

    type: str = Field(description="Address of this kind of problem.", examples=["/problems/not_an_image"])
    title: str
    status: int
    detail: str = Field(description="What is wrong with this request.")
    code: str = Field(description="For programs; never changes.")
    request_id: str = Field(description="Also in the header X-Request-ID and in the service's log.")


class BatchItemOut(BaseModel):
    """What became of one photo: a caption or a problem."""

    index: int = Field(ge=0, description="The photo's place in the request, from 0.")
    status: int = Field(description="As if it had been asked for alone: 200, or that of the problem.")
    caption: CaptionOut | None
    problem: ProblemOut | None
    retry_after: int | None = Field(
        None, description="Seconds until it is worth another try, where the problem passes (429, 503)."
    )


class BatchOut(BaseModel):
    """What became of each photo, in the order of the request."""

    results: list[BatchItemOut]
    request_id: str


class JobOut(BaseModel):
    """An asynchronous job."""

    id: str
    state: Literal["queued", "running", "done", "failed"]
    position: int | None = Field(
        None, ge=0, description="While `queued`: photos of the same `priority` before it, where that is known."
    )
    result: CaptionOut | None = Field(None, description="Where the state is `done`.")
    problem: ProblemOut | None = Field(None, description="Where the state is `failed`.")


class ProblemKindOut(BaseModel):
    """What all problems of one type have in common."""

    code: str
    status: int
    title: str
