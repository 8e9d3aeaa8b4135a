"""What the engine runs in: number types, and the backend that has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.deecap import DeeCap
from model.engine.backend import Backend

PRECISIONS = ("int8", "float32", "bfloat16", "float64")


@dataclass(frozen=True)
class Precision:
    """`int8`: int8 weights, float32 elsewhere, CPU only. `float64` is for holding the engine to the plain decoder."""

    name: str
    device: str

    def backend(self, model: DeeCap, tested: Sequence[int], slots: int) -> Backend:
        """ONNX Runtime on a CPU, where it takes a third of eager PyTorch's time; PyTorch for all else."""
        if self.device == "cpu" and self.name in ("int8", "float32"):
            from model.engine.onnx_backend import OnnxBackend  # here: a GPU machine has no need of it

            return OnnxBackend(model, tested, slots, self.name == "int8")
        from model.engine.torch_backend import TorchBackend

        return TorchBackend(model, tested, slots, getattr(torch, self.name), self.device)


def choose_precision(device: str, name: str | None = None) -> Precision:
    """The precision of a name, by default the device's fastest: int8 on a CPU, bfloat16 on a GPU.

    bfloat16 on a CPU is for trials: its others are faster. Raises `ValueError` for another name, or int8 on a GPU.
    """
    on_cpu = torch.device(device).type == "cpu"
    chosen = name or ("int8" if on_cpu else "bfloat16")
    if chosen not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {chosen!r}")
    if chosen == "int8" and not on_cpu:
        raise ValueError("int8 weights run on a CPU only")
    return Precision(chosen, "cpu" if on_cpu else device)
