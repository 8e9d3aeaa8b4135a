"""A captioner without a network: it says what it was shown, so that tests can see what reached the model."""

from __future__ import annotations

import threading

import numpy as np
from PIL import Image

from model.caption import Caption, Regions, Word
from model.exits import TIERS, SpeedRow, SpeedTable

LAYERS = 6
SPEEDS = SpeedTable(
    rows=tuple(SpeedRow(tau, 1.0 + tau, 1.0 + tau / 2, 50.0 - tau, 20.0 - tau) for tau in (0.0, 1.0, 2.0, 3.0, 3.5)),
    tiers={name: target - 1.0 for name, target in TIERS.items()},
    measured={"split": "made up"},
)


class FakeCaptioner:
    """Every caption is `<brightness> <width> <height>` of the picture it looked at.

    Clear `go` to hold it inside `look`; `fails` is raised by the next `look`s.
    """

    name = "fake"
    revision = "0123456789ab"
    layers = LAYERS
    device = "cpu"
    speeds = SPEEDS
    vocabulary_size = 3

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.looking = threading.Event()
        self.fails: Exception | None = None
        self.looked: list[tuple[int, int]] = []
        self.described: list[tuple[object, object, int]] = []
        self.threads: set[str] = set()

    def look(self, image: Image.Image) -> Regions:
        self.threads.add(threading.current_thread().name)
        self.looking.set()
        assert self.go.wait(10)
        if self.fails is not None:
            raise self.fails
        self.looked.append(image.size)
        brightness = float(np.asarray(image.convert("L")).mean())
        features = np.array([[brightness, *image.size], [0, 0, 0]], np.float32)
        return Regions(np.array([[0, 0, 1, 1], [0.25, 0.5, 0.75, 1]], np.float32), features)

    def describe(
        self, regions: Regions, speed: str | float | None = None, *, tau: float | None = None, beam: int = 1
    ) -> Caption:
        self.described.append((speed, tau, beam))
        words = [str(round(number)) for number in regions.features[0].tolist()]
        exits = (1, 3, 2, 6)
        steps = tuple(Word(text, m, 0.5 * m, -0.1) for text, m in zip([*words, ""], exits, strict=True))
        return Caption(steps, self.speeds.resolve(speed, tau), self.layers)
