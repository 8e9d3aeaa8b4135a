"""A captioner without a network, and a runner for the command line: the commands are tested, not the model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from model.caption import Caption, Regions, Word
from model.captioner import Captioner
from model.exits import SpeedRow, SpeedTable
from service.cli import app


class FakeCaptioner:
    """Says how wide the picture is, in two words and an end that leave at layers 1, 2 and 3."""

    name = "fake"
    revision = "0123456789ab"
    layers = 6
    device = "cpu"
    sufficient_side = 0
    speeds = SpeedTable(
        rows=(SpeedRow(0.0, 1.0, 1.0, 50.0, 10.0), SpeedRow(4.0, 5.0, 3.0, 48.0, 5.0)),
        tiers={"full": 0.0, "balanced": 1.0, "fast": 2.0, "turbo": 3.0},
    )

    def __init__(self) -> None:
        self.seen: list[int] = []  # widths in pixels, in order
        self.beams: list[int] = []

    def look(self, image: Image.Image) -> Regions:
        self.seen.append(image.width)
        return Regions(np.zeros((1, 4), np.float32), np.full((1, 1), image.width, np.float32))

    def describe(
        self, regions: Regions, speed: str | float | None = None, *, tau: float | None = None, beam: int = 1
    ) -> Caption:
        self.beams.append(beam)
        texts = ("width", str(int(regions.features[0, 0])), "")
        steps = tuple(Word(text, layer, 0.5, math.log(0.5)) for layer, text in enumerate(texts, start=1))
        return Caption(steps, self.speeds.resolve(speed, tau), self.layers)


@pytest.fixture
def captioner(monkeypatch: pytest.MonkeyPatch) -> FakeCaptioner:
    """The captioner that every command of this test gets, whatever bundle it asks for."""
    fake = FakeCaptioner()
    monkeypatch.setattr(Captioner, "load", classmethod(lambda cls, *_, **__: fake))
    return fake


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`command("caption", "x.jpg")` runs `deecap caption x.jpg` where no setting of ours is in the environment."""
    for name in [name for name in os.environ if name.startswith("DEECAP_")]:
        monkeypatch.delenv(name)

    def run(*words: str | Path) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., list[Path]]:
    """`photos(30, 40)` saves PNG files named by their widths in pixels into one folder."""

    def save(*widths: int) -> list[Path]:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{width}.png" for width in widths]
        for path, width in zip(paths, widths, strict=True):
            Image.new("RGB", (width, 20), "green").save(path)
        return paths

    return save
