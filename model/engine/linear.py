"""A linear map as the PyTorch backend runs it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor], Tensor]  # (rows, in) -> (rows, out)
MakeLinear = Callable[[Tensor, Tensor], Linear]  # weight (out, in) and bias (out,), both float64


def linear_maker(like: Tensor) -> MakeLinear:
    """Makes linear maps whose weights are of the type and on the device of `like`."""

    def make(weight: Tensor, bias: Tensor) -> Linear:
        weight, bias = weight.to(like), bias.to(like)
        return lambda x: F.linear(x, weight, bias)

    return make
