"""What training can do on this machine and what it does: the faster type of number, and operations per second."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDES = {"cpu": 512, "cuda": 8192}  # of the square matrices whose product stands for the most that a machine can do
MEASURED_SECONDS = 0.1  # of each type, or one product
TYPES = (torch.float32, torch.bfloat16)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Machine:
    """What one device multiplies matrices at."""

    dtype: torch.dtype  # float32 or bfloat16, whichever is faster
    flops: float  # operations per second in it, a multiplication and an addition being two

    def autocast(self, device: torch.device) -> torch.autocast:
        """bfloat16 where it is faster: a processor that has to imitate it is a hundred times slower with it."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


@functools.cache
def machine(device: torch.device) -> Machine:
    """Measured once in a process, in a fraction of a second."""
    flops = {dtype: _matmul_flops(device, dtype) for dtype in TYPES}
    fastest = max(TYPES, key=flops.__getitem__)
    return Machine(fastest, flops[fastest])


def count_flops(work: Callable[[], Result]) -> tuple[Result, int]:
    """What `work` returns, and the operations of its matrix products and convolutions, those of gradients included.

    What goes element by element does not count.
    """
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, int(counter.get_total_flops())


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDES[device.type]
    a = torch.ones(side, side, device=device, dtype=dtype)
    _product(a[: side // 8])  # the first takes longer: kernels are chosen, pages come
    best, end = float("inf"), time.monotonic() + MEASURED_SECONDS
    while best == float("inf") or time.monotonic() < end:
        started = time.monotonic()
        _product(a)
        best = min(best, time.monotonic() - started)
    return 2 * side**3 / best


def _product(a: torch.Tensor) -> None:
    (a @ a.T)[0, 0].item()  # a GPU's products are over long after they were asked for; their numbers are not
