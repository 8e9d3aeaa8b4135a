"""What every exit makes of every reference word, given the words before it: for FCS and for reliability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.decoding.search import emission_logits
from model.deecap import DeeCap, entropy
from model.training.data import pad_captions
from model.vocabulary import PAD, Vocabulary


@dataclass(frozen=True)
class EncodedBatch:
    """Some photos after the encoder."""

    rows: range  # which photos
    memory: Tensor  # (B, R, d)
    mask: Tensor | None  # (B, R), True where a region is


@dataclass(frozen=True)
class Predictions:
    """Of L tokens at each of E exits. Tokens: every word of every reference and the EOS after it, none of padding; a
    word outside the vocabulary too, which no exit can get right."""

    layers: tuple[int, ...]  # of the exits, rising; the last is N
    confidence: np.ndarray  # float32 (L, E), the probability of the likeliest word
    entropy: np.ndarray  # float32 (L, E), nats
    hard: np.ndarray  # bool (L, E), the likeliest word is not the reference's

    def exit_index(self, tau: float, tested: Sequence[int]) -> np.ndarray:
        """`(L,)` which exit each token takes at τ, where words leave at the first tested layer below it.

        Every state is the computed one: what a copied state would have been is not told by teacher forcing.
        """
        may = np.isin(self.layers, tested)
        leaves = (self.entropy < tau) & may
        leaves[:, -1] = True
        return leaves.argmax(1)

    def speedup(self, tau: float, tested: Sequence[int]) -> float:
        """The paper's SpeedUp of these tokens at τ."""
        layers = np.array(self.layers)
        return float(layers[-1] / layers[self.exit_index(tau, tested)].mean())


@torch.no_grad()
def teacher_forced(
    model: DeeCap,
    vocabulary: Vocabulary,
    batches: Sequence[EncodedBatch],
    references: Sequence[Sequence[Sequence[str]]],
) -> Predictions:
    """`references`: photos x captions x words. Words that are never emitted are ruled out, as in decoding."""
    layers = (model.layers,) if model.config.exits == "final" else tuple(range(1, model.layers + 1))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for batch in batches:
        texts = [references[row] for row in batch.rows]
        for number in range(max(len(captions) for captions in texts)):
            having = [index for index, captions in enumerate(texts) if len(captions) > number]
            encoded = [vocabulary.encode(texts[index][number]) for index in having]
            inputs, targets = (part.to(batch.memory.device) for part in pad_captions(encoded, model.config.max_words))
            mask = None if batch.mask is None else batch.mask[having]
            states = model.hidden_states(batch.memory[having], inputs, mask)
            exits, _ = model.exit_states(states)
            found.append(_judge(model, [exits[layer - 1] for layer in layers], targets))
    confidence, certainty, hard = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Predictions(layers, confidence, certainty, hard)


def _judge(model: DeeCap, exits: Sequence[Tensor], targets: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kept = targets != PAD
    confidence, certainty, hard = [], [], []
    for z in exits:
        logits = emission_logits(model, z[kept])
        best, words = logits.float().softmax(-1).max(-1)
        confidence.append(best)
        certainty.append(entropy(logits).float())
        hard.append(words != targets[kept])
    confidences, certainties, hardness = (torch.stack(one, 1).cpu().numpy() for one in (confidence, certainty, hard))
    return confidences, certainties, hardness
