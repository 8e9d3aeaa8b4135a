"""How long a photo takes from its file's bytes to its regions: one at a time, and several at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from model.bench.clock import milliseconds, spread
from model.bench.ours import decode_image
from model.captioner import Captioner

TOGETHER = {"cpu": (1, 8), "cuda": (1, 8, 64)}  # photos


def measure_looking(captioner: Captioner, photos: Sequence[bytes], count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a photo (`p50`, `p95`, `mean`), decoding included, by how many are looked at together.

    `count` photos a round, repeated where there are fewer. Several at once only where the extractor can stack them.
    """

    def look(batch: Sequence[bytes]) -> None:
        pixels = [captioner.prepare(decode_image(data, captioner.sufficient_side)) for data in batch]
        captioner.look_at_pixels(np.stack(pixels))

    stacked = len({captioner.prepare(decode_image(data, captioner.sufficient_side)).shape for data in photos}) == 1
    found: dict[str, Any] = {}
    for size in TOGETHER[captioner.device] if stacked else (1,):
        batches = [
            [photos[(first + more) % len(photos)] for more in range(size)]
            for first in range(0, max(count, size) - size + 1, size)
        ]
        look(batches[0])  # the first run of a size is slow
        times = [milliseconds(partial(look, batch), captioner.device) for batch in batches * rounds]
        found[str(size)] = spread([taken / size for taken in times])
    return found
