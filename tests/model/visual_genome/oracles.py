"""The detector's steps once more, box by box and number by number, from the papers and the published description."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

Box = Sequence[float]
# The table in the comments of Faster R-CNN's own anchor script, less the 1 that Matlab counts from: scales 8, 16, 32.
PUBLISHED_ANCHORS = [
    (-84, -40, 99, 55), (-176, -88, 191, 103), (-360, -184, 375, 199),
    (-56, -56, 71, 71), (-120, -120, 135, 135), (-248, -248, 263, 263),
    (-36, -80, 51, 95), (-80, -168, 95, 183), (-168, -344, 183, 359),
]  # fmt: skip


def decoded(anchor: Box, delta: Box) -> list[float]:
    width, height = anchor[2] - anchor[0] + 1, anchor[3] - anchor[1] + 1
    x, y = anchor[0] + width / 2 + delta[0] * width, anchor[1] + height / 2 + delta[1] * height
    width, height = width * math.exp(delta[2]), height * math.exp(delta[3])
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def clipped(box: Box, width: int, height: int) -> list[float]:
    return [min(max(value, 0), side - 1) for value, side in zip(box, (width, height) * 2, strict=True)]


def overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0]) + 1
    down = min(one[3], other[3]) - max(one[1], other[1]) + 1
    if across <= 0 or down <= 0:
        return 0.0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
    return across * down / (sum(areas) - across * down)


def kept(boxes: Sequence[Box], scores: Sequence[float], threshold: float) -> list[int]:
    """Greedy suppression, best first."""
    stay: list[int] = []
    for row in sorted(range(len(boxes)), key=lambda row: (-scores[row], row)):
        if all(overlap(boxes[row], boxes[better]) <= threshold for better in stay):
            stay.append(row)
    return stay


def proposals(
    logits: np.ndarray, deltas: np.ndarray, size: tuple[int, int], scale: float, anchors: Sequence[Box], limits: Any
) -> np.ndarray:
    """Logits `(A, h, w)`, deltas `(4A, h, w)` -> boxes."""
    found: list[tuple[float, list[float]]] = []
    for row in range(logits.shape[1]):
        for column in range(logits.shape[2]):
            for index, anchor in enumerate(anchors):
                moved = [value + 16 * (row if axis % 2 else column) for axis, value in enumerate(anchor)]
                delta = deltas[4 * index : 4 * index + 4, row, column]
                box = clipped(decoded(moved, delta.tolist()), *size)
                if min(box[2] - box[0], box[3] - box[1]) + 1 >= limits.smallest_proposal * scale:
                    found.append((float(logits[index, row, column]), box))
    found.sort(key=lambda each: -each[0])
    found = found[: limits.proposals_before_nms]
    boxes, scores = [box for _, box in found], [score for score, _ in found]
    return np.array([boxes[row] for row in kept(boxes, scores, limits.proposal_nms)[: limits.proposals]])


def pooled(grid: np.ndarray, box: Box, cells: int) -> np.ndarray:
    """`(C, h, w)` at a stride of 16 -> `(C, cells, cells)`, by going through all the places of every cell."""
    x0, y0, x1, y1 = (math.floor(value / 16 + 0.5) for value in box)
    width, height = max(x1 - x0 + 1, 1), max(y1 - y0 + 1, 1)
    result = np.zeros((len(grid), cells, cells), grid.dtype)
    for row in range(cells):
        for column in range(cells):
            inside = [
                grid[:, y, x]
                for y in range(y0 + row * height // cells, y0 - (-(row + 1) * height // cells))
                for x in range(x0 + column * width // cells, x0 - (-(column + 1) * width // cells))
                if 0 <= y < grid.shape[1] and 0 <= x < grid.shape[2]
            ]
            if inside:
                result[:, row, column] = np.max(inside, axis=0)
    return result


def selected(boxes: np.ndarray, probabilities: np.ndarray, rule: Any) -> set[int]:
    """The release's rule as its script has it, class by class."""
    best = [0.0] * len(boxes)
    for number in range(1, probabilities.shape[1]):
        for row in kept(boxes.tolist(), probabilities[:, number].tolist(), rule.class_nms):
            best[row] = max(best[row], float(probabilities[row, number]))
    enough = [row for row in range(len(boxes)) if best[row] >= rule.confidence]
    order = sorted(range(len(boxes)), key=lambda row: (-best[row], row))
    if len(enough) < rule.least_regions:
        enough = order[: rule.least_regions]
    elif len(enough) > rule.most_regions:
        enough = order[: rule.most_regions]
    return set(enough)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, centres of pixels on centres, edges repeated; `(H, W, C)`."""
    result = np.zeros((height, width, image.shape[2]))
    for row in range(height):
        for column in range(width):
            y = max((row + 0.5) * image.shape[0] / height - 0.5, 0)
            x = max((column + 0.5) * image.shape[1] / width - 0.5, 0)
            for down in (0, 1):
                for across in (0, 1):
                    share = (y % 1 if down else 1 - y % 1) * (x % 1 if across else 1 - x % 1)
                    place = min(int(y) + down, image.shape[0] - 1), min(int(x) + across, image.shape[1] - 1)
                    result[row, column] += share * image[place]
    return result


class CaffeNet:
    """The network by the names of the published description, batch norms and scales as layers of their own."""

    def __init__(self, blobs: dict[str, list[np.ndarray]], letters: Callable[[int, int], str]) -> None:
        self.blobs = {name: [torch.from_numpy(blob).double() for blob in each] for name, each in blobs.items()}
        self.letters = letters

    def convolved(self, x: torch.Tensor, name: str, place: str, **how: int) -> torch.Tensor:
        x = F.conv2d(x, self.blobs[name][0], **how)
        mean, variance, factor = self.blobs[f"bn{place}"]
        shape = (1, -1, 1, 1)
        x = (x - (mean / factor).view(shape)) / torch.sqrt((variance / factor).view(shape) + 1e-5)
        gamma, beta = self.blobs[f"scale{place}"]
        return x * gamma.view(shape) + beta.view(shape)

    def stage(self, x: torch.Tensor, number: int, blocks: int) -> torch.Tensor:
        for block in range(blocks):
            place = f"{number}{self.letters(number, block)}"

            def layer(x: torch.Tensor, branch: str, place: str = place, **how: int) -> torch.Tensor:
                return self.convolved(x, f"res{place}_{branch}", f"{place}_{branch}", **how)

            stride = 2 if block == 0 and number in (3, 4) else 1
            spread = 2 if number == 5 else 1
            y = F.relu(layer(x, "branch2a", stride=stride))
            y = layer(F.relu(layer(y, "branch2b", padding=spread, dilation=spread)), "branch2c")
            x = F.relu(y + (layer(x, "branch1", stride=stride) if block == 0 else x))
        return x

    def grid(self, x: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
        x = F.relu(self.convolved(x, "conv1", "_conv1", stride=2, padding=3))
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 3, 2)  # whatever is left at the far edges counts
        for number in (2, 3, 4):
            x = self.stage(x, number, blocks[number - 2])
        return x
