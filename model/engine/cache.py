"""What the engine keeps of every caption in the making, all of it allocated once.

`slots` captions at most, each with its own row everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where the words of a pass are: G slots with T words each, the last of them the newest."""

    groups: int  # G
    slots: slice | Tensor  # (G,): a slice where the slots are a run from 0, which spares copies
    rows: Tensor  # (G * T * 2 * heads,), where a layer's keys and values of these words are written
    length: int  # how many words' keys and values are read
    words_mask: Tensor | None  # (G, 1, T, length), added to attention scores; None where all is read
    regions_mask: Tensor | None  # (G, 1, 1, R), likewise


class Cache:
    """Keys and values of words and regions, and the deepest state of every word."""

    def __init__(self, layers: int, slots: int, heads: int, positions: int, width: int, like: Tensor) -> None:
        """`like`: a tensor of the type and on the device that the cache is to have."""
        head_width = width // heads
        self.positions, self.like = positions, like
        self.words = like.new_zeros(layers, 2, slots, heads, positions, head_width)
        self.states = like.new_zeros(slots, positions, width)
        self.flat_states = self.states.view(-1, width)
        self._flat = self.words.view(-1, head_width)  # a row for each layer, key or value, slot, head and position
        self._flat_layers = [layer.view(-1, head_width) for layer in self.words]
        one_of_two = np.arange(2)[:, None] * (slots) * heads * positions
        by_slot = np.arange(slots)[:, None, None] * heads * positions
        self._first_row = by_slot + one_of_two + np.arange(heads) * positions  # (slots, 2, heads)
        self._layer_rows = np.arange(layers) * 2 * (slots) * heads * positions
        self.regions = like.new_zeros(layers, 2, slots, heads, 0, head_width)
        # Added to attention scores: minus infinity where an image has fewer regions than there is room for.
        self.regions_mask = like.new_zeros(slots, 1, 1, 0)
        self.region_counts = np.zeros(slots, dtype=np.int64)
        self._known_views: dict[tuple[bool, int, int], list[tuple[Tensor, Tensor]]] = {}

    def reserve_regions(self, regions: int) -> None:
        """Makes room for images of up to so many regions; what was kept stays."""
        layers, _, slots, heads, _, head_width = self.words.shape
        before = self.regions.shape[-2]
        fresh = self.like.new_zeros(layers, 2, slots, heads, regions, head_width)
        fresh[..., :before, :] = self.regions
        # Zero where there is no image yet, since a row that may look nowhere gives NaN.
        mask = self.like.new_full((slots, 1, 1, regions), -torch.inf if before else 0.0)
        mask[..., :before] = self.regions_mask
        self.regions, self.regions_mask = fresh, mask
        self._known_views.clear()

    def admit(self, slots: Sequence[int], regions: Tensor) -> None:
        """An image's region keys and values `(layers, 2, heads, R, d / heads)`, for each of its captions' slots."""
        count = regions.shape[-2]
        if count > self.regions.shape[-2]:
            self.reserve_regions(count)
        for slot in slots:
            self.regions[:, :, slot, :, :count] = regions
            self.regions_mask[slot, ..., :count] = 0
            self.regions_mask[slot, ..., count:] = -torch.inf
            self.region_counts[slot] = count

    def copy(self, to: np.ndarray, source: np.ndarray, regions: bool) -> None:
        """Slot `to[i]` becomes what slot `source[i]` was, all at once; without `regions`, but for its image."""
        target, origin = self._index(to), self._index(source)
        self.words[:, :, target] = self.words[:, :, origin]
        self.states[target] = self.states[origin]
        if regions:
            self.regions[:, :, target] = self.regions[:, :, origin]
            self.regions_mask[target] = self.regions_mask[origin]
            self.region_counts[to] = self.region_counts[source]

    def place(self, slots: np.ndarray, words: np.ndarray, run: bool) -> Place:
        """The place of `words (G, T)` (positions, rising) of `slots (G,)`; `run`: the slots are 0, 1, 2, ..."""
        reach = int(words[:, -1].max()) + 1
        index: slice | Tensor = slice(0, len(slots)) if run else self._index(slots)
        words_mask = None
        if words.shape[1] > 1 or int(words.min()) + 1 < reach:
            hidden = np.arange(reach) > words[..., None]  # (G, T, length)
            words_mask = self._send(np.where(hidden, -np.inf, 0.0)[:, None]).to(self.like.dtype)
        regions_mask = None
        if (self.region_counts[slots] < self.regions.shape[-2]).any():
            regions_mask = self.regions_mask[index]
        rows = self._first_row[slots][:, None] + words[..., None, None]  # (G, T, 2, heads)
        return Place(len(slots), index, self._send(rows.reshape(-1)), reach, words_mask, regions_mask)

    def write(self, layer: int, keys_values: Tensor, place: Place) -> None:
        """Keys and values `(G, T, 2, heads, d / heads)` of a layer (from 1)."""
        rows = keys_values.reshape(-1, keys_values.shape[-1])
        self._flat_layers[layer - 1].index_copy_(0, place.rows, rows)

    def write_layers(self, first: int, keys_values: Tensor, slots: np.ndarray, words: np.ndarray) -> None:
        """Keys and values `(M, layers, 2, heads, d / heads)` of M words, for the layers from `first` on."""
        layers = self._layer_rows[first - 1 : first - 1 + keys_values.shape[1]]
        rows = self._first_row[slots][:, None] + words[:, None, None, None] + layers[:, None, None]
        self._flat.index_copy_(0, self._send(rows.reshape(-1)), keys_values.reshape(-1, keys_values.shape[-1]))

    def words_of(self, layer: int, place: Place) -> tuple[Tensor, Tensor]:
        """Keys and values of the words read, each `(G, heads, length, d / heads)`."""
        if isinstance(place.slots, slice):
            return self._views(self.words, place.groups, place.length)[layer - 1]
        keys, values = self.words[layer - 1, :, place.slots, :, : place.length]
        return keys, values

    def regions_of(self, layer: int, place: Place) -> tuple[Tensor, Tensor]:
        """Keys and values of the regions, each `(G, heads, R, d / heads)`."""
        if isinstance(place.slots, slice):
            return self._views(self.regions, place.groups, self.regions.shape[-2])[layer - 1]
        keys, values = self.regions[layer - 1, :, place.slots]
        return keys, values

    def _views(self, kept: Tensor, groups: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, keys and values of the first slots. Made once: making views takes as long as using them."""
        key = (kept is self.words, groups, length)
        if key not in self._known_views:
            self._known_views[key] = [(both[0, :groups, :, :length], both[1, :groups, :, :length]) for both in kept]
        return self._known_views[key]

    def state_rows(self, slots: np.ndarray, words: np.ndarray) -> Tensor:
        """Where in `flat_states` the states of `words` of `slots` are, the two of one shape: `(words.size,)`."""
        return self._send((slots * self.positions + words).reshape(-1))

    def _index(self, slots: np.ndarray) -> Tensor:
        return self._send(np.asarray(slots, dtype=np.int64))

    def _send(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.like.device)
