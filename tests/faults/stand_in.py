"""A captioner that sleeps as long as a model would work, and says which photo it saw; and the photos that it can tell.

A photo carries a number, what shall happen to whoever looks at it, and how long that takes, as black and white blocks
that survive any JPEG. So a caption proves that its own photo went all the way.
"""

from __future__ import annotations

import io
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from model.caption import Caption, Regions, Word
from model.exits import ResolvedSpeed
from tests.service.fakes import LAYERS, SPEEDS

Kind = Literal["good", "raises", "deadly"]
KINDS: tuple[Kind, ...] = ("good", "raises", "deadly")
BLOCK = 8  # pixels: JPEG's own block, so that neighbours do not leak
BITS = {"mark": 4, "number": 20, "kind": 2, "ms": 6}  # 32 in all: two rows of 16 blocks
MARK = 0b1010  # no canary begins with it
PER_ROW = 16
DEADLY_STATUS = 66  # what the process exits with


def photo(number: int, kind: Kind = "good", ms: int = 0, size: tuple[int, int] = (128, 96), grain: int = 0) -> bytes:
    """A JPEG. `number` below 2**20; `ms`, below 64: what the look at it takes, times ten; 0: the captioner's own.

    `grain`: levels of noise in each pixel. 40 makes it as large as a photo of its size is.
    """
    values = {"mark": MARK, "number": number, "kind": KINDS.index(kind), "ms": ms}
    bits = "".join(f"{values[name]:0{width}b}" for name, width in BITS.items())
    assert len(bits) == 2 * PER_ROW, values
    random = np.random.default_rng(number)
    noise = random.integers(0, 256 - grain, (size[1] // BLOCK, size[0] // BLOCK), np.uint8)
    pixels = np.kron(noise, np.ones((BLOCK, BLOCK), np.uint8))
    if grain:
        pixels += random.integers(0, grain, pixels.shape, np.uint8)
    rows = np.array([int(bit) * 255 for bit in bits], np.uint8).reshape(2, PER_ROW)
    pixels[: 2 * BLOCK, : PER_ROW * BLOCK] = np.kron(rows, np.ones((BLOCK, BLOCK), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def read(image: Image.Image) -> tuple[int, int, int]:
    """Number, kind (its place in `KINDS`) and milliseconds of a photo; zeros for any other picture."""
    pixels = np.asarray(image.convert("L"))
    centres = pixels[BLOCK // 2 : 2 * BLOCK : BLOCK, BLOCK // 2 : PER_ROW * BLOCK : BLOCK]
    bits = "".join("1" if value > 127 else "0" for value in centres.ravel())
    values = {}
    for name, width in BITS.items():
        values[name], bits = int(bits[:width], 2), bits[width:]
    if values["mark"] != MARK:
        return 0, 0, 0
    return values["number"], values["kind"], 10 * values["ms"]


def caption_of(number: int, tau: float, beam: int = 1) -> str:
    """How the caption of a photo begins; the microseconds that the model took follow."""
    return f"photo {number} tau{tau:g} beam{beam}"


@dataclass
class _InMaking:
    number: int
    speed: ResolvedSpeed
    beam: int
    deadline: float
    seconds: float  # that the model has worked on it
    steps: int = 0


class StandIn:
    """Looks take `look` seconds a photo, and all steps of a caption together `words` seconds, beside how many others.

    So it does as much per second in batches as one by one, which is about how a model on a processor behaves, and its
    capacity is known: one caption in `look + words` seconds.

    Set `hangs` and its next step never ends. `on_work` hears of each piece of work, by time.monotonic().
    """

    name = "stand-in"
    revision = "57a9d1057a9d"
    extractor_revision = "57a9d10e7ac7"
    layers = LAYERS
    device = "cpu"
    vocabulary_size = 3
    speeds = SPEEDS
    slots = 8

    def __init__(
        self, look: float, words: float, steps: int = 6, on_work: Callable[[float, float], None] = lambda *_: None
    ) -> None:
        self.hangs = threading.Event()
        self._look, self._words, self._steps, self._on_work = look, words, steps, on_work
        self._tickets = itertools.count(1)
        self._making: dict[int, _InMaking] = {}
        self._over: list[tuple[int, Caption | str]] = []

    @property
    def free(self) -> int:
        return self.slots - sum(each.beam for each in self._making.values())

    @property
    def busy(self) -> bool:
        return bool(self._making)

    def prepare(self, image: Image.Image) -> np.ndarray:
        return np.array(read(image))

    def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]:
        numbers, kinds, milliseconds = pixels.T.tolist()
        if KINDS.index("deadly") in kinds:
            os._exit(DEADLY_STATUS)
        if KINDS.index("raises") in kinds:
            raise RuntimeError("made up: nobody can look at this")
        looks = [ms / 1000 or self._look for number, ms in zip(numbers, milliseconds, strict=True) if number]
        took = self._work(sum(looks))
        box = np.array([[0, 0, 1, 1]], np.float32)
        return [Regions(box, np.array([[number, took]])) for number in numbers]

    def begin(
        self,
        batch: Sequence[Regions],
        speeds: Sequence[ResolvedSpeed],
        beams: Sequence[int],
        deadlines: Sequence[float],
    ) -> list[int]:
        tickets = []
        for regions, speed, beam, deadline in zip(batch, speeds, beams, deadlines, strict=True):
            number, took = regions.features[0].tolist()
            tickets.append(next(self._tickets))
            self._making[tickets[-1]] = _InMaking(int(number), speed, beam, deadline, took)
        assert self.free >= 0, "more was begun than there are slots"
        return tickets

    def cancel(self, ticket: int) -> None:
        self._making.pop(ticket, None)

    def step(self) -> None:
        while self.hangs.is_set() and any(each.number for each in self._making.values()):
            time.sleep(1)
        took = self._work(sum(self._words / self._steps for each in self._making.values() if each.number))
        for ticket, each in list(self._making.items()):
            each.steps += 1
            each.seconds += took
            if each.deadline <= time.monotonic():
                self._over.append((ticket, "deadline"))
            elif each.steps == self._steps or not each.number:
                said = f"{caption_of(each.number, each.speed.tau, each.beam)} model {each.seconds * 1e6:.0f}"
                steps = tuple(Word(word, 1, 0.5, -0.1) for word in [*said.split(), ""])
                self._over.append((ticket, Caption(steps, each.speed, LAYERS)))
            else:
                continue
            del self._making[ticket]

    def finished(self) -> list[tuple[int, Caption | str]]:
        over, self._over = self._over, []
        return over

    def reset(self) -> None:
        self._making.clear()
        self._over.clear()

    def _work(self, seconds: float) -> float:
        """Sleeps, and returns how long that took."""
        if not seconds:
            return 0.0
        begin = time.monotonic()
        time.sleep(seconds)
        end = time.monotonic()
        self._on_work(begin, end)
        return end - begin
