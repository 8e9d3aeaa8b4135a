"""Products of the network that can be made once: what of it is linear, put together.

The affine part of a layer norm goes into the linear map behind it, the gate's shallow half into the shallow fusion, and
an average becomes a concatenation with unit slices. All in float64, for whatever precision the engine then runs in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.deecap import DeeCap
from model.fusion import Average, Concatenation

ENGINE_FUSIONS = ("average", "concatenation")


def folded(weight: Tensor, bias: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias of `linear(norm(x))` as a map of x normalised without an affine part."""
    gamma, beta = norm.weight.double(), norm.bias.double()
    return weight.double() * gamma, bias.double() + weight.double() @ beta


def shallow_share(model: DeeCap, layer: int) -> tuple[Tensor, Tensor]:
    """Of layer i, its share of h_shallow and of the gate's hidden layer: a map of h_i, normalised, to (2d,).

    Summed over i = 1..m; an average then divides by m. Without a gate, h_shallow alone: (d,).
    """
    fusion, width = model.shallow_fusion, model.config.width
    bias = model.head_bias.new_zeros(width, dtype=torch.float64)
    if isinstance(fusion, Average):
        weight = torch.eye(width, dtype=torch.float64, device=bias.device)
    else:
        assert isinstance(fusion, Concatenation)
        weight = fusion.slices[layer - 1].double().T
        bias = fusion.bias.double() if layer == 1 else bias
    if model.config.exits == "deecap":
        gate = model.gate.hidden.weight[:, :width].double()
        weight, bias = torch.cat((weight, gate @ weight)), torch.cat((bias, gate @ bias))
    return folded(weight, bias, model.shallow_norm)


def deep_slices(model: DeeCap, m: int) -> tuple[Tensor, Tensor]:
    """h_deep of exit m as a map of the imitated states, each normalised, one behind the other: (d, (N - m) * d)."""
    fusion, width, count = model.deep_fusion, model.config.width, model.layers - m
    if isinstance(fusion, Average):
        bias = model.head_bias.new_zeros(width, dtype=torch.float64)
        slices = torch.eye(width, dtype=torch.float64, device=bias.device).expand(count, width, width) / count
    else:
        assert isinstance(fusion, Concatenation)
        slices, bias = fusion.slices[m:].double(), fusion.bias.double()
    parts = [folded(weight.T, torch.zeros_like(bias), model.deep_norm) for weight in slices]
    return torch.cat([weight for weight, _ in parts], 1), bias + torch.stack([shift for _, shift in parts]).sum(0)
