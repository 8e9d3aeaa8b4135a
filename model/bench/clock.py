"""Milliseconds on a machine that others use too: what is compared takes turns, and each figure is a median."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm


def now(device: str) -> float:
    """Seconds, once the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(work: Callable[[], object], device: str) -> float:
    """How long `work` takes, once."""
    started = now(device)
    work()
    return (now(device) - started) * 1000


def take_turns(
    rows: Mapping[str, Callable[[int], object]], items: int, rounds: int, device: str, what: str
) -> dict[str, np.ndarray]:
    """Milliseconds of each row for each item `(items,)`: the median over `rounds`.

    Every item is given to all rows before the next one, so that whatever else the machine does hits all alike; the
    order rotates, so that no row always follows the same one. Each row is run once beforehand, unmeasured.
    """
    names = list(rows)
    times = {name: np.zeros((rounds, items)) for name in names}
    for work in rows.values():
        work(0)
    for turn in tqdm(range(rounds * items), desc=what, leave=False):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            work, item = rows[name], turn % items
            started = now(device)
            work(item)
            times[name][turn // items, item] = (now(device) - started) * 1000
    return {name: np.median(taken, axis=0) for name, taken in times.items()}


def spread(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """`p50`, `p95` (linear between neighbours) and `mean` of at least one value, in its unit."""
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "mean": float(np.mean(values))}
