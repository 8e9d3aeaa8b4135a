"""Clients that send photos at a rate, whatever becomes of them, and the verdict on what came back."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import httpx

from service.errors import KINDS
from tests.faults.stand_in import Kind, caption_of, photo
from tests.service.fakes import SPEEDS

SPEED_NAMES = ("balanced", "full", "fast", "turbo")
EMPTY: Mapping[str, object] = {}
DEADLINE = 20.0  # seconds that a request may take: far more than any fault here lasts
MARGIN = 3.0  # seconds after the deadline in which the answer must be here; later it counts as none
_numbers = itertools.count(1)  # each photo differs from all others of this run


@dataclass(eq=False)
class Sent:
    """One request, and what became of it."""

    number: int
    kind: Kind
    speed: str
    at: float  # by time.monotonic()
    took: float = 0.0  # seconds
    status: int = 0  # 0: no answer
    code: str = ""  # of the problem; "ok" where there is a caption
    caption: str = ""
    depth: float = 0.0  # mean layer at which the caption's words left
    retry_after: str = ""
    error: str = ""  # why there is no answer
    hung_up: bool = False  # this client did not wait for it
    may_be_faster: bool = False  # this client allows other speeds than its own

    @property
    def answered(self) -> bool:
        """With the caption of its own photo, at the speed that it asked for unless it allows others."""
        own = f"photo {self.number}" if self.may_be_faster else caption_of(self.number, SPEEDS.resolve(self.speed).tau)
        return self.status == 200 and self.caption.startswith(own + " ")

    def __str__(self) -> str:
        what = self.caption or self.error or "nothing"
        code = f" {self.code}" if self.code else ""
        who = f"{self.kind} photo {self.number} at {self.speed}"
        return f"{who}: {self.status or 'no answer'}{code} ({what}) after {self.took:.2f} s"


@dataclass
class Load:
    """`async with`: leaving it waits for every answer. All clients share `all`."""

    address: str
    all: list[Sent] = field(default_factory=list)
    on_sent: Callable[[], None] = lambda: None

    async def __aenter__(self) -> Load:
        # Kept for less time than the server keeps them: else one could be closed just while it is used again.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=50, keepalive_expiry=2.0)
        self._client = httpx.AsyncClient(base_url=self.address, limits=limits, timeout=DEADLINE + MARGIN)
        self._tasks: set[asyncio.Task[None]] = set()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is not None:
            self.hang_up()
        await self.answers()
        await self._client.aclose()

    def send(self, kind: Kind = "good", *, ms: int = 0, **options: object) -> Sent:
        number = next(_numbers)
        speed = str(options.get("speed", SPEED_NAMES[number % len(SPEED_NAMES)]))
        sent = Sent(number, kind, speed, time.monotonic(), may_be_faster="max_speed" in options)
        self.all.append(sent)
        task = asyncio.create_task(self._send(sent, photo(number, kind, ms), options), name=str(number))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return sent

    def burst(self, count: int, **options: object) -> list[Sent]:
        return [self.send(**options) for _ in range(count)]

    async def run(
        self, per_second: float, seconds: float, every_other: Mapping[str, object] = EMPTY, **options: object
    ) -> None:
        """Open loop: evenly, however slow the answers are. Where this process was late, it catches up.

        `every_other`: further options, of every second request.
        """
        begin = time.monotonic()
        for count in range(round(per_second * seconds)):
            await asyncio.sleep(begin + count / per_second - time.monotonic())
            self.send(**options, **(every_other if count % 2 else EMPTY))
        await asyncio.sleep(begin + seconds - time.monotonic())

    async def answers(self) -> None:
        """Waits until all that was sent has ended, which takes the deadline and a margin at most."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def hang_up(self, those: Collection[Sent] | None = None) -> None:
        """Closes the connections of those clients, by default of all."""
        numbers = None if those is None else {str(sent.number) for sent in those}
        for task in list(self._tasks):
            if numbers is None or task.get_name() in numbers:
                task.cancel()

    async def _send(self, sent: Sent, image: bytes, options: dict[str, object]) -> None:
        parameters = {"speed": sent.speed, "timeout_ms": round(DEADLINE * 1000), **options}
        try:
            response = await self._client.post("/v1/caption", content=image, params=parameters)
            sent.status = response.status_code
            document = response.json()
            sent.caption, sent.code = document.get("caption", ""), document.get("code", "ok")
            if words := document.get("words"):
                sent.depth = sum(word["exit_layer"] for word in words) / len(words)
            sent.retry_after = response.headers.get("Retry-After", "")
        except asyncio.CancelledError:
            sent.hung_up = True
        except (httpx.TransportError, ValueError) as error:
            sent.error = repr(error)
        finally:
            sent.took = time.monotonic() - sent.at


def codes(those: Iterable[Sent]) -> Counter[str]:
    return Counter("hung_up" if sent.hung_up else sent.code or "no answer" for sent in those)


def listed(those: Collection[Sent], what: str) -> str:
    """For a message: how many, and the first ten."""
    first = "\n  ".join(map(str, list(those)[:10]))
    return f"{len(those)} {what}:\n  {first}"


def assert_all_answered(those: Collection[Sent], but: Collection[str] = ()) -> None:
    """Every one has its own caption, except those that were refused, in order, with one of the codes `but`."""
    assert those, "nothing was sent: the test shows nothing"
    lost = [sent for sent in those if not sent.answered and sent.code not in but]
    assert not lost, listed(lost, f"of {len(those)} lost (all: {dict(codes(those))})")
    for sent in those:
        assert_in_order(sent)


def assert_in_order(sent: Sent) -> None:
    """Where it was refused: as documented, with Retry-After where another try may help."""
    if not sent.answered:
        assert sent.code in KINDS, f"no documented refusal: {sent}"
        assert sent.status == KINDS[sent.code].status, f"the status does not go with the code: {sent}"
        if sent.status in (429, 503):
            assert sent.retry_after.isdecimal(), f"no Retry-After (but {sent.retry_after!r}): {sent}"
            assert 1 <= int(sent.retry_after) <= 60, f"Retry-After {sent.retry_after}: {sent}"
