"""The Visual Genome detector in PyTorch: Faster R-CNN on a ResNet-101, with attributes; the exported graph's reference.

Ren et al., "Faster R-CNN" (NIPS 2015); He et al., "Deep Residual Learning" (CVPR 2016), the form released for Caffe:
the stride is in the first 1x1 convolution, and res5 runs on pooled regions, without a stride and dilated; Anderson et
al., "Bottom-Up and Top-Down Attention" (CVPR 2018). The batch norms were frozen when the detector was trained: here
they are folded into the convolutions, as the weights are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.bottom_up.visual_genome.boxes import cell_anchors, clip, decode, grid_anchors, suppress
from model.bottom_up.visual_genome.config import DetectorConfig
from model.bottom_up.visual_genome.pooling import pool_regions
from model.bottom_up.visual_genome.preprocess import scale_photo
from model.bottom_up.visual_genome.selection import select

REGIONS_AT_ONCE = 32  # through res5: 300 regions in one go would take gigabytes


class Found(NamedTuple):
    """What the detector gives for one photo, most confident first."""

    features: Tensor  # (R, 2048)
    boxes: Tensor  # (R, 4): x0, y0, x1, y1 relative to the photo
    class_probabilities: Tensor  # (R, 1601), background first
    attribute_probabilities: Tensor | None  # (R, 401), none first


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, and a skip, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, stride)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation)
        self.conv3 = nn.Conv2d(inner, outputs, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, h, w) -> (B, outputs, h / stride, w / stride)
        y = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.conv3(y) + (x if self.shortcut is None else self.shortcut(x)))


def stage(config: DetectorConfig, number: int) -> nn.Sequential:
    """res2 to res5."""
    inner = config.width * 2 ** (number - 2)
    outputs = inner * config.expansion
    inputs = config.stem_width if number == 2 else outputs // 2
    stride = 2 if number in (3, 4) else 1
    dilation = 2 if number == 5 else 1
    blocks = config.blocks[number - 2]
    return nn.Sequential(
        *(
            Bottleneck(inputs if index == 0 else outputs, inner, outputs, stride if index == 0 else 1, dilation)
            for index in range(blocks)
        )
    )


class Detector(nn.Module):
    """One photo at a time, as it was published."""

    anchors: Tensor

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, config.stem_width, 7, 2, padding=3)
        self.res2, self.res3, self.res4, self.res5 = (stage(config, number) for number in (2, 3, 4, 5))
        self.proposal = nn.Conv2d(config.grid_width, config.proposal_width, 3, padding=1)
        # A logit per anchor: of Caffe's two, only their difference counts.
        self.objectness = nn.Conv2d(config.proposal_width, config.anchors, 1)
        self.deltas = nn.Conv2d(config.proposal_width, 4 * config.anchors, 1)
        self.class_score = nn.Linear(config.feature_width, config.classes)
        self.attribute_head = AttributeHead(config) if config.attributes else None
        anchors = cell_anchors(config.stride, config.anchor_scales, config.anchor_ratios)
        self.register_buffer("anchors", anchors, persistent=False)

    @torch.inference_mode()
    def forward(self, photo: Tensor) -> Found:
        """uint8 `(H, W, 3)`, red first."""
        config = self.config
        x, scale = scale_photo(photo, config)  # (1, 3, h, w)
        height, width = x.shape[2:]
        grid = self.grid(x)  # (1, 1024, h / 16, w / 16)
        boxes = self.propose(grid, width, height, scale)  # (N, 4)
        features = self.region_features(grid[0], boxes)  # (N, 2048)
        scores = self.class_score(features)  # (N, 1601)
        probabilities = scores.softmax(1)
        rows = select(boxes, probabilities, config)  # (R,)
        attributes = self.attribute_head(features[rows], scores[rows]) if self.attribute_head else None
        relative = boxes[rows] / boxes.new_tensor([width, height, width, height])
        return Found(features[rows], relative, probabilities[rows], attributes)

    def grid(self, x: Tensor) -> Tensor:
        """Pixels `(1, 3, h, w)` -> res4 `(1, 1024, h / 16, w / 16)`."""
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, ceil_mode=True)  # unpadded, as Caffe's
        return self.res4(self.res3(self.res2(x)))

    def propose(self, grid: Tensor, width: int, height: int, scale: float) -> Tensor:
        """res4 -> at most 300 boxes `(N, 4)` that may hold an object, best first, at least one."""
        config = self.config
        rows, columns = grid.shape[2:]
        hidden = F.relu(self.proposal(grid))
        logits = self.objectness(hidden)[0].permute(1, 2, 0).reshape(-1)  # (rows * columns * A,)
        deltas = self.deltas(hidden)[0].permute(1, 2, 0).reshape(-1, 4)
        boxes = clip(decode(grid_anchors(self.anchors, rows, columns, config.stride), deltas), width, height)
        large = ((boxes[:, 2:] - boxes[:, :2] + 1) >= config.smallest_proposal * scale).all(1)
        if large.any():  # a photo of which nothing is large enough still gives regions
            boxes, logits = boxes[large], logits[large]
        best = logits.argsort(descending=True, stable=True)[: config.proposals_before_nms]
        return boxes[best[suppress(boxes[best], logits[best], config.proposal_nms, config.proposals)]]

    def region_features(self, grid: Tensor, boxes: Tensor) -> Tensor:
        """res4 `(1024, h, w)` and boxes `(N, 4)` -> `(N, 2048)`: pooled, through res5, averaged."""
        parts = []
        for some in boxes.split(REGIONS_AT_ONCE):
            pooled = pool_regions(grid, some, 1 / self.config.stride, self.config.pooled)  # (n, 1024, 14, 14)
            parts.append(self.res5(pooled).mean((2, 3)))
        return torch.cat(parts)


class AttributeHead(nn.Module):
    """Attributes of a region from its features and the class it is taken for (Anderson et al. 2018, 3.1)."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.classes, config.embedding)
        self.hidden = nn.Linear(config.feature_width + config.embedding, config.attribute_width)
        self.score = nn.Linear(config.attribute_width, config.attributes)

    def forward(self, features: Tensor, class_scores: Tensor) -> Tensor:
        """`(R, 2048)`, `(R, 1601)` -> probabilities `(R, 401)`."""
        named = self.embedding(class_scores.argmax(1))  # the background among the classes, as in Caffe
        return self.score(F.relu(self.hidden(torch.cat((features, named), 1)))).softmax(1)
