"""What the model answers: regions that were looked at, words with their exits, and the caption they make.

No torch in here, so that the HTTP front can name these types without loading it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from model.exits import ResolvedSpeed, paper_speedup


@dataclass(frozen=True)
class Regions:
    """What the extractor saw in one image, salient things first."""

    boxes: np.ndarray  # float32 (R, 4): x0, y0, x1, y1 relative to the image, 0 to 1
    features: np.ndarray  # float32 (R, F)


@dataclass(frozen=True)
class Word:
    """One decoding step; the last one's text is `""` where the caption ended by EOS."""

    text: str
    exit_layer: int  # 1 to N
    entropy: float  # nats, of the distribution it was drawn from
    log_probability: float  # nats


@dataclass(frozen=True)
class Caption:
    """A caption and how it came about. `steps` includes the one that emitted EOS; `words` does not."""

    steps: tuple[Word, ...]
    speed: ResolvedSpeed
    layers: int  # N of the decoder that made it

    @property
    def words(self) -> tuple[Word, ...]:
        return tuple(step for step in self.steps if step.text)

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def confidence(self) -> float:
        """Geometric mean of the steps' probabilities, 0 to 1."""
        total = sum(step.log_probability for step in self.steps)
        return math.exp(total / len(self.steps)) if self.steps else 0.0

    @property
    def speedup(self) -> float:
        """Of this caption, by the paper's formula."""
        return paper_speedup([step.exit_layer for step in self.steps], self.layers)
