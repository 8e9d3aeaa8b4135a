"""The losses of section 3.3: layer-weighted cross-entropy of the exits, and imitation of the deep states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.deecap import DeeCap, entropy
from model.vocabulary import PAD, UNKNOWN


def exit_weights(layers: int) -> list[float]:
    """w_m = m / Σk (section 3.4): deeper exits weigh more, since shallow layers hear from every exit."""
    return [m / (layers * (layers + 1) / 2) for m in range(1, layers + 1)]


def learnable(targets: Tensor) -> Tensor:
    """`(G, T)` -> where a word is to be learned: not padding, and not the unknown word, which is never emitted."""
    return (targets != PAD) & (targets != UNKNOWN)


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean nats per learnable word of `(G, T, V)` against `(G, T)`: position t is to predict targets[t]."""
    kept = learnable(targets)
    return F.cross_entropy(logits[kept].float(), targets[kept], label_smoothing=smoothing)


def distillation(logits: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Mean KL divergence in nats from the teacher's distribution, both `(G, T, V)`, over learnable words."""
    kept = learnable(targets)
    teacher_log_p = teacher[kept].float().log_softmax(-1).detach()
    return F.kl_div(logits[kept].float().log_softmax(-1), teacher_log_p, reduction="batchmean", log_target=True)


def exit_head_loss(model: DeeCap, states: Sequence[Tensor], logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Mean squared error, in nats, of the exit head's guesses at the entropies of `logits`; moves nothing but itself.

    `states` h_1..h_N `(G, T, d)`, `logits` of the exits `(G, T, V)`.
    """
    kept = targets != PAD
    errors = []
    for m in range(1, len(states)):
        guess = model.exit_head(states[m - 1][kept].detach().to(model.exit_head.weight), m)
        errors.append((guess - entropy(logits[m - 1][kept].detach())).square().mean())
    return torch.stack(errors).mean()


def imitation_loss(states: Sequence[Tensor], imitations: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Equation 4 with m = 1..N-1: mean over m of the mean over k > m of 1 - cos(h_k, ĥ_k^m).

    `states` are h_1..h_N `(G, T, d)` (targets of the imitation: detached), `imitations[m-1]` is `(N - m, G, T, d)`.
    The paper sums m from 2 to N; m = N has nothing to imitate (0/0), and exits at layer 1 need m = 1.
    """
    kept = targets != PAD
    real = torch.stack([state[kept] for state in states]).detach().float()  # (N, words, d)
    terms = []
    for m, imitated in enumerate(imitations, start=1):
        cosine = F.cosine_similarity(imitated[:, kept].float(), real[m:], dim=-1)
        terms.append((1 - cosine).mean())
    return torch.stack(terms).mean()
