"""How the known weight files name and order the detector's tensors.

- caffe: layer names of the released network description (bottom-up-attention, test.prototxt), blobs in Caffe's order;
- bua: MILVLG/bottom-up-attention.pytorch, whose heads keep Caffe's order of anchors, classes and attributes;
- detectron2: airsplay/py-bottom-up-attention, whose heads have detectron2's: a logit per anchor, all ratios of a size
  before the next size, and background last.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import numpy as np

from model.bottom_up.visual_genome.boxes import cell_anchors
from model.bottom_up.visual_genome.config import PIXEL_MEAN, DetectorConfig
from model.bottom_up.visual_genome.tensors import Tensors, WeightsError


class Naming(StrEnum):
    CAFFE = "caffe"
    BUA = "bua"
    DETECTRON2 = "detectron2"


class Norm(NamedTuple):
    """Where a batch norm's tensors are."""

    mean: str
    variance: str
    gamma: str
    beta: str
    factor: str | None


CAFFE_LAYERS = {
    "proposal": "rpn_conv/3x3",
    "objectness": "rpn_cls_score",
    "deltas": "rpn_bbox_pred",
    "class_score": "cls_score",
    "box": "bbox_pred",
    "attribute_head.embedding": "cls_embedding",
    "attribute_head.hidden": "fc_attr",
    "attribute_head.score": "attr_score",
}
_HEADS, _PROPOSALS = "roi_heads.box_predictor.", "proposal_generator.rpn_head."
DETECTRON2_LAYERS = {
    "proposal": f"{_PROPOSALS}conv",
    "objectness": f"{_PROPOSALS}objectness_logits",
    "deltas": f"{_PROPOSALS}anchor_deltas",
    "class_score": f"{_HEADS}cls_score",
    "box": f"{_HEADS}bbox_pred",
    "attribute_head.embedding": f"{_HEADS}cls_embedding",
    "attribute_head.hidden": f"{_HEADS}fc_attr",
    "attribute_head.score": f"{_HEADS}attr_score",
}
BUA_LAYERS = DETECTRON2_LAYERS | {
    "attribute_head.embedding": f"{_HEADS}cls_embed",
    "attribute_head.hidden": f"{_HEADS}attr_linear1",
    "attribute_head.score": f"{_HEADS}attr_linear2",
}
LAYERS = {Naming.CAFFE: CAFFE_LAYERS, Naming.BUA: BUA_LAYERS, Naming.DETECTRON2: DETECTRON2_LAYERS}
ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"
# What a checkpoint may hold beside weights: counters, and what the pixels are normalised with.
ALSO = (".num_batches_tracked", "pixel_std")
PARTS = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}


def naming_of(tensors: Tensors, config: DetectorConfig) -> Naming:
    """Raises `WeightsError` where the names are none of the known ones."""
    if f"{CAFFE_LAYERS['proposal']}[0]" in tensors:
        return Naming.CAFFE
    objectness = tensors.shape(f"{DETECTRON2_LAYERS['objectness']}.weight")
    if objectness:
        return Naming.BUA if objectness[0] == 2 * config.anchors else Naming.DETECTRON2
    some = ", ".join(sorted(tensors.names())[:5]) or "nothing"
    raise WeightsError(
        f"{tensors.file} names its tensors in no known way (Caffe's of the release, or its ports' on detectron2): "
        f"{some}, ..."
    )


