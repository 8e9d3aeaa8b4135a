"""AdamW, the learning-rate schedules, and the freezing of decoder layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from model.deecap import DeeCap
from model.training.settings import StageSettings

EXIT_PARTS = ("imitation", "gate", "shallow_norm", "shallow_fusion", "deep_norm", "deep_fusion", "exit_head")


def make_optimiser(
    model: DeeCap, trunk: list[nn.Parameter], stage: StageSettings, beside: Sequence[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """AdamW over exits, backbone and trunk, each at a `scale` of the stage's rate.

    Matrices of exits and backbone decay, nothing else. `beside`: what else learns, at the stage's own rate, since it
    begins with nothing.
    """
    backbone_scale = (stage.backbone_learning_rate or stage.learning_rate) / stage.learning_rate
    groups = []
    for wanted, scale in ((True, 1.0), (False, backbone_scale)):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and is_exit_part(name) == wanted]
        matrices, vectors = [p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim <= 1]
        groups.append({"params": matrices, "weight_decay": stage.weight_decay, "scale": scale})
        groups.append({"params": vectors, "weight_decay": 0.0, "scale": scale})
    trunk_scale = stage.trunk_learning_rate / stage.learning_rate
    groups.append({"params": trunk, "weight_decay": 0.0, "scale": trunk_scale})
    if beside:
        groups.append({"params": list(beside), "weight_decay": 0.0, "scale": 1.0, "beside": True})
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), fused=True)


def clip_gradients(optimiser: torch.optim.Optimizer, norm: float) -> None:
    """Gradients to a common norm of at most `norm`, those of what learns beside apart: the others are the captions'."""
    for beside in (False, True):
        groups = [group["params"] for group in optimiser.param_groups if group.get("beside", False) == beside]
        torch.nn.utils.clip_grad_norm_([p for params in groups for p in params if p.grad is not None], norm)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The stage's rate, scaled for each group."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]


def is_exit_part(name: str) -> bool:
    """Whether a parameter belongs to the exits (fusion, imitators, gate) and not to the backbone."""
    return name.split(".")[0] in EXIT_PARTS


def rate_at(step: int, steps_per_epoch: int, stage: StageSettings) -> float:
    """Learning rate at a step of the stage: linear warm-up, then a cosine, or steps of `decay` as in the paper."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    if stage.decay_every:
        return stage.learning_rate * float(stage.decay ** (step // (steps_per_epoch * stage.decay_every)))
    total = max(1, stage.epochs * steps_per_epoch - stage.warmup_steps)
    share = min(1.0, (step - stage.warmup_steps) / total)
    low, high = stage.final_learning_rate, stage.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * share))


def freezing_chances(layers: int) -> list[float]:
    """p_m = (N - m) / (N - 1) for m = 1..N (section 3.4): from 1 at the first layer to 0 at the last."""
    return [(layers - m) / (layers - 1) if layers > 1 else 0.0 for m in range(1, layers + 1)]


def freeze_layers(model: DeeCap, random: np.random.Generator) -> list[int]:
    """Drops the gradients of decoder layers by their chance and returns their numbers.

    Called between backward and the optimiser's step. Dropped, not zeroed: Adam's momentum would move a parameter
    whose gradient is merely zero.
    """
    frozen = []
    for m, chance in enumerate(freezing_chances(model.layers), start=1):
        if random.random() < chance:
            frozen.append(m)
            for parameter in model.decoder[m - 1].parameters():
                parameter.grad = None
    return frozen
