"""The region head: from the trunk's grids to candidate boxes, how likely each holds something, and what.

Anchor-free (Tian et al., "FCOS", ICCV 2019): each cell of a small pyramid (Lin et al., CVPR 2017) says how far the four
sides of a box are from its centre. Two levels, of stride 16 and 32, so 405 candidates a photo.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.bottom_up.preprocess import INPUT_SIZE
from model.bottom_up.trunk import HEAD_WIDTH, STRIDE

BOTTOM_WIDTH = 120  # channels of the trunk's grid of stride 16
STRIDES = (STRIDE // 2, STRIDE)
UNITS = 2 * INPUT_SIZE // STRIDES[0]  # of half a fine cell, along a side of the photo
LARGEST_GROWTH = 4.0  # of the exponent: a side at exp(4) strides is far outside of any photo, and stays finite
FIRST_CHANCE = 0.01  # that a cell holds something, before training: else the many empty cells drown the others


class Candidates(NamedTuple):
    """What the head says of B photos, A candidates each, those of stride 16 first, row by row."""

    pyramid: Tensor  # (B, P, 18, 18), the finest level
    boxes: Tensor  # (B, A, 4): x0, y0, x1, y1 relative to the photo
    objectness: Tensor  # (B, A), logits
    classes: Tensor  # (B, A, C), logits


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation (which export folds into it) and ReLU6."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU6())


class Level(nn.Module):
    """One level's towers: two layers for what, two for where."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.what = nn.Sequential(convolution(width, width), convolution(width, width))
        self.where = nn.Sequential(convolution(width, width), convolution(width, width))
        self.classes = nn.Conv2d(width, classes, 1)
        self.objectness = nn.Conv2d(width, 1, 1)
        self.sides = nn.Conv2d(width, 4, 1)
        unlikely = -torch.log(torch.tensor((1 - FIRST_CHANCE) / FIRST_CHANCE)).item()
        for layer, bias in ((self.classes, unlikely), (self.objectness, unlikely), (self.sides, 1.0)):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, P, S, S) -> (B, S * S, C + 5): classes, objectness, sides
        where = self.where(x)
        maps = torch.cat((self.classes(self.what(x)), self.objectness(where), self.sides(where)), 1)
        return maps.flatten(2).transpose(1, 2)


class RegionHead(nn.Module):
    """`width`: channels P of the pyramid; `classes`: C."""

    middles: Tensor  # (A, 2), the cells' centres in units of half a fine cell: whole numbers, which export keeps whole
    steps: Tensor  # (A, 1), the strides in the same units

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.class_count, self.width = classes, width
        self.lateral = nn.ModuleList((convolution(BOTTOM_WIDTH, width, 1), convolution(HEAD_WIDTH, width, 1)))
        self.down = convolution(width, width, stride=2)
        self.smooth = nn.ModuleList(convolution(width, width) for _ in STRIDES)
        self.levels = nn.ModuleList(Level(width, classes) for _ in STRIDES)
        middles, steps = [], []
        for stride in STRIDES:
            side, step = INPUT_SIZE // stride, 2 * stride // STRIDES[0]
            along = (torch.arange(side) + 0.5) * step
            y, x = torch.meshgrid(along, along, indexing="ij")
            middles.append(torch.stack((x, y), -1).reshape(-1, 2))
            steps.append(torch.full((side * side, 1), float(step)))
        self.register_buffer("middles", torch.cat(middles), persistent=False)
        self.register_buffer("steps", torch.cat(steps), persistent=False)

    @property
    def centres(self) -> Tensor:
        """`(A, 2)`: the cells' centres relative to the photo."""
        return self.middles / UNITS

    def forward(self, fine: Tensor, coarse: Tensor) -> Candidates:
        """The trunk's grids `(B, 120, 18, 18)` and `(B, 1280, 9, 9)` -> what is there."""
        finer, coarser = (lateral(grid) for lateral, grid in zip(self.lateral, (fine, coarse), strict=True))
        finer = self.smooth[0](finer + F.interpolate(coarser, scale_factor=2.0, mode="nearest"))
        coarser = self.smooth[1](coarser + self.down(finer))
        said = torch.cat([level(x) for level, x in zip(self.levels, (finer, coarser), strict=True)], 1)
        classes, objectness, sides = said.split((self.class_count, 1, 4), -1)
        return Candidates(finer, self._boxes(sides), objectness.squeeze(-1), classes)

    def _boxes(self, sides: Tensor) -> Tensor:
        """How far left, up, right and down the sides are, `(B, A, 4)` -> boxes."""
        far = sides.float().clamp(max=LARGEST_GROWTH).exp() * self.steps
        return (torch.cat((self.middles - far[..., :2], self.middles + far[..., 2:]), -1) / UNITS).clamp(0.0, 1.0)


def load_region_head(state: dict[str, object]) -> RegionHead:
    """From what `deecap train-regions` saved: `classes` (their names) and `head`. In evaluation mode."""
    names = cast(list[str], state["classes"])
    head = RegionHead(len(names))
    head.load_state_dict(cast(dict[str, Tensor], state["head"]))
    return head.eval()
