"""Captions drawn at random from the full-depth model, a word at a time: what self-critical training scores."""

from __future__ import annotations

import torch
from torch import Tensor

from model.decoding.search import emission_logits
from model.decoding.state import DecoderState
from model.deecap import DeeCap
from model.vocabulary import BOS, EOS


@torch.no_grad()
def sample_captions(
    model: DeeCap, memory: Tensor, count: int, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> list[list[int]]:
    """`count` captions for each image of `memory (B, R, d)`, those of one image side by side, without BOS.

    A caption ends with EOS unless it ran to the model's longest.
    """
    state = DecoderState(model, memory, mask, captions_per_image=count)
    rows = memory.shape[0] * count
    captions: list[list[int]] = [[] for _ in range(rows)]
    every = torch.arange(rows, device=memory.device)
    tokens = torch.full((rows,), BOS, device=memory.device)
    for _ in range(model.config.max_words):
        state.append(tokens)
        for m in range(1, model.layers + 1):
            state.run_layer(m, every)
        chances = emission_logits(model, state.hidden[model.layers][:, state.position]).float().softmax(-1)
        # By the inverse of the cumulative chances: `torch.multinomial` draws a number for every word of every row.
        reached = chances.cumsum(-1)
        drawn = torch.rand(rows, 1, generator=generator, device=memory.device) * reached[:, -1:]
        tokens = torch.searchsorted(reached, drawn, right=True)[:, 0].clamp_(max=chances.shape[-1] - 1)
        for caption, word in zip(captions, tokens.tolist(), strict=True):
            if not caption or caption[-1] != EOS:
                caption.append(word)
        if all(caption[-1] == EOS for caption in captions):
            break
    return captions
