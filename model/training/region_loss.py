"""What the region head learns from given boxes: which candidates stand for which box, and the three losses.

Candidates are assigned by how well they already name and place a box (task alignment: Feng et al., "TOOD", ICCV 2021),
and what they are to say of it is how well (IoU-aware classification: Zhang et al., "VarifocalNet", CVPR 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.bottom_up.box_overlap import generalised_iou, pairwise_iou
from model.bottom_up.region_head import Candidates

PER_BOX = 9  # candidates that a box may take
IOU_POWER = 6.0  # of the overlap in the alignment, against 1 of the class's chance
SURE = 0.3  # score from which a given box is taught; weaker ones are doubtful: no lesson either way
NEGATIVE_WEIGHT, NEGATIVE_POWER = 0.75, 2.0  # candidates for nothing: the surer the wrong claim, the more it counts
BOX_WEIGHT = 2.0


class Given(NamedTuple):
    """Boxes of B photos, padded to the most of them, G; padding has a score of 0."""

    boxes: Tensor  # (B, G, 4), relative
    classes: Tensor  # int64 (B, G)
    scores: Tensor  # (B, G)


class Assigned(NamedTuple):
    """What each candidate stands for."""

    box: Tensor  # int64 (B, A), row in `Given`; of no meaning where `target` is 0
    target: Tensor  # (B, A), 0 to 1: what it is to say of its box; 0: it stands for none
    ignored: Tensor  # bool (B, A): overlaps a doubtful box, so that nothing is said of it


@torch.no_grad()
def assign(candidates: Candidates, centres: Tensor, given: Given) -> Assigned:
    """`centres (A, 2)` of the candidates' cells. Each candidate stands for at most one box."""
    sure = given.scores >= SURE  # (B, G)
    doubtful = (given.scores > 0) & ~sure
    iou = pairwise_iou(candidates.boxes, given.boxes)  # (B, A, G)
    chances = candidates.classes.float().sigmoid()
    named = chances.gather(2, given.classes[:, None].expand(-1, chances.shape[1], -1))  # (B, A, G)
    x, y = centres[None, :, None, 0], centres[None, :, None, 1]
    x0, y0, x1, y1 = (side[:, None] for side in given.boxes.unbind(-1))
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    # A box too small to hold any cell's centre goes to the cell nearest to its own.
    own = (given.boxes[..., :2] + given.boxes[..., 2:]) / 2
    nearest = torch.cdist(centres[None], own).argmin(1)  # (B, G)
    inside |= torch.zeros_like(inside).scatter_(1, nearest[:, None], ~inside.any(1, keepdim=True))
    # A hair above zero: before anything is learned all boxes overlap nothing, and the cells inside must still be taken.
    alignment = (named * iou**IOU_POWER + 1e-9) * inside * sure[:, None]
    best = alignment.topk(min(PER_BOX, alignment.shape[1]), 1)
    taken = torch.zeros_like(inside).scatter_(1, best.indices, best.values > 0)  # (B, A, G)
    # One that several boxes want goes to the one it overlaps most.
    box = torch.where(taken, iou, -1.0).argmax(2)
    kept = taken & F.one_hot(box, taken.shape[2]).bool()
    alignment = alignment * kept
    scale = (iou * kept).amax(1, keepdim=True) / alignment.amax(1, keepdim=True).clamp(min=1e-12)
    target = (alignment * scale).amax(2)  # the best candidate of a box says its own overlap, the others less
    ignored = ((iou > 0.5) & doubtful[:, None]).any(2) & (target == 0)
    return Assigned(box, target, ignored)


def region_losses(candidates: Candidates, centres: Tensor, given: Given) -> dict[str, Tensor]:
    """`objectness`, `classes` and `boxes`, each a scalar; a box's lessons weigh as much as its score."""
    assigned = assign(candidates, centres, given)
    score = given.scores.gather(1, assigned.box)  # (B, A)
    weight = assigned.target * score
    total = weight.sum().clamp(min=1.0)
    positive = assigned.target > 0
    counted = ~assigned.ignored

    def claim(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy; where nothing is to be claimed, weighted by how sure the claim was."""
        wrong = NEGATIVE_WEIGHT * logits.detach().sigmoid() ** NEGATIVE_POWER
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (
            losses * torch.where(targets > 0, weights, wrong) * counted.view(*counted.shape, *[1] * (logits.ndim - 2))
        ).sum() / total

    classes = candidates.classes.float()
    which = F.one_hot(given.classes.gather(1, assigned.box), classes.shape[2]) * assigned.target[..., None]
    wanted = given.boxes.gather(1, assigned.box[..., None].expand(-1, -1, 4))
    apart = 1 - generalised_iou(candidates.boxes, wanted)
    return {
        "objectness": claim(candidates.objectness.float(), assigned.target, score),
        "classes": claim(classes, which, score[..., None]),
        "boxes": BOX_WEIGHT * (apart * weight)[positive].sum() / total,
    }
