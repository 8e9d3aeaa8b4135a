"""Validation during training: greedy captions of the val photos at a threshold, scored by CIDEr-D."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.decoding.search import Decoded, greedy_search
from model.deecap import DeeCap
from model.evaluation.metrics import per_image_cider
from model.exits import ExitPolicy
from model.vocabulary import Vocabulary

# Rows of photos and the view of each -> features (B, R, F), boxes (B, R, 4), mask (B, R) or none
RegionsOf = Callable[[Sequence[int], Sequence[int]], tuple[Tensor, Tensor, Tensor | None]]


@torch.no_grad()
def caption_rows(model: DeeCap, regions_of: RegionsOf, rows: Sequence[int], tau: float, batch: int) -> list[Decoded]:
    """Greedy captions of the photos in `rows` (whole view) at τ, in batches; exits are tested after every layer."""
    policy = ExitPolicy.every_layer(model.layers)
    was_training = model.training
    model.eval()
    decoded = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        features, boxes, mask = regions_of(part, [0] * len(part))
        memory = model.encode(features, boxes, mask)
        decoded.append(greedy_search(model, memory, [tau] * len(part), policy, mask))
    model.train(was_training)
    return decoded


def caption_words(decoded: Sequence[Decoded], vocabulary: Vocabulary) -> list[list[str]]:
    """The words of each caption, in order."""
    return [vocabulary.decode(step.token for step in caption) for part in decoded for caption in part.captions]


def mean_cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """CIDEr-D x 100 on the given tokens."""
    return float(per_image_cider(candidates, references).mean())
