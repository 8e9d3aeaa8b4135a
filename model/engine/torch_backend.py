"""The engine's layers in PyTorch: on a GPU as CUDA graphs; on a CPU in float64, where tests hold it to the oracle.

The device's part is in `model.engine.passes`; this is the host's. Batches are padded up to buckets with rows that write
to a scratch slot, numbers go in and decisions come out through static buffers, and each pass of given sizes is prepared
once: captured on a GPU, left as it is on a CPU. The host waits for the device once a pass, for its decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model.deecap import DeeCap
from model.engine.backend import Span
from model.engine.buckets import bucket, buckets
from model.engine.graphs import Graphs, Prepare, Work, as_it_is
from model.engine.passes import Passes
from model.engine.transfers import Inbox, Outbox


@dataclass(frozen=True)
class TorchReached:
    """See `model.engine.backend.Reached`. Good until the next pass."""

    rows: int
    outbox: Outbox
    log_probabilities: Tensor  # (G or more, V), on the device

    @property
    def decided(self) -> np.ndarray:
        return self.outbox.read(self.rows)[:, :3]

    @property
    def guesses(self) -> np.ndarray | None:
        found = self.outbox.read(self.rows)
        return found[:, 3] if found.shape[1] > 3 else None

    def top(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        log_p = self.log_probabilities
        best, words = log_p[torch.from_numpy(rows).to(log_p.device)].topk(count, dim=-1)
        both = torch.stack((words.to(best), best)).cpu().numpy()  # in one copy: words are exact up to 2^24
        return both[0].astype(np.int64), both[1]


class TorchBackend:
    """See `model.engine.backend.Backend`. A pass finds its slots' states where the span before left them."""

    def __init__(
        self,
        model: DeeCap,
        tested: Sequence[int],
        slots: int,
        dtype: torch.dtype,
        device: str,
        new_prepare: Callable[[], Prepare] | None = None,
    ) -> None:
        """`new_prepare`: gives what prepares passes over one set of buffers; by default as the device allows."""
        config = model.config
        self._like = torch.zeros((), dtype=dtype, device=device)
        where = self._like.device
        self._passes = Passes(model, tested, slots, self._like)
        on_gpu = where.type == "cuda"
        self._new_prepare = new_prepare or ((lambda: Graphs(where)) if on_gpu else (lambda: as_it_is))
        self._prepare = self._new_prepare()
        self._prepared: dict[tuple[Span, int, int], Work] = {}
        self._prepared_copies: dict[tuple[Span, int], Work] = {}
        ends = [0, *tested, model.layers]
        self._spans = [Span(a + 1, b, b < model.layers) for a, b in pairwise(ends)]
        if tested:  # at τ = 0 none is
            self._spans.append(Span(1, model.layers, False))
        # The largest sizes of a pass: rows, words of a row, and words whose keys and values are copied up.
        self._slots, self._most_words, self._most_copied = slots, config.max_words, slots * config.max_words
        scratch = self._passes.cache.scratch
        self._rows = Inbox((scratch, 0, 0, 0), slots, where)  # slot, first and newest position, token
        self._copied = Inbox((scratch, 0), self._most_copied, where)  # slot, position
        columns = 4 if self._passes.network.guess else 3
        self._outbox = Outbox(slots, columns, torch.promote_types(dtype, torch.float32), where)

    @torch.inference_mode()
    def encode(self, features: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        model = self._passes.network.model
        parameter = model.box_in.weight
        return model.encode(features.to(parameter), boxes.to(parameter), mask.to(parameter.device))

    def prepare(self, spans: Sequence[Span], copied: bool) -> None:
        """Nothing: buffers are as large as the first image wants them, and passes are made with them."""

    @torch.inference_mode()
    def admit(self, slots: list[int], memory: Tensor) -> None:
        if self._passes.cache.make_room(len(memory)):
            self._start_over()
        self._passes.cache.admit(slots, self._passes.network.region_keys_values(memory.to(self._like)))

    def _start_over(self) -> None:
        """Prepares passes over the buffers as they are now: those without catch-up at once, the others when needed."""
        self._prepared.clear()
        self._prepared_copies.clear()
        self._prepare = self._new_prepare()
        for span in self._spans:
            for groups in buckets(self._slots):
                self._pass(span, groups, 1)

    @torch.inference_mode()
    def copy(self, to: np.ndarray, source: np.ndarray, regions: bool) -> None:
        self._passes.cache.copy(to, source, regions)

    @torch.inference_mode()
    def copy_up(self, span: Span, slots: np.ndarray, words: np.ndarray) -> None:
        key = span, bucket(len(slots), self._most_copied)
        if key not in self._prepared_copies:
            self._copied.clear()
            rows = self._copied.tensor[:, : key[1]]
            self._prepared_copies[key] = self._prepare(partial(self._passes.copy_up, span, rows))
        self._copied.send(slots, words)
        self._prepared_copies[key]()

    @torch.inference_mode()
    def start(self, span: Span, slots: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> TorchReached:
        return self._run(span, slots, positions[:, None], tokens)

    @torch.inference_mode()
    def go_on(
        self, span: Span, slots: np.ndarray, words: np.ndarray, before: TorchReached, rows: np.ndarray
    ) -> TorchReached:
        return self._run(span, slots, words, np.zeros_like(slots))

    def _run(self, span: Span, slots: np.ndarray, words: np.ndarray, tokens: np.ndarray) -> TorchReached:
        groups, many = words.shape
        work = self._pass(span, bucket(groups, self._slots), bucket(many, self._most_words))
        self._rows.send(slots, words[:, 0], words[:, -1], tokens)
        decided, log_probabilities = work()
        self._outbox.take(decided)
        return TorchReached(groups, self._outbox, log_probabilities)

    def _pass(self, span: Span, groups: int, many: int) -> Work:
        key = span, groups, many
        if key not in self._prepared:
            self._rows.clear()  # it may be run now, and a pass that is run twice goes on from where it came to
            self._prepared[key] = self._prepare(partial(self._passes.run, span, many, self._rows.tensor[:, :groups]))
        return self._prepared[key]
