"""The four strategies that fuse the states of several layers into one (paper section 3.2, equations 5 and 6).

Each is a module over a run of consecutive layers: `fusion(states, first)` takes the states of layers
`first, first+1, ...` (counted from 1), each `(..., d)`, and gives one `(..., d)`. Shallow and deep runs have
a module of their own. The states come in already normalised (a pre-norm stream grows with depth, and the
imitation's cosine loss says nothing of magnitude).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """The mean of the states."""

    def forward(self, states: Sequence[Tensor], first: int) -> Tensor:
        return torch.stack(list(states)).mean(0)

    def prefixes(self, states: Sequence[Tensor]) -> list[Tensor]:
        """What `forward(states[:m], 1)` gives, for m = 1..len(states)."""
        sums = torch.stack(list(states)).cumsum(0)
        return [total / (index + 1) for index, total in enumerate(sums)]


class Concatenation(nn.Module):
    """A linear map of the concatenated states, kept as one slice of weights per layer, summed.

    So the run may be of any length, and a growing one costs one product more per layer.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        # Start as an average would, so that the exits of a trained backbone start near its own states.
        start = torch.eye(width).expand(layers, width, width) / math.sqrt(layers)
        self.slices = nn.Parameter(start + torch.randn(layers, width, width) * (0.1 / math.sqrt(width * layers)))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, states: Sequence[Tensor], first: int) -> Tensor:
        total = self.bias
        for state, weights in zip(states, self.slices[first - 1 :], strict=False):
            total = total + state @ weights
        return total

    def prefixes(self, states: Sequence[Tensor]) -> list[Tensor]:
        fused, total = [], self.bias
        for state, weights in zip(states, self.slices, strict=False):
            total = total + state @ weights
            fused.append(total)
        return fused


class AttentionPooling(nn.Module):
    """A weighted sum of projected states, the last of the run being the query."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, states: Sequence[Tensor], first: int) -> Tensor:
        run = torch.stack(list(states), dim=-2)  # (..., layers, d)
        scores = self.key(run) @ self.query(states[-1]).unsqueeze(-1)  # (..., layers, 1)
        weights = (scores / math.sqrt(run.shape[-1])).softmax(-2)
        return (weights * self.value(run)).sum(-2)

    def prefixes(self, states: Sequence[Tensor]) -> list[Tensor]:
        return [self(states[:count], 1) for count in range(1, len(states) + 1)]


class Sequential(nn.Module):
    """An LSTM over the states in layer order; its last output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, states: Sequence[Tensor], first: int) -> Tensor:
        return self._outputs(states)[:, -1].reshape(states[0].shape)

    def prefixes(self, states: Sequence[Tensor]) -> list[Tensor]:
        outputs = self._outputs(states)
        return [outputs[:, index].reshape(states[0].shape) for index in range(len(states))]

    def _outputs(self, states: Sequence[Tensor]) -> Tensor:  # (rows, layers, d)
        run = torch.stack([state.reshape(-1, state.shape[-1]) for state in states], dim=1)
        return self.lstm(run)[0]


def make_fusion(name: str, width: int, layers: int) -> Average | Concatenation | AttentionPooling | Sequential:
    """Raises `ValueError` for a name that is none of the four."""
    if name == "average":
        return Average()
    if name == "concatenation":
        return Concatenation(width, layers)
    if name == "attention":
        return AttentionPooling(width)
    if name == "sequential":
        return Sequential(width)
    raise ValueError(f"unknown fusion {name!r}")
