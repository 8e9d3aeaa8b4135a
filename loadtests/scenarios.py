"""The scenarios: what arrives when. All are open loop: requests come at their times however slow the answers are.

A closed loop, where each client waits for its answer, slows down with the server and so hides how bad it is.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.answers import Expected, Verdict, judge, judge_mistake
from loadtests.photos import never_sent

TIERS = ("full", "balanced", "fast", "turbo")
MIX = {"full": 0.1, "balanced": 0.5, "fast": 0.2, "turbo": 0.1, "2.5": 0.1}  # what clients ask for, as we guess it


@dataclass(frozen=True)
class Request:
    """One request, and how to judge its answer. `hang_up`: close after so many bytes of the body."""

    name: str  # what it is counted under: its speed, or its mistake
    body: bytes
    query: str
    headers: Mapping[str, str]
    judge: Callable[[int, Mapping[str, str], bytes], Verdict]
    hang_up: int | None = None


Arrivals = Iterator[tuple[float, Request]]  # seconds after the beginning


@dataclass(frozen=True)
class World:
    """What there is to ask: photos, the captions they got one at a time, and the model's layers."""

    photos: Sequence[bytes]
    layers: int
    captions: Mapping[tuple[int, str], str] = field(default_factory=dict)  # photo's number and speed -> caption

    def request(self, number: int, speed: str, *, known: bool = False) -> Request:
        """A good one. `known`: with bytes that were sent before, or will be again."""
        number %= len(self.photos)
        request_id = uuid.uuid4().hex
        asked = speed if speed in TIERS else float(speed)
        expected = Expected(asked, self.layers, self.captions.get((number, speed)))
        return Request(
            speed,
            self.photos[number] if known else never_sent(self.photos[number]),
            f"speed={speed}",
            {"X-Request-ID": request_id, "Content-Type": "image/jpeg"},
            lambda status, headers, body: judge(status, headers, body, request_id, expected),
        )


def steady(world: World, speed: str, per_second: float, seconds: float) -> Arrivals:
    """One speed, one rate."""
    for number in range(int(per_second * seconds)):
        yield number / per_second, world.request(number, speed)


def mixed(world: World, per_second: float, seconds: float) -> Arrivals:
    """All speeds, at the times of a Poisson process: independent clients."""
    chance = random.Random(0)
    for number, due in enumerate(_poisson(chance, per_second, seconds)):
        yield due, world.request(number, chance.choices(list(MIX), list(MIX.values()))[0])


def spike(world: World, per_second: float, seconds: float) -> Arrivals:
    """A calm third, a third at four times the rate, and a third in which all must be as before."""
    third = seconds / 3
    for part, times in enumerate((1, 4, 1)):
        for due, request in steady(world, "balanced", per_second * times, third):
            yield part * third + due, request


def hot(world: World, per_second: float, seconds: float) -> Arrivals:
    """Four in five ask for one of four photos, at any speed: what a cache is for."""
    chance = random.Random(0)
    for number, due in enumerate(_poisson(chance, per_second, seconds)):
        popular = chance.random() < 0.8
        photo = chance.randrange(4) if popular else number
        yield due, world.request(photo, chance.choice(TIERS), known=popular)


def bad(world: World, per_second: float, seconds: float) -> Arrivals:
    """Half of the clients do something wrong, and the other half must not notice."""
    chance = random.Random(0)
    wrong = _mistakes(world.photos[0])
    for number, due in enumerate(_poisson(chance, per_second, seconds)):
        yield due, (wrong[number // 2 % len(wrong)] if number % 2 else world.request(number, "balanced"))


def _poisson(chance: random.Random, per_second: float, seconds: float) -> Iterator[float]:
    due = chance.expovariate(per_second)
    while due < seconds:
        yield due
        due += chance.expovariate(per_second)


def _mistakes(photo: bytes) -> list[Request]:
    def mistake(
        name: str, body: bytes, codes: str, query: str = "", kind: str = "", hang_up: int | None = None
    ) -> Request:
        headers = {"Content-Type": kind or "image/jpeg"}
        return Request(
            name, body, query, headers, lambda *answer: judge_mistake(*answer, tuple(codes.split())), hang_up
        )

    return [
        mistake("no photo", b"hello", "not_an_image"),
        mistake("nothing", b"", "empty_body"),
        mistake("half a photo", photo[: len(photo) // 2], "undecodable_image not_an_image"),
        mistake("no such speed", photo, "unknown_speed", "speed=warp"),
        mistake("no such option", photo, "unknown_option", "sped=fast"),
        mistake("too many beams", photo, "invalid_option", "beam=99"),
        mistake("not JSON", b"{", "malformed_json", kind="application/json"),
        mistake("not base64", json.dumps({"image": "%%%"}).encode(), "bad_base64", kind="application/json"),
        mistake("hangs up", photo, "", hang_up=len(photo) // 2),
        mistake("hangs up at once", photo, "", hang_up=0),
    ]
