"""What crosses between host and device around a pass: one copy in, one copy out, one wait.

On a GPU the host's side is pinned, so that copies wait for nothing; on a CPU both sides are one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Inbox:
    """Whole numbers for the device: a line for each kind, a column for each row of a pass."""

    def __init__(self, fill: Sequence[int], columns: int, device: torch.device) -> None:
        """`fill`: what columns without a row hold, of each kind."""
        self._fill = np.array(fill)[:, None]
        self._on_gpu = device.type == "cuda"
        self._host = torch.zeros(len(fill), columns, dtype=torch.int64, pin_memory=self._on_gpu)
        self._array = self._host.numpy()
        self.tensor = torch.zeros(self._host.shape, dtype=torch.int64, device=device) if self._on_gpu else self._host
        self._sent = torch.cuda.Event() if self._on_gpu else None

    def send(self, *lines: np.ndarray) -> None:
        """Lines of one length, which is at most `columns`."""
        if self._sent:
            self._sent.synchronize()  # the copy before reads from the same memory
        count = len(lines[0])
        for target, line in zip(self._array, lines, strict=True):
            target[:count] = line
        self._array[:, count:] = self._fill
        if self._sent:
            self.tensor.copy_(self._host, non_blocking=True)
            self._sent.record()

    def clear(self) -> None:
        """All columns without a row."""
        self.send(*[np.zeros(0, dtype=np.int64)] * len(self._fill))


class Outbox:
    """What the last pass decided, on its way to the host."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host = torch.zeros(rows, columns, dtype=dtype, pin_memory=self._on_gpu)
        self._came = torch.cuda.Event() if self._on_gpu else None

    def take(self, found: Tensor) -> None:
        """`found (G, columns)`, G at most `rows`. Returns before it is there."""
        if self._came:
            self._host[: len(found)].copy_(found, non_blocking=True)
            self._came.record()
        else:
            self._host = found

    def read(self, rows: int) -> np.ndarray:
        """The first rows of what was taken last, once they are there."""
        if self._came:
            self._came.synchronize()
        return self._host[:rows].numpy()
