"""What is sent, how an answer is read, and when it is worth another try: all that both clients share, without I/O.

To send a caption again is safe: the same photo at the same speed has the same caption, and nothing is kept of it. A job
is sent under a key of its own (`Idempotency-Key`), so that it is made once.
"""

from __future__ import annotations

import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypedDict, TypeVar, cast
from urllib.parse import quote

import httpx

from service.client.answers import Job
from service.client.errors import (
    BusyError,
    ClientError,
    DeadlineError,
    ProblemError,
    QuotaError,
    UnexpectedAnswerError,
    UnknownJobError,
    UnreachableError,
    problem_error,
)

URL_VARIABLE, KEY_VARIABLE = "DEECAP_CLIENT_URL", "DEECAP_CLIENT_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT = 60.0  # seconds: twice what the service gives one try, so that there is time for another
FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0  # seconds; a restart takes some
CONNECT = 5.0  # seconds for a connection: a machine that is gone does not refuse it
POLL = 1.0  # seconds between two looks at a job, where the service does not say
SHORTEST_TRY = 0.05  # seconds: with less time left nothing is sent
AGAIN = frozenset({429, 502, 503, 504})  # and not 500: the photo may be at fault

T = TypeVar("T")


class Options(TypedDict, total=False):
    """How to caption. What is not there, or None, is left to the service; docs/api.md says what each does."""

    speed: str | float | None  # a tier's name, or a number from 1
    tau: float | None  # nats, instead of a speed
    beam: int | None  # 1 to 5
    regions: bool | None  # whether to answer with the regions that were looked at
    attention: bool | None  # whether to answer with where each word looked
    timeout_ms: int | None  # the service's deadline for one try
    priority: Literal["interactive", "batch"] | None
    timeout: float | None  # seconds that all tries may take together; by default the client's
    request_id: str | None  # by default one of chance, the same for all tries
    traceparent: str | None  # W3C Trace Context, of the caller's span
    min_speed: str | float | None  # the bounds within which load may move the speed
    max_speed: str | float | None


@dataclass(frozen=True)
class Call:
    """One request, whatever number of times it is sent. Its id is the same each time, to be found again in the log."""

    method: str
    path: str
    content: bytes | None = None
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


