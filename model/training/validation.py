"""Validation during training: greedy captions of the val photos at full depth, scored by CIDEr-D."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model.decoding.search import Decoded, beam_search, greedy_search
from model.deecap import DeeCap
from model.exits import ExitPolicy
from model.vocabulary import Vocabulary

Regions = Callable[[Sequence[int], Sequence[int]], tuple[Tensor, Tensor, Tensor | None]]


@torch.no_grad()
def caption_rows(
    model: DeeCap, regions: Regions, rows: Sequence[int], tau: float = 0.0, beam: int = 1, batch: int = 100
) -> tuple[list[Decoded], int]:
    """Captions of the photos in `rows` (whole view), in batches, with the number of steps emitted in all."""
    policy = ExitPolicy.every_layer(model.layers)
    was_training = model.training
    model.eval()
    decoded, steps = [], 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        features, boxes, mask = regions(part, [0] * len(part))
        memory = model.encode(features, boxes, mask)
        taus = [tau] * len(part)
        if beam == 1:
            decoded.append(greedy_search(model, memory, taus, policy, mask))
        else:
            decoded.append(beam_search(model, memory, taus, policy, beam, mask))
        steps += sum(len(caption) for caption in decoded[-1].captions)
    model.train(was_training)
    return decoded, steps


def caption_words(decoded: Sequence[Decoded], vocabulary: Vocabulary) -> list[list[str]]:
    return [vocabulary.decode(step.token for step in caption) for part in decoded for caption in part.captions]


def mean_cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """CIDEr-D x 100 on the given tokens."""
    from model.evaluation.cider import corpus_cider_d

    return float(np.mean(corpus_cider_d(candidates, references)) * 100)
