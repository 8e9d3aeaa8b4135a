"""The passes of the PyTorch engine, as they run on the device: tensors in, tensors out, the rest in static buffers.

Nothing in Python depends on what a tensor holds, so a pass of given sizes can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.deecap import DeeCap
from model.engine.backend import Span
from model.engine.cache import Cache
from model.engine.linear import linear_maker
from model.engine.network import Network


class Passes:
    """One network and its cache, which has a scratch slot for the rows that only pad a batch."""

    def __init__(self, model: DeeCap, tested: Sequence[int], slots: int, like: Tensor) -> None:
        """`like`: a tensor of the type and on the device in which all runs."""
        self.network = Network(model, tested, linear_maker(like), like)
        config = model.config
        self.cache = Cache(model.layers, slots, config.heads, config.max_words, config.width, like)
        # What earlier layers gave to the exits of deeper ones, of each slot's newest word.
        self._shallow = like.new_zeros(self.cache.scratch + 1, self.network.shallow_width)

    def run(self, span: Span, many: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A span, which ends in an exit, for `rows (4, G)`: slot, first and newest position, newest token.

        `many` words each: from the first on, the newest again and again where there are fewer. Returns what was decided
        `(G, 3)`, see `Reached`, with the guess as a fourth column where there is an exit head; and the
        log-probabilities `(G, V)`; both float32 or wider.
        """
        network, cache = self.network, self.cache
        slots, first, newest, tokens = rows
        words = newest[:, None]
        if many > 1:
            words = torch.minimum(first[:, None] + cache.positions[:many], words)
        place = cache.place(slots, words)
        shallow = None
        if span.first == 1:
            state = network.embed(tokens, newest)
        else:  # all of these words have got as far as the layer before
            state = cache.states.index_select(0, place.states)
            if network.shallow:
                shallow = self._shallow.index_select(0, slots)
        deepest = span.last == len(network.layers)
        for m in range(span.first, span.last + 1):
            state = network.layers[m - 1](state, cache, place)
            if not deepest:
                shallow = network.grow(m, state[many - 1 :: many], shallow)
        last = state[many - 1 :: many]
        found = network.decide(network.exit(span.last, last, shallow))
        decided = [found.words.to(found.best), found.entropies, found.best]
        if not deepest:
            cache.states.index_copy_(0, place.states, state)
            if shallow is not None:
                self._shallow.index_copy_(0, slots, shallow)
            if network.guess:
                decided.append(network.guessed_entropy(span.last, last).to(found.best))
        return torch.stack(decided, 1), found.log_probabilities

    def copy_up(self, span: Span, rows: Tensor) -> tuple[()]:
        """Keys and values at the span's layers from the states that words left with; `rows (2, M)`: slot, position."""
        slots, words = rows
        states = self.cache.states.index_select(0, self.cache.state_rows(slots, words))
        self.cache.write_layers(span.first, self.network.copy_up[span.first](states), slots, words)
        return ()
