"""What the PyTorch engine keeps of every caption in the making, all of it allocated once.

`slots` captions at most, each with its own row everywhere, and one row more for what only pads a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Room is made in steps. CUDA's attention reads masks 16 bytes at a time; and with room for more regions than there are,
# few images need it made anew.
WORDS_STEP, REGIONS_STEP = 8, 32


@dataclass(frozen=True)
class Place:
    """Where the words of a pass are: G slots with T words each, the last of them the newest."""

    slots: Tensor  # (G,)
    rows: Tensor  # (G * T * 2 * heads,), where a layer's keys and values of these words are written
    states: Tensor  # (G * T,), where their states are
    words_mask: Tensor  # (G, 1, T, positions), added to attention scores
    regions_mask: Tensor  # (G, 1, 1, R), likewise


class Cache:
    """Keys and values of words and regions, and the deepest state of every word."""

    def __init__(self, layers: int, slots: int, heads: int, positions: int, width: int, like: Tensor) -> None:
        """`like`: a tensor of the type and on the device that the cache is to have."""
        self._like, self.scratch = like, slots
        slots, room, head_width = slots + 1, _roomy(positions, WORDS_STEP), width // heads
        self._room = room
        self.positions = torch.arange(room, device=like.device)
        self.words = like.new_zeros(layers, 2, slots, heads, room, head_width)
        self.states = like.new_zeros(slots * room, width)
        self._flat = self.words.view(-1, head_width)  # a row for each layer, key or value, slot, head and position
        self._flat_layers = [layer.view(-1, head_width) for layer in self.words]
        row = torch.arange(2 * slots * heads, device=like.device).view(2, slots, heads) * room
        self._first_row = row.transpose(0, 1).contiguous()  # (slots, 2, heads), within a layer
        self._layer_row = torch.arange(layers, device=like.device) * (2 * slots * heads * room)
        unseen = self.positions > self.positions[:, None]
        # Added to the scores of a word at each position: those after it are not seen.
        self._unseen = torch.where(unseen, -torch.inf, 0.0).to(like)
        self.regions = like.new_zeros(layers, 2, slots, heads, 0, head_width)
        # Added to attention scores: minus infinity where an image has fewer regions than there is room for.
        self.regions_mask = like.new_zeros(slots, 1, 1, 0)

    def make_room(self, regions: int) -> bool:
        """For images of up to so many regions; what was kept stays. Whether buffers had to be made anew for it."""
        layers, _, slots, heads, before, head_width = self.regions.shape
        if regions <= before:
            return False
        room = _roomy(regions, REGIONS_STEP)
        fresh = self._like.new_zeros(layers, 2, slots, heads, room, head_width)
        fresh[..., :before, :] = self.regions
        # Zero where there is no image yet, since a row that may look nowhere gives NaN.
        mask = self._like.new_full((slots, 1, 1, room), -torch.inf if before else 0.0)
        mask[..., :before] = self.regions_mask
        self.regions, self.regions_mask = fresh, mask
        return True

    def admit(self, slots: Sequence[int], regions: Tensor) -> None:
        """An image's region keys and values `(layers, 2, heads, R, d / heads)`, for each of its captions' slots.

        There must be room for them. What is not seen is zeroed: NaN there would spread, since 0 times NaN is NaN.
        """
        count = regions.shape[-2]
        for slot in slots:
            self.words[:, :, slot] = 0
            self.regions[:, :, slot, :, :count] = regions
            self.regions[:, :, slot, :, count:] = 0
            self.regions_mask[slot, ..., :count] = 0
            self.regions_mask[slot, ..., count:] = -torch.inf

    def copy(self, to: np.ndarray, source: np.ndarray, regions: bool) -> None:
        """Slot `to[i]` becomes what slot `source[i]` was, all at once; without `regions`, but for its image."""
        target, origin = (torch.from_numpy(slots).to(self._like.device) for slots in (to, source))
        self.words[:, :, target] = self.words[:, :, origin]
        states = self.states.view(-1, self._room, self.states.shape[-1])
        states[target] = states[origin]
        if regions:
            self.regions[:, :, target] = self.regions[:, :, origin]
            self.regions_mask[target] = self.regions_mask[origin]

    def place(self, slots: Tensor, words: Tensor) -> Place:
        """The place of `words (G, T)` (positions, rising) of `slots (G,)`."""
        groups, many = words.shape
        rows = self._first_row.index_select(0, slots)[:, None] + words[..., None, None]  # (G, T, 2, heads)
        words_mask = self._unseen.index_select(0, words.reshape(-1)).view(groups, 1, many, -1)
        regions_mask = self.regions_mask.index_select(0, slots)
        return Place(slots, rows.view(-1), self.state_rows(slots[:, None], words), words_mask, regions_mask)

    def state_rows(self, slots: Tensor, words: Tensor) -> Tensor:
        """Where in `states` those of `words` of `slots` are, the two of shapes that go together: `(words.numel(),)`."""
        return (slots * self._room + words).view(-1)

    def write(self, layer: int, keys_values: Tensor, place: Place) -> None:
        """Keys and values `(G, T, 2, heads, d / heads)` of a layer (from 1)."""
        rows = keys_values.reshape(-1, keys_values.shape[-1])
        self._flat_layers[layer - 1].index_copy_(0, place.rows, rows)

    def write_layers(self, first: int, keys_values: Tensor, slots: Tensor, words: Tensor) -> None:
        """Keys and values `(M, layers, 2, heads, d / heads)` of M words, for the layers from `first` on."""
        layers = self._layer_row[first - 1 : first - 1 + keys_values.shape[1]]
        within = self._first_row.index_select(0, slots) + words[:, None, None]  # (M, 2, heads)
        rows = within[:, None] + layers[:, None, None]
        self._flat.index_copy_(0, rows.view(-1), keys_values.reshape(-1, keys_values.shape[-1]))

    def words_of(self, layer: int, place: Place) -> tuple[Tensor, Tensor]:
        """Keys and values of all words that there is room for, each `(G, heads, positions, d / heads)`."""
        keys, values = self.words[layer - 1].index_select(1, place.slots)
        return keys, values

    def regions_of(self, layer: int, place: Place) -> tuple[Tensor, Tensor]:
        """Keys and values of the regions, each `(G, heads, R, d / heads)`."""
        keys, values = self.regions[layer - 1].index_select(1, place.slots)
        return keys, values


def _roomy(count: int, step: int) -> int:
    return -(-count // step) * step
