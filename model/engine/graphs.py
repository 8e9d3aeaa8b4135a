"""CUDA graphs: a pass's hundred kernels, launched as one.

A graph replays the kernels of its capture on the memory they had then; nothing of Python runs again. So what is
captured reads and writes static buffers only, takes its numbers from tensors, and never asks the device for one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Work = Callable[[], tuple[Tensor, ...]]
Prepare = Callable[[Work], Work]  # makes of a pass something that does the same, perhaps faster

# cuDNN's attention plans on the host whatever shape it has not met, and flash attention takes no mask.
ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WARM_UPS = 2  # runs before a capture, in which libraries choose their kernels and take their workspaces


def as_it_is(work: Work) -> Work:
    """What a CPU does, which has no graphs."""
    return work


class Graphs:
    """Captures passes. One memory pool for all: what a replay gives is good until the next replay of any of them.

    Passes are run for their capture, so their buffers must be fit for that, and whatever they write be of no use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # the default stream cannot be captured

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), sdpa_kernel(ATTENTION):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    work()
            current.wait_stream(self._stream)
            # Not the default, under which whatever another thread allocates meanwhile spoils the capture.
            how = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=how):
                given = work()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return given

        return replay
