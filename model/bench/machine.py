"""What figures were measured on, for the reader of them; no names, no paths, no dates."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from model.threads import available_cores

PACKAGES = ("deecap", "torch", "onnxruntime", "onnxruntime-gpu", "numpy", "transformers")


def describe_machine(device: str) -> dict[str, Any]:
    """Device, processor, threads, how busy it was before, and versions."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": _processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "load_before": load,  # processes that wanted a core in the minute before: above 0, others were measured too
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
