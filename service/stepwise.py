"""What a worker uses of a captioner, so that tests can put another in its place, and how the real one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from model.caption import Caption, Regions, Word
from model.exits import ResolvedSpeed, SpeedTable
from service.jobs import ModelInfo
from service.settings import Settings


class StepwiseCaptioner(Protocol):
    """What the model thread uses of `model.captioner.Captioner`, which says what each does."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str: ...

    @property
    def extractor_revision(self) -> str: ...

    @property
    def layers(self) -> int: ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def speeds(self) -> SpeedTable: ...

    @property
    def device(self) -> str: ...

    @property
    def slots(self) -> int: ...

    @property
    def free(self) -> int: ...

    @property
    def busy(self) -> bool: ...

    @property
    def sufficient_side(self) -> int: ...

    def prepare(self, image: Image.Image) -> np.ndarray: ...

    def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]: ...

    def begin(
        self,
        batch: Sequence[Regions],
        speeds: Sequence[ResolvedSpeed],
        beams: Sequence[int],
        deadlines: Sequence[float],
    ) -> list[int]: ...

    def cancel(self, ticket: int) -> None: ...

    def step(self) -> None: ...

    def words_so_far(self, ticket: int, begin: int = 0) -> tuple[Word, ...]: ...

    def finished(self) -> list[tuple[int, Caption | str]]: ...

    def attention(self, regions: Regions, caption: Caption) -> tuple[tuple[float, ...], ...]: ...

    def reset(self) -> None: ...


def bundle_loader(settings: Settings) -> Callable[[], StepwiseCaptioner]:
    """Loads the settings' bundle, and warms it up, when called."""

    def load() -> StepwiseCaptioner:
        from model.captioner import Captioner  # here and not above: it imports torch

        precision = None if settings.precision == "auto" else settings.precision
        captioner = Captioner.load(settings.bundle, settings.device, precision, settings.threads)
        captioner.warm_up()
        return captioner

    return load


def model_info(captioner: StepwiseCaptioner) -> ModelInfo:
    """What a worker with this captioner serves."""
    return ModelInfo(
        name=captioner.name,
        revision=captioner.revision,
        layers=captioner.layers,
        device=captioner.device,
        speeds=captioner.speeds,
        vocabulary_size=captioner.vocabulary_size,
    )


def caption_alone(captioner: StepwiseCaptioner, regions: Regions, speed: ResolvedSpeed, beam: int) -> Caption:
    """One caption with nothing else in the making. Raises what the captioner raises."""
    captioner.begin([regions], [speed], [beam], [float("inf")])
    while captioner.busy:
        captioner.step()
    [(_, caption)] = captioner.finished()
    assert isinstance(caption, Caption)
    return caption


def caption_canary(captioner: StepwiseCaptioner) -> None:
    """Captions a grey ramp: if that goes through, so will photos. Raises what the captioner raises."""
    [regions] = captioner.look_at_pixels(captioner.prepare(Image.linear_gradient("L"))[None])
    caption_alone(captioner, regions, captioner.speeds.resolve(), 1)
