"""Runs a graph from and into buffers that stay: for a GPU page-locked ones, which are copied without a detour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch

TYPES = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(uint8)": torch.uint8}


@dataclass(frozen=True)
class _Plan:
    """The buffers of one batch size, bound."""

    binding: Any
    pixels: np.ndarray
    outputs: list[np.ndarray]


class BoundSession:
    """A session with one input and outputs whose shapes are known but for the batch; for one thread at a time.

    Buffers are kept for each batch size that was asked for: a worker has few.
    """

    def __init__(self, session: onnxruntime.InferenceSession, pinned: bool) -> None:
        """`pinned`: page-locked memory, which takes a GPU."""
        self._session, self._pinned = session, pinned
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def run(self, pixels: np.ndarray) -> list[np.ndarray]:
        """uint8 `(B, ...)` -> the outputs, which are the caller's to keep."""
        plan = self._plans.get(pixels.shape) or self._plans.setdefault(pixels.shape, self._bind(pixels.shape))
        np.copyto(plan.pixels, pixels)
        self._session.run_with_iobinding(plan.binding)
        plan.binding.synchronize_outputs()
        return [output.copy() for output in plan.outputs]

    def _bind(self, shape: tuple[int, ...]) -> _Plan:
        binding = self._session.io_binding()
        (input_,) = self._session.get_inputs()
        pixels = self._buffer(shape, input_.type)
        binding.bind_input(input_.name, "cpu", 0, pixels.dtype.type, pixels.shape, pixels.ctypes.data)
        outputs = []
        for item in self._session.get_outputs():
            output = self._buffer((shape[0], *item.shape[1:]), item.type)
            binding.bind_output(item.name, "cpu", 0, output.dtype.type, output.shape, output.ctypes.data)
            outputs.append(output)
        return _Plan(binding, pixels, outputs)

    def _buffer(self, shape: tuple[int, ...], kind: str) -> np.ndarray:
        return torch.empty(shape, dtype=TYPES[kind], pin_memory=self._pinned).numpy()
