"""What one batch teaches: the loss of each kind of stage, given regions and captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.deecap import DeeCap
from model.training.losses import cross_entropy, distillation, exit_head_loss, exit_weights, imitation_loss
from model.training.settings import StageSettings

EXIT_HEAD_WEIGHT = 0.05  # Adam does not mind, and the clipped gradient is to be that of the captions


@dataclass(frozen=True)
class Batch:
    """Photos with their captions; G = images * captions per image, those of one image side by side."""

    features: Tensor  # (B, R, F)
    boxes: Tensor  # (B, R, 4)
    mask: Tensor | None  # (B, R), True where a region is
    inputs: Tensor  # (G, T), BOS first
    targets: Tensor  # (G, T), EOS last


def backbone_loss(model: DeeCap, batch: Batch, stage: StageSettings, random: np.random.Generator) -> Tensor:
    """Cross-entropy of the final exit, and of one shallower exit sampled per batch, read straight from h_m.

    The second term keeps the lower layers able to speak: without it h_1 is only what deeper layers want of it.
    """
    states = model.hidden_states(model.encode(batch.features, batch.boxes, batch.mask), batch.inputs, batch.mask)
    loss = cross_entropy(model.logits(states[-1]), batch.targets, stage.label_smoothing)
    if stage.shallow_exit_weight and model.layers > 1:
        m = sample_shallow_exit(model.layers, random)
        shallow = cross_entropy(model.logits(states[m - 1]), batch.targets, stage.label_smoothing)
        loss = loss + stage.shallow_exit_weight * shallow
    return loss


def sample_shallow_exit(layers: int, random: np.random.Generator) -> int:
    """A layer m < N with chance proportional to 1/m: layer 1 most often, since most words are to leave there."""
    share = 1.0 / np.arange(1, layers)
    return int(random.choice(layers - 1, p=share / share.sum())) + 1


def words_that_left(batch: Batch, share: float, random: np.random.Generator) -> Tensor:
    """Which words `(G, T)` are treated as having left at layer 1: in `share` of the captions, at a rate of its own."""
    captions, length = batch.inputs.shape
    rates = random.random(captions) * (random.random(captions) < share)
    return torch.from_numpy(random.random((captions, length)) < rates[:, None]).to(batch.inputs.device)


def exits_loss(model: DeeCap, batch: Batch, stage: StageSettings, random: np.random.Generator) -> Tensor:
    """Equation 11: λ Σ w_m CE_m + (1 - λ) L_imit, and on request distillation from the final exit."""
    left = words_that_left(batch, stage.copied_states, random) if stage.copied_states else None
    logits, states, imitations = model(batch.features, batch.boxes, batch.inputs, batch.mask, left)
    weights = exit_weights(model.layers)
    if model.config.exits == "final":
        return cross_entropy(logits[-1], batch.targets, stage.label_smoothing)
    words = [cross_entropy(exit_logits, batch.targets, stage.label_smoothing) for exit_logits in logits]
    loss = stage.lambda_ * torch.stack([w * ce for w, ce in zip(weights, words, strict=True)]).sum()
    if imitations:
        loss = loss + (1 - stage.lambda_) * imitation_loss(states, imitations, batch.targets)
    if stage.distillation and len(logits) > 1:
        kept = [distillation(exit_logits, logits[-1], batch.targets) for exit_logits in logits[:-1]]
        loss = loss + stage.distillation * torch.stack(kept).mean()
    if model.config.exit_head and model.layers > 1:
        loss = loss + EXIT_HEAD_WEIGHT * exit_head_loss(model, states, logits, batch.targets)
    return loss
