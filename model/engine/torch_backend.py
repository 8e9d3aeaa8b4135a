"""The engine's layers in PyTorch: on a GPU, and on a CPU in float64, where the tests hold the engine to the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.deecap import DeeCap
from model.engine.backend import Span
from model.engine.cache import Cache
from model.engine.linear import linear_maker
from model.engine.network import Decision, Network


@dataclass(frozen=True)
class TorchReached:
    """See `model.engine.backend.Reached`; besides, what a deeper span goes on from."""

    state: Tensor  # (G, d), of the newest words
    shallow: Tensor | None  # (G, k)
    decision: Decision | None
    guess: Tensor | None

    @property
    def decided(self) -> np.ndarray:
        found = self._decision
        return torch.stack((found.words.to(found.entropies), found.entropies, found.best), 1).cpu().numpy()

    @property
    def guesses(self) -> np.ndarray | None:
        return None if self.guess is None else self.guess.cpu().numpy()

    def top(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        log_p = self._decision.log_probabilities
        best, words = log_p[torch.from_numpy(rows).to(log_p.device)].topk(count, dim=-1)
        return words.cpu().numpy(), best.cpu().numpy()

    @property
    def _decision(self) -> Decision:
        assert self.decision is not None
        return self.decision


class TorchBackend:
    """See `model.engine.backend.Backend`."""

    def __init__(self, model: DeeCap, tested: Sequence[int], slots: int, dtype: torch.dtype, device: str) -> None:
        config = model.config
        self._like = torch.zeros((), dtype=dtype, device=device)
        self._network = Network(model, tested, linear_maker(self._like), self._like)
        self._cache = Cache(model.layers, slots, config.heads, config.max_words + 1, config.width, self._like)

    @torch.inference_mode()
    def encode(self, features: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        parameter = self._network.model.box_in.weight
        return self._network.model.encode(features.to(parameter), boxes.to(parameter), mask.to(parameter.device))

    @torch.inference_mode()
    def admit(self, slots: list[int], memory: Tensor) -> None:
        self._cache.admit(slots, self._network.region_keys_values(memory.to(self._like)))

    @torch.inference_mode()
    def copy(self, to: np.ndarray, source: np.ndarray, regions: bool) -> None:
        self._cache.copy(to, source, regions)

    @torch.inference_mode()
    def copy_up(self, span: Span, slots: np.ndarray, words: np.ndarray) -> None:
        states = self._cache.flat_states.index_select(0, self._cache.state_rows(slots, words))
        self._cache.write_layers(span.first, self._network.copy_up[span.first](states), slots, words)

    @torch.inference_mode()
    def start(self, span: Span, slots: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> TorchReached:
        state = self._network.embed(self._send(tokens), self._send(positions))
        return self._run(span, slots, positions[:, None], state, None)

    @torch.inference_mode()
    def go_on(
        self, span: Span, slots: np.ndarray, words: np.ndarray, before: TorchReached, rows: np.ndarray
    ) -> TorchReached:
        state, shallow = before.state, before.shallow
        if len(rows) < len(state):
            kept = self._send(rows)
            state = state.index_select(0, kept)
            shallow = None if shallow is None else shallow.index_select(0, kept)
        if words.shape[1] > 1:  # catch-up: all of these words have got as far as the newest
            state = self._cache.flat_states[self._cache.state_rows(slots[:, None], words)]
        return self._run(span, slots, words, state, shallow)

    def _run(
        self, span: Span, slots: np.ndarray, words: np.ndarray, state: Tensor, shallow: Tensor | None
    ) -> TorchReached:
        network, cache = self._network, self._cache
        place = cache.place(slots, words, run=bool(slots[-1] == len(slots) - 1))
        many = words.shape[1]
        for m in range(span.first, span.last + 1):
            state = network.layers[m - 1](state, cache, place)
            newest = state[many - 1 :: many]
            shallow = network.grow(m, newest, shallow)
        if span.last == len(network.layers):
            return TorchReached(newest, None, network.decide(newest), None)
        cache.flat_states[cache.state_rows(slots[:, None], words)] = state
        if not span.tested:
            return TorchReached(newest, shallow, None, None)
        guess = network.guessed_entropy(span.last, newest) if network.guess else None
        return TorchReached(newest, shallow, network.decide(network.exit(span.last, newest, shallow)), guess)

    def _send(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._like.device)
