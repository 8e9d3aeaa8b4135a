"""Where words looked: the decoder's attention to the regions, from one teacher-forced pass over a finished caption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.deecap import DeeCap
from model.vocabulary import BOS


def attention_to_regions(
    model: DeeCap, memory: Tensor, words: Sequence[int], exit_layers: Sequence[int], *, copied: bool
) -> Tensor:
    """Of each word, the weights of the regions in the layer that it left at, mean over its heads.

    `memory (1, R, d)`, the word numbers and their exit layers, T of each -> `(T, R)`, every row with the sum 1.
    `copied`: deeper layers see of a word that left the state it left with, as in an exit policy that copies.
    """
    tokens = torch.tensor([[BOS, *words[:-1]]], device=memory.device)  # the position of a word reads the word before it
    exits = torch.tensor(exit_layers, device=memory.device)
    length = len(words)
    causal = torch.ones(length, length, dtype=torch.bool, device=memory.device).tril()
    found = memory.new_zeros(length, memory.shape[1])
    x = model.embed(tokens)
    for m, layer in enumerate(model.decoder_layers[: max(exit_layers)], start=1):
        regions = layer.regions.keys_values(memory)
        seen = layer.word_keys_values(x)
        after_words = x + layer.words(layer.words_norm(x), *seen, causal)
        weights = layer.regions.weights(layer.regions_norm(after_words), regions[0], None)
        found = torch.where((exits == m)[:, None], weights[0].mean(0), found)
        y = layer(x, seen, causal, regions, None)
        x = torch.where((exits >= m)[:, None], y, x) if copied else y
    return found
