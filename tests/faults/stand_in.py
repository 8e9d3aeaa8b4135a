"""A captioner that sleeps as long as a model would work, and says which photo it saw; and the photos that it can tell.

A photo carries a number, what shall happen to whoever looks at it, and how long that takes, as black and white blocks
that survive any JPEG. So a caption proves that its own photo went all the way.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

from model.caption import Regions, Word
from tests.service.fakes import LAYERS, InMaking, MadeUpCaptioner

Kind = Literal["good", "raises", "deadly", "slow"]
KINDS: tuple[Kind, ...] = ("good", "raises", "deadly", "slow")
BLOCK = 8  # pixels: JPEG's own block, so that neighbours do not leak
BITS = {"mark": 4, "number": 20, "kind": 2, "ms": 6}  # 32 in all: two rows of 16 blocks
MARK = 0b1010  # no canary begins with it
PER_ROW = 16
STEPS = 7  # of a caption: its six words, and the end
SLOW_STEP = 0.2  # seconds, of a slow photo's caption
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


class StandIn(MadeUpCaptioner):
    """Looks take `look` seconds a photo, and all steps of a caption together `words` seconds, beside how many others.

    So it does as much per second in batches as one by one, which is about how a model on a processor behaves, and its
    capacity is known: one caption in `look + words` seconds.

    With `early_exit` words leave early, as the promised SpeedUp has it, and take that much less time; else at layer 1,
    at any speed, in the same time.

    Set `hangs` and its next step never ends. `on_work` hears of each piece of work, by time.monotonic().
    """

    name = "stand-in"
    revision = "57a9d1057a9d"
    extractor_revision = "57a9d10e7ac7"

    def __init__(
        self,
        look: float,
        words: float,
        on_work: Callable[[float, float], None] = lambda *_: None,
        early_exit: bool = False,
    ) -> None:
        super().__init__()
        self._early_exit = early_exit
        self.hangs = threading.Event()
        self._look, self._words, self._on_work = look, words, on_work
        self._worked: dict[InMaking, float] = {}  # seconds that the model has worked on each

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
        return [Regions(box, np.array([[number, kind, took]])) for number, kind in zip(numbers, kinds, strict=True)]

    def words_of(self, each: InMaking) -> tuple[Word, ...]:
        number, _, _ = _photo_of(each)
        said = f"{caption_of(number, each.speed.tau, each.beam)} model {self._worked.get(each, 0.0) * 1e6:.0f}"
        layer = round(LAYERS / self._speedup(each)) if self._early_exit else 1
        return tuple(Word(word, layer, 0.5, -0.1) for word in [*said.split(), ""])

    def words_so_far(self, ticket: int, begin: int = 0) -> tuple[Word, ...]:
        """Not the last, the time that it all took: that is known at the end."""
        return super().words_so_far(ticket, begin)[: max(0, STEPS - 2 - begin)]

    def steps_of(self, each: InMaking) -> int:
        """No canary costs anything."""
        number, _, _ = _photo_of(each)
        return STEPS if number else 1

    def step(self) -> None:
        photos = {each: _photo_of(each) for each in self.making.values()}
        real = {each: photo for each, photo in photos.items() if photo[0]}
        while self.hangs.is_set() and real:
            time.sleep(1)
        slow = KINDS.index("slow")
        usual = {each: self._words / STEPS / self._speedup(each) for each in real}
        took = self._work(sum(SLOW_STEP if kind == slow else usual[each] for each, (_, kind, _) in real.items()))
        for each, (_, _, looked) in real.items():
            self._worked[each] = self._worked.get(each, looked) + took
        super().step()
        self._worked = {each: seconds for each, seconds in self._worked.items() if each in self.making.values()}

    def reset(self) -> None:
        super().reset()
        self._worked.clear()

    def _speedup(self, each: InMaking) -> float:
        return each.speed.promised if self._early_exit else 1.0

    def _work(self, seconds: float) -> float:
        """Sleeps, and returns how long that took."""
        if not seconds:
            return 0.0
        begin = time.monotonic()
        time.sleep(seconds)
        end = time.monotonic()
        self._on_work(begin, end)
        return end - begin


def _photo_of(each: InMaking) -> tuple[int, int, float]:
    """Number, kind and seconds that the look took."""
    number, kind, took = each.regions.features[0].tolist()
    return int(number), int(kind), took