class Names:
    """One naming's names for our layers, and the orders that go with it."""

    def __init__(self, naming: Naming, config: DetectorConfig) -> None:
        self.naming, self.config = naming, config
        self.convolutions = {"stem"} | {
            f"res{number}.{block}.{part}"
            for number, blocks in zip((2, 3, 4, 5), config.blocks, strict=True)
            for block in range(blocks)
            for part in PARTS
        }

    @property
    def background_last(self) -> bool:
        return self.naming is Naming.DETECTRON2

    @property
    def objectness_channels(self) -> int:
        """Caffe and bua score "nothing" and "something" of each anchor: all of the one before all of the other."""
        return self.config.anchors * (1 if self.naming is Naming.DETECTRON2 else 2)

    def layer(self, ours: str) -> tuple[str, str]:
        """Weight and bias of a layer without batch norm."""
        name = LAYERS[self.naming][ours]
        return (f"{name}[0]", f"{name}[1]") if self.naming is Naming.CAFFE else (f"{name}.weight", f"{name}.bias")

    @property
    def embedding(self) -> str:
        return self.layer("attribute_head.embedding")[0]

    def attributes(self) -> list[str]:
        """All tensors of the attribute head."""
        head = ("attribute_head.hidden", "attribute_head.score")
        return [self.embedding, *(name for layer in head for name in self.layer(layer))]

    def convolution(self, ours: str) -> str:
        """The weight of a convolution that has a batch norm, and so no bias."""
        if self.naming is Naming.CAFFE:
            return f"{'conv1' if ours == 'stem' else 'res' + self._caffe_block(ours)}[0]"
        return f"{self._detectron2_block(ours)}.weight"

    def norm(self, ours: str) -> Norm:
        if self.naming is Naming.CAFFE:
            block = "_conv1" if ours == "stem" else self._caffe_block(ours)
            norm, scale = f"bn{block}", f"scale{block}"
            return Norm(f"{norm}[0]", f"{norm}[1]", f"{scale}[0]", f"{scale}[1]", f"{norm}[2]")
        norm = f"{self._detectron2_block(ours)}.norm"
        return Norm(f"{norm}.running_mean", f"{norm}.running_var", f"{norm}.weight", f"{norm}.bias", None)

    def _caffe_block(self, ours: str) -> str:
        """`res3.1.conv2` -> `3b1_branch2b`: the long stages number their blocks, the short ones go on in letters."""
        stage, block, part = ours.removeprefix("res").split(".")
        index = int(block)
        follows = f"b{index}" if stage in ("3", "4") else "abcdefgh"[index]
        return f"{stage}{follows if index else 'a'}_{PARTS[part]}"

    def _detectron2_block(self, ours: str) -> str:
        if ours == "stem":
            return "backbone.stem.conv1"
        return f"roi_heads.{ours}" if ours.startswith("res5") else f"backbone.{ours}"

    def anchor_order(self, tensors: Tensors) -> np.ndarray:
        """int `(anchors,)`: which of the file's anchors is each of ours.

        By the anchors' sides where the file has them, otherwise as its naming has it. Raises `WeightsError` for other
        anchors than the detector's.
        """
        config = self.config
        kept = tensors.pop(ANCHORS) if self.naming is not Naming.CAFFE else None
        if kept is None:
            order = np.arange(config.anchors)
            if self.naming is not Naming.DETECTRON2:
                return order
            return order.reshape(len(config.anchor_scales), len(config.anchor_ratios)).T.reshape(-1)
        ours = _log_sides(cell_anchors(config.stride, config.anchor_scales, config.anchor_ratios).numpy())
        if kept.shape != (config.anchors, 4) or not np.isfinite(_log_sides(kept)).all():
            raise WeightsError(f"{tensors.file}: {ANCHORS} is {kept.shape}, not {(config.anchors, 4)} boxes")
        distance = np.abs(ours[:, None] - _log_sides(kept)[None]).max(-1)  # (ours, theirs)
        order = distance.argmin(1)
        if len(set(order.tolist())) < config.anchors or distance.min(1).max() > 0.1:
            raise WeightsError(f"{tensors.file}: {ANCHORS} are anchors of another detector")
        return order

    def check_unused(self, tensors: Tensors) -> None:
        """What is in such files and not in our detector; above all the boxes' regression, for the release keeps the
        proposals. Raises `WeightsError` for another mean colour than the detector's."""
        boxes = self.config.classes - (1 if self.background_last else 0)
        weight, bias = self.layer("box")
        tensors.leave(weight, (4 * boxes, self.config.feature_width))
        tensors.leave(bias, (4 * boxes,))
        mean = tensors.pop("pixel_mean")
        if mean is not None and not np.allclose(mean.reshape(-1), PIXEL_MEAN, atol=0.01):
            raise WeightsError(f"{tensors.file} was trained on pixels less {mean.reshape(-1)}, not {PIXEL_MEAN}")
        tensors.leave_ending(ALSO)


def _log_sides(anchors: np.ndarray) -> np.ndarray:
    """`(A, 4)` -> logarithms of widths and heights `(A, 2)`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (
            np.log(anchors[:, 2:] - anchors[:, :2])
            if anchors.ndim == 2 and anchors.shape[1] == 4
            else np.full(1, np.nan)
        )
