"""Writes checkpoints so that an interrupted run leaves the last whole one behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_whole(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)
