"""How many cores this process may use: what a container's limit leaves of the machine's."""

from __future__ import annotations

import math
import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: quota and period in microseconds, or "max"


def available_cores(cpu_max: Path = CPU_MAX) -> int:
    """At least 1. Libraries count the machine's cores, and in a small container start many more threads than it has."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
        limit = math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or no limit
        return affinity
    return max(1, min(affinity, limit))
