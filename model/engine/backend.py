"""The seam between the engine, which decides what runs, and the two ways of running it: PyTorch and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Decoder layers `first`..`last`, and whether the exit after the last of them is tested."""

    first: int
    last: int
    tested: bool


class Reached(Protocol):
    """What a pass came to, of its G rows. At an exit, the distribution over the next word there."""

    @property
    def decided(self) -> np.ndarray:
        """(G, 3): the likeliest word, the entropy in nats, and that word's log-probability."""

    @property
    def guesses(self) -> np.ndarray | None:
        """(G,), nats, where the network has an exit head."""

    def top(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest words of some rows, best first, and their log-probabilities: `(len(rows), count)` each."""


class Backend(Protocol):
    """Runs layers over what it keeps of every caption: keys, values and states, in rows called slots.

    The engine says which words run; a pass is G slots with T words each, the last of them the newest.
    """

    def encode(self, features: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        """Regions `(B, R, F)` with boxes `(B, R, 4)`, `mask (B, R)` True where a region is -> memory `(B, R, d)`."""

    def prepare(self, spans: Sequence[Span], copied: bool) -> None:
        """Makes now what the first passes over these spans would make; with `copied` what `copy_up` needs too."""

    def admit(self, slots: list[int], memory: Tensor) -> None:
        """An image, memory `(R, d)`, for each of its captions' slots."""

    def copy(self, to: np.ndarray, source: np.ndarray, regions: bool) -> None:
        """Slot `to[i]` becomes what slot `source[i]` was, all at once; without `regions`, but for its image."""

    def copy_up(self, span: Span, slots: np.ndarray, words: np.ndarray) -> None:
        """Keys and values, at the span's layers, of words `(M,)` of slots `(M,)`, from the states they left with."""

    def start(self, span: Span, slots: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> Any:
        """A span from layer 1 on: words `tokens (G,)` at `positions (G,)`. Returns a `Reached`."""

    def go_on(self, span: Span, slots: np.ndarray, words: np.ndarray, before: Any, rows: np.ndarray) -> Any:
        """A deeper span, for the `rows` of the pass `before` that stay; `words (G, T)` are their positions."""
