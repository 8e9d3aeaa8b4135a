"""Self-critical training: captions are sampled, scored by CIDEr-D, and made likelier when better than their siblings.

Rennie et al., "Self-critical Sequence Training for Image Captioning" (CVPR 2017), with the mean reward of the other
samples of the same photo as baseline (Luo, "A Better Variant of Self-Critical Sequence Training", 2020). EOS counts
as a token of the candidate and of the references, so that ending well is rewarded too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.decoding.search import emission_logits
from model.deecap import DeeCap
from model.evaluation.cider import CiderD
from model.training.losses import distillation
from model.training.objectives import Batch, sample_shallow_exit
from model.training.settings import StageSettings
from model.vocabulary import BOS, EOS, PAD


class CiderReward:
    """CIDEr-D of sampled captions against their photo's references, document frequencies of the train split."""

    def __init__(self, references: dict[int, Sequence[Sequence[int]]]) -> None:
        """`references`: row of a photo -> its captions as numbers, without BOS or EOS."""
        ended = {row: [[*caption, EOS] for caption in captions] for row, captions in references.items()}
        self.scorer = CiderD(list(ended.values()))
        self.prepared = {row: self.scorer.prepare(captions) for row, captions in ended.items()}

    def advantages(self, rows: Sequence[int], captions: Sequence[Sequence[int]]) -> tuple[np.ndarray, float]:
        """Reward less the mean of the photo's other samples, `(G,)`, and the mean reward x 10 (CIDEr x 100)."""
        count = len(captions) // len(rows)
        prepared = [self.prepared[row] for row in rows for _ in range(count)]
        rewards = self.scorer.score_many(captions, prepared).reshape(len(rows), count)
        others = (rewards.sum(1, keepdims=True) - rewards) / (count - 1)
        return (rewards - others).ravel(), float(rewards.mean() * 100)


def self_critical_loss(
    model: DeeCap, batch: Batch, advantages: Tensor, stage: StageSettings, random: np.random.Generator
) -> Tensor:
    """Policy gradient of the final exit on sampled captions; `batch.targets` are the samples, `advantages (G,)`.

    The chances are those that the samples were drawn by: words that are never emitted have none, and the model is to be
    in the mode, with dropout or without, that it was in then. A sampled shallower exit follows the final one by
    distillation, as `shallow_exit_weight` says.
    """
    states = model.hidden_states(model.encode(batch.features, batch.boxes, batch.mask), batch.inputs, batch.mask)
    kept = batch.targets != PAD
    log_p = emission_logits(model, states[-1]).float().log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    loss = -(log_p[kept] * advantages[:, None].expand_as(log_p)[kept]).mean()
    if stage.shallow_exit_weight and model.layers > 1:
        m = sample_shallow_exit(model.layers, random)
        shallow, final = model.logits(states[m - 1]), model.logits(states[-1])
        loss = loss + stage.shallow_exit_weight * distillation(shallow, final, batch.targets)
    return loss


def sacreeos_signature(samples: int) -> str:
    """What was rewarded, in the notation of SacreEOS 1.0.0 (Hu et al. 2023, arXiv:2305.12254), for `samples` a photo.

    EOS is a token of samples and references, those included that document frequencies are counted on; CIDEr-D with
    n-grams up to four and a σ of 6; the baseline is a mean over samples, here those other than the one it is for.
    """
    return f"STANDARD_wInit+Cider-D[n4,s6.0]+average[nspi{samples}]+1.0.0"


def pad_samples(captions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Samples (EOS included, where they ended) -> inputs `BOS w1 ..` and targets `w1 .. EOS`, both `(G, longest)`."""
    longest = max(len(caption) for caption in captions)
    inputs = torch.full((len(captions), longest), PAD)
    targets = torch.full((len(captions), longest), PAD)
    for row, caption in enumerate(captions):
        targets[row, : len(caption)] = torch.tensor(caption)
        inputs[row, : len(caption)] = torch.tensor([BOS, *caption[:-1]])
    return inputs, targets