def settings(url: str | None, api_key: str | None) -> dict[str, Any]:
    """Arguments of an httpx client: the address and the key, by default those of the environment.

    Raises `ValueError` for an address that is none.
    """
    key = os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key
    address = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
        raise ValueError(f"the address must be like {DEFAULT_URL}, not {address}")
    headers = {"User-Agent": "deecap-client", "Accept": "application/json, application/problem+json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return {"base_url": address, "headers": headers, "limits": httpx.Limits(max_connections=None)}


def caption_call(image: bytes, options: Options, **headers: str) -> tuple[Call, float | None]:
    """What to send, and the seconds it may take if the options say so. Raises `TypeError` for an unknown option.

    `headers` say how to answer, `_` for `-`.
    """
    params, own, timeout = _split(options)
    own |= {"Content-Type": "application/octet-stream"}
    own |= {name.replace("_", "-"): value for name, value in headers.items()}
    return Call("POST", "/v1/caption", image, params, own), timeout


def batch_call(images: Iterable[bytes], options: Options) -> tuple[Call, float | None]:
    """As `caption_call`, for many in one form."""
    params, headers, timeout = _split(options)
    files = [("images", (str(number), image)) for number, image in enumerate(images)]
    form = httpx.Request("POST", DEFAULT_URL, files=files)
    headers["Content-Type"] = form.headers["Content-Type"]
    return Call("POST", "/v1/captions", form.read(), params, headers), timeout


def job_call(method: str, id: str) -> Call:
    """Asks after a job, or cancels it."""
    return Call(method, f"/v1/jobs/{quote(id, safe='')}")


def _split(options: Options) -> tuple[dict[str, str], dict[str, str], float | None]:
    """What is said in the query, in headers, and to ourselves. Raises `TypeError` for an unknown option."""
    said = dict(options)
    if unknown := set(said) - set(Options.__annotations__):
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    timeout, request_id, traceparent = (said.pop(name, None) for name in ("timeout", "request_id", "traceparent"))
    headers = {"X-Request-ID": str(request_id or uuid.uuid4().hex)}
    if traceparent:
        headers["traceparent"] = str(traceparent)
    params = {name: _said(value) for name, value in said.items() if value is not None}
    return params, headers, cast("float | None", timeout)


def reading(kind: Callable[[Any], T]) -> Callable[[httpx.Response], T]:
    """Reads an answer whose JSON `kind` understands. Raises `ProblemError`, or `UnexpectedAnswerError` for what this
    service never says.
    """

    def read(response: httpx.Response) -> T:
        if not response.is_success:
            raise problem(response)
        try:
            return kind(response.json())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise unexpected(response) from error

    return read


def read_job(response: httpx.Response) -> Job:
    """Raises as the others do."""
    job = reading(Job.read)(response)
    return replace(job, retry_after=_retry_after(response.headers.get("retry-after", "")))


def read_cancelled(response: httpx.Response) -> bool:
    """Whether there was something to cancel. Raises as the others do."""
    if response.status_code == 204:
        return True
    if response.is_success:
        raise unexpected(response)
    failure = problem(response)
    if isinstance(failure, UnknownJobError):
        return False
    raise failure


def unexpected(response: httpx.Response) -> UnexpectedAnswerError:
    return UnexpectedAnswerError(f"{response.url} answers something else than captions")


def problem(response: httpx.Response) -> ClientError:
    """What an answer that is no success says. Its body must have been read."""
    said: Any = None
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        try:
            said = response.json()
        except ValueError:
            said = None
    wait = _retry_after(response.headers.get("retry-after", ""))
    if isinstance(said, dict):
        code, detail, request_id = (str(said.get(name, "")) for name in ("code", "detail", "request_id"))
        return problem_error(response.status_code, code, detail, request_id, wait)
    what = f"{response.url} answers {response.status_code} {response.reason_phrase}"
    if response.status_code in AGAIN or response.status_code in (401, 403, 413, 500):  # of a proxy between
        return problem_error(response.status_code, "", what, response.headers.get("x-request-id", ""), wait)
    return UnexpectedAnswerError(what)


def _retry_after(said: str) -> float | None:
    """Seconds, of either form of RFC 9110, 10.2.3."""
    if said.isdecimal() and said.isascii():
        return float(said[:9])
    try:
        until = parsedate_to_datetime(said)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


class Tries:
    """The tries of one call. After each that failed, `pause_after` says how long to wait, or raises what is final."""

    def __init__(self, timeout: float, tries: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`timeout` in seconds bounds them all together; `tries` their number, None for as many as fit."""
        self._clock = clock
        self._end = clock() + timeout
        self._left = tries
        self._pause = FIRST_PAUSE

    @property
    def over(self) -> bool:
        """Whether nothing is left of the time."""
        return self._clock() >= self._end

    @property
    def seconds(self) -> float:
        """What is left of the time."""
        return max(SHORTEST_TRY, self._end - self._clock())

    def pause_after(self, error: Exception) -> float:
        """Seconds until the next try. Raises the error, or a `ClientError` for it, where there is none.

        Half of a pause that doubles is chance, and what `Retry-After` says is waited for whole: so clients that were
        turned away together do not come back together, nor before they are wanted.
        """
        failure = _as_client_error(error)
        if self._left is not None:
            self._left -= 1
        pause = self._pause * random.uniform(0.5, 1.0)
        self._pause = min(2 * self._pause, LAST_PAUSE)
        if isinstance(failure, ProblemError) and failure.retry_after is not None:
            pause += failure.retry_after
        last = self._left == 0 or self._clock() + pause + SHORTEST_TRY > self._end
        if last or not _worth_another(failure):
            raise failure from (error if failure is not error else error.__cause__)
        return pause


class Looks:
    """The looks at a job that is waited for. After each, `pause_after` says how long until the next, or that it was the
    last: when the time is over there is one more.
    """

    def __init__(self, timeout: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`timeout` in seconds bounds them all together; None: for as long as it takes."""
        self._clock = clock
        self._end = None if timeout is None else clock() + timeout

    @property
    def seconds(self) -> float | None:
        """What is left of the time; None where it has no end."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def pause_after(self, job: Job) -> float:
        """Seconds until the next look. Raises `DeadlineError` where this was the last."""
        pause = POLL if job.retry_after is None else job.retry_after
        left = self.seconds
        if left is None:
            return pause
        if left < SHORTEST_TRY:
            raise DeadlineError(504, "", f"the job is still {job.state}")
        return min(pause, left)


def _as_client_error(error: Exception) -> ClientError:
    if isinstance(error, ClientError):
        return error
    if isinstance(error, httpx.LocalProtocolError):
        return ClientError(f"cannot be sent: {error}")
    if isinstance(error, httpx.TimeoutException | TimeoutError) and not isinstance(error, httpx.ConnectTimeout):
        return DeadlineError(504, "", "the service did not answer in time")
    return UnreachableError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _worth_another(failure: ClientError) -> bool:
    if isinstance(failure, DeadlineError):
        # The service's own deadline was the caller's wish; a gateway's says only that nobody answered it.
        return not failure.code
    return isinstance(failure, UnreachableError | QuotaError | BusyError)


class Remaining(dict[str, float]):
    """httpx's timeouts, each of them what is left of the time when it begins to count: so they do not add up."""

    def __init__(self, tries: Tries) -> None:
        super().__init__()
        self._tries = tries

    def get(self, key: str, default: Any = None) -> Any:
        return min(CONNECT, self._tries.seconds) if key == "connect" else self._tries.seconds


def sending(call: Call, tries: Tries) -> dict[str, Any]:
    """What httpx's `request` and `stream` take beside method and path."""
    return {
        "content": call.content,
        "params": call.params,
        "headers": call.headers,
        "extensions": {"timeout": Remaining(tries)},
    }


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
