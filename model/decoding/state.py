"""What decoding keeps between words: hidden states, keys and values, and how far each layer has got.

A word that left early has no states at deeper layers. When a later word goes there, the missing ones are computed
then, many at once (deferred catch-up), so that the result is that of running without any cache; or, where the policy
says so, the state that the word left with stands in for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.deecap import DeeCap
from model.layers import DecoderLayer


class DecoderState:
    """The cache of a batch of captions in the making. Row g describes image `g // (rows / images)`."""

    def __init__(
        self, model: DeeCap, memory: Tensor, mask: Tensor | None, captions_per_image: int = 1, copied: bool = False
    ) -> None:
        """`memory (B, R, d)`, `mask (B, R)` -> a state of `B * captions_per_image` rows."""
        self.model = model
        self.copied = copied
        config = model.config
        rows, length = memory.shape[0] * captions_per_image, config.max_words + 1
        self.captions_per_image = captions_per_image
        self.regions = [layer.regions.keys_values(memory) for layer in model.decoder_layers]
        self.regions_mask = None if mask is None else mask[:, None, None, :]
        shape = (rows, config.heads, length, config.width // config.heads)
        self.keys = [memory.new_zeros(shape) for _ in model.decoder]
        self.values = [memory.new_zeros(shape) for _ in model.decoder]
        # hidden[0] is the embedding, hidden[m] the output of layer m
        self.hidden = [memory.new_zeros(rows, length, config.width) for _ in range(model.layers + 1)]
        self.filled = torch.zeros(model.layers, rows, dtype=torch.long, device=memory.device)
        self.causal = torch.ones(length, length, dtype=torch.bool, device=memory.device).tril()
        self.position = -1
        # (layer, word) pairs computed so far, catch-up included; keys and values of copied states are not counted
        self.executed_rows = 0

    def append(self, tokens: Tensor) -> None:
        """The next input word of every row, `(rows,)`."""
        self.position += 1
        self.hidden[0][:, self.position] = self.model.embed(tokens[:, None], self.position)[:, 0]

    def run_layer(self, m: int, rows: Tensor) -> None:
        """Layer m (from 1) for the newest word of `rows` (numbers, rising), with all the catch-up it needs there.

        The rows' layer m - 1 must be up to date. Rows that need less catch-up than others compute a few states
        again, to the same values: this decoder is for clarity, and counts only what was missing.
        """
        layer, end = self.model.decoder_layers[m - 1], self.position + 1
        if len(rows) == self.filled.shape[1]:  # all: no copies
            self._run_layer(layer, m, slice(None), end)
        else:
            self._run_layer(layer, m, rows, end)

    def _run_layer(self, layer: DecoderLayer, m: int, rows: Tensor | slice, end: int) -> None:
        missing = self.filled[m - 1, rows]
        self.executed_rows += len(missing) if self.copied else int((end - missing).sum())
        start = int(missing.min())
        x = self.hidden[m - 1][rows, start:end]
        keys, values = layer.word_keys_values(x)
        self.keys[m - 1][rows, :, start:end] = keys
        self.values[m - 1][rows, :, start:end] = values
        words = (self.keys[m - 1][rows, :, :end], self.values[m - 1][rows, :, :end])
        # With all rows, the captions of an image stand side by side and share its keys and values.
        images = rows if isinstance(rows, slice) else rows // self.captions_per_image
        regions_keys, regions_values = self.regions[m - 1]
        regions = (regions_keys[images], regions_values[images])
        mask = None if self.regions_mask is None else self.regions_mask[images]
        if self.copied:  # only the newest word runs; h_{m-1} of the missing ones is copied up
            newest = layer(x[:, -1:], words, None, regions, mask)
            there = torch.arange(start, end, device=x.device) < missing[:, None]  # (rows, words)
            y = torch.where(there[..., None], self.hidden[m][rows, start:end], x)
            y = torch.cat((y[:, :-1], newest), 1)
        else:
            y = layer(x, words, self.causal[start:end, :end], regions, mask)
        self.hidden[m][rows, start:end] = y
        self.filled[m - 1, rows] = end

    def newest(self, m: int, rows: Tensor) -> list[Tensor]:
        """h_1..h_m of the newest word of `rows`, each `(len(rows), d)`."""
        return [self.hidden[layer][rows, self.position] for layer in range(1, m + 1)]

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row `rows[i]` was: the survivors of a beam, within each image."""
        for tensors in (self.keys, self.values, self.hidden):
            for index, tensor in enumerate(tensors):
                tensors[index] = tensor[rows]
        self.filled = self.filled[:, rows]
