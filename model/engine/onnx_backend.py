"""The engine's layers in ONNX Runtime, on a CPU: float32, or int8 weights with activations quantised per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from model.deecap import DeeCap
from model.engine.backend import Span
from model.engine.onnx_graph import (
    Arithmetic,
    copy_up_graph,
    decoder_graph,
    encoder_graph,
    regions_graph,
)
from model.saturation import saturates

FEW_ROWS = 4  # up to here the operator for few rows is the quicker one

NOTHING = np.zeros(0, np.float32)  # what a last layer leaves to go on from


class OnnxReached:
    """See `model.engine.backend.Reached`; besides, what a deeper span goes on from. Good until the next pass."""

    def __init__(self, found: dict[str, np.ndarray]) -> None:
        self.state = found.get("new_state", NOTHING)  # (G, T, d)
        self.shallow = found.get("new_shallow")  # (G, k)
        self.guesses = found.get("guesses")
        if "log_p" in found:  # at an exit
            self.log_p, self.decided = found["log_p"], found["decided"]  # (G, V) and (G, 3)

    def top(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        log_p = torch.from_numpy(self.log_p[rows])
        best, words = log_p.topk(count, dim=-1)
        return words.numpy(), best.numpy()


@dataclass(frozen=True)
class _Plan:
    """A pass over the first so many slots, bound to its buffers once: only their contents change."""

    session: onnxruntime.InferenceSession
    binding: Any
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class OnnxBackend:
    """See `model.engine.backend.Backend`. Graphs are built when first needed."""

    def __init__(self, model: DeeCap, tested: Sequence[int], slots: int, int8: bool) -> None:
        config = model.config
        self._model = model
        self._int8, self._slots = int8, slots
        # Without VNNI, sums of two products of bytes are kept in 16 bits: half as many levels always fit.
        self._levels = 63 if int8 and saturates() else 127
        gated = config.exits in ("deecap", "shallow") and bool(tested)
        self._shallow_until = max(tested) if gated else 0
        self._layers, self._heads, self._width = model.layers, config.heads, config.width
        self._head_width, self._positions = config.width // config.heads, config.max_words + 1
        self._words = np.zeros(
            (self._layers, 2, slots, self._heads, self._positions, self._head_width), dtype=np.float32
        )
        self._states = np.zeros((slots, self._positions, self._width), dtype=np.float32)
        self._sessions: dict[Any, onnxruntime.InferenceSession] = {}
        self._plans: dict[tuple[int, int, bool, int], _Plan] = {}
        # What a newest word does not see, in passes over one word of each slot: kept words from itself on. The last
        # column is the word itself.
        self._kept_mask = np.full((slots, 1, 1, self._positions + 1), -np.inf, dtype=np.float32)
        self._kept_mask[..., -1] = 0.0
        # A region's key is a column: see `Graph.attend`.
        self._regions_keys = np.zeros((self._layers, slots, self._heads, self._head_width, 0), np.float32)
        self._regions_values = np.zeros((self._layers, slots, self._heads, 0, self._head_width), np.float32)
        self._regions_mask = np.zeros((slots, 1, 1, 0), np.float32)
        # Keys and values of an image's regions are made when a word first gets to the layers that read them: at a fast
        # speed many captions never go deep. By the last layer of each span: the slots that lack them.
        self._memories: list[np.ndarray | None] = [None] * slots  # (R, d); slots of one beam share theirs
        self._lacking: dict[int, set[int]] = {last: set() for last in (*tested, model.layers)}

    def _reserve_regions(self, regions: int) -> None:
        """Makes room for images of up to so many regions; what was kept stays."""
        before = self._regions_mask.shape[-1]
        every = (self._layers, self._slots, self._heads)
        keys = np.zeros((*every, self._head_width, regions), dtype=np.float32)
        keys[..., :before] = self._regions_keys
        values = np.zeros((*every, regions, self._head_width), dtype=np.float32)
        values[..., :before, :] = self._regions_values
        mask = np.full((self._slots, 1, 1, regions), -np.inf if before else 0.0, dtype=np.float32)
        mask[..., :before] = self._regions_mask
        self._regions_keys, self._regions_values, self._regions_mask = keys, values, mask
        self._plans.clear()

    def encode(self, features: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        area = (boxes[..., 2:3] - boxes[..., 0:1]) * (boxes[..., 3:4] - boxes[..., 1:2])
        hidden = np.where(mask.numpy(), 0.0, -np.inf).astype(np.float32)[:, None, None]
        feeds = {"features": features.float().numpy(), "boxes": torch.cat((boxes, area), -1).float().numpy()}
        # In float32 whatever the decoder has: int8 here moved more captions than all of the decoder's did. And an
        # image's regions are enough work for all cores.
        how, cores = Arithmetic("float32"), torch.get_num_threads()
        session = self._session("encoder", how, lambda how: encoder_graph(self._model, how), cores)
        (memory,) = session.run(None, {**feeds, "mask": hidden})
        return torch.from_numpy(memory)

    def prepare(self, spans: Sequence[Span], copied: bool) -> None:
        for rows in (1, FEW_ROWS + 1):
            for span in spans:
                self._decoder(span, rows)
                self._regions_session(span, rows)
                if copied and span.first > 1:
                    self._copy_up_session(span, rows)

    def admit(self, slots: list[int], memory: Tensor) -> None:
        count = len(memory)
        if count > self._regions_mask.shape[-1]:
            self._reserve_regions(count)
        array = memory.float().numpy()
        for slot in slots:
            self._memories[slot] = array
            # What is masked must be numbers all the same: of a NaN that another image left here there is no masking.
            self._words[:, :, slot] = 0.0
            self._regions_keys[:, slot, ..., count:] = 0.0
            self._regions_values[:, slot, :, count:] = 0.0
            self._regions_mask[slot, ..., :count] = 0
            self._regions_mask[slot, ..., count:] = -np.inf
            self._kept_mask[slot, ..., :-1] = -np.inf
        for lacking in self._lacking.values():
            lacking.update(slots)

    def _look(self, span: Span, slots: set[int]) -> None:
        """Makes keys and values of the regions at the span's layers, for slots that lack them."""
        memory = self._memories[min(slots)]
        assert memory is not None
        count = len(memory)
        keys, values = self._regions_session(span, count).run(None, {"memory": memory})
        layers = slice(span.first - 1, span.last)
        alike = {slot for slot in slots if self._memories[slot] is memory}
        for slot in alike:
            self._regions_keys[layers, slot, ..., :count] = keys
            self._regions_values[layers, slot, :, :count] = values
        for last in self._lacking:
            if span.first <= last <= span.last:
                self._lacking[last] -= alike
        if rest := slots - alike:
            self._look(span, rest)

    def copy(self, to: np.ndarray, source: np.ndarray, regions: bool) -> None:
        self._words[:, :, to] = self._words[:, :, source]
        self._states[to] = self._states[source]
        self._kept_mask[to] = self._kept_mask[source]
        if regions:
            self._regions_keys[:, to] = self._regions_keys[:, source]
            self._regions_values[:, to] = self._regions_values[:, source]
            self._regions_mask[to] = self._regions_mask[source]
            moves = dict(zip(to.tolist(), source.tolist(), strict=True))
            memories = {new: self._memories[old] for new, old in moves.items()}
            for new, memory in memories.items():
                self._memories[new] = memory
            for last, lacking in self._lacking.items():
                still = {new for new, old in moves.items() if old in lacking}
                self._lacking[last] = (lacking - moves.keys()) | still

    def copy_up(self, span: Span, slots: np.ndarray, words: np.ndarray) -> None:
        (both,) = self._copy_up_session(span, len(slots)).run(None, {"state": self._states[slots, words]})
        both = both.reshape(len(slots), -1, 2, self._heads, self._head_width)
        # numpy puts the axis of the two index arrays first, which is where `both` has it.
        self._words[span.first - 1 : span.last, :, slots, :, words] = both

    def start(self, span: Span, slots: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> OnnxReached:
        # From now on the word before is seen. A first word has none: -1 is the column of the word itself.
        self._kept_mask[slots, 0, 0, positions - 1] = 0.0
        return self._run(span, slots, positions[:, None], {"tokens": tokens, "positions": positions})

    def go_on(
        self, span: Span, slots: np.ndarray, words: np.ndarray, before: OnnxReached, rows: np.ndarray
    ) -> OnnxReached:
        state = self._states[slots[:, None], words] if words.shape[1] > 1 else before.state[rows, -1:]
        entering = {"state": state}
        if before.shallow is not None:
            entering["shallow"] = before.shallow[rows]
        return self._run(span, slots, words, entering)

    def _run(self, span: Span, slots: np.ndarray, words: np.ndarray, entering: dict[str, np.ndarray]) -> OnnxReached:
        groups, many = words.shape
        lacking = self._lacking[span.last]
        if lacking and (here := lacking.intersection(slots.tolist())):
            self._look(span, here)
        if many == 1 and slots[-1] == groups - 1:
            key = (span.first, span.last, span.tested, groups)
            plan = self._plans.get(key) or self._plans.setdefault(key, self._bind(span, groups))
            for name, array in plan.inputs.items():
                array[:] = entering[name]
            plan.session.run_with_iobinding(plan.binding)
            found = plan.outputs
        else:
            found = self._run_anywhere(span, slots, words, entering)
        both = found["keys_values"].reshape(-1, 2, groups, self._heads, many, self._head_width)
        layers = slice(span.first - 1, span.last)
        if groups == many == 1:  # spares the index arrays, which take longer than the copy
            slot, word = int(slots[0]), int(words[0, 0])
            self._words[layers, :, slot, :, word] = both[:, :, 0, :, 0]
            if span.last < self._layers:
                self._states[slot, word] = found["new_state"][0, 0]
        else:
            # (layers, 2, G, heads, T, .) to the order in which numpy gives what it indexes: (G, T, layers, 2, heads, .)
            self._words[layers, :, slots[:, None], :, words] = both.transpose(2, 4, 0, 1, 3, 5)
            if span.last < self._layers:
                self._states[slots[:, None], words] = found["new_state"]
        return OnnxReached(found)

    def _run_anywhere(
        self, span: Span, slots: np.ndarray, words: np.ndarray, entering: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """A pass over slots that are no run from 0, or over several words of each."""
        session = self._decoder(span, words.size)
        feeds = {**entering, "words_mask": self._mask(words), "regions_mask": self._regions_mask[slots]}
        for m in range(span.first, span.last + 1):
            feeds[f"words_keys_{m}"], feeds[f"words_values_{m}"] = self._words[m - 1, :, slots].swapaxes(0, 1)
            feeds[f"regions_keys_{m}"] = self._regions_keys[m - 1, slots]
            feeds[f"regions_values_{m}"] = self._regions_values[m - 1, slots]
        names = [item.name for item in session.get_outputs()]
        wanted = [item.name for item in session.get_inputs()]
        return dict(zip(names, session.run(names, {name: feeds[name] for name in wanted}), strict=True))

    def _mask(self, words: np.ndarray) -> np.ndarray:
        """`(G, 1, T, P + T)`: kept words before the first of the pass are seen, and those of the pass up to now.

        Words that a slot runs again stand both in what is kept and in the pass; they are seen once, in the pass.
        """
        groups, many = words.shape
        mask = np.zeros((groups, 1, many, self._positions + many), dtype=np.float32)
        kept = np.arange(self._positions) >= words[:, :1]  # (G, P)
        mask[:, 0, :, : self._positions] = np.where(kept, -np.inf, 0.0)[:, None]
        later = words[:, None, :] > words[:, :, None]  # (G, T, T), True where the other is later
        # Where the newest word stands more than once, only its last stand counts.
        again = np.concatenate((words[:, :-1] == words[:, 1:], np.zeros((groups, 1), dtype=bool)), 1)
        mask[:, 0, :, self._positions :] = np.where(later | again[:, None], -np.inf, 0.0)
        return mask

    def _bind(self, span: Span, groups: int) -> _Plan:
        session = self._decoder(span, groups)
        binding = session.io_binding()
        inputs: dict[str, np.ndarray] = {}
        kept = {"words_keys": self._words[:, 0], "words_values": self._words[:, 1]}
        kept |= {"regions_keys": self._regions_keys, "regions_values": self._regions_values}
        masks = {"words_mask": self._kept_mask, "regions_mask": self._regions_mask}
        for item in session.get_inputs():
            name, _, number = item.name.rpartition("_")
            if name in kept:
                array = kept[name][int(number) - 1, :groups]
            elif item.name in masks:
                array = masks[item.name][:groups]
            else:
                sizes = {"G": groups, "T": 1, "k": self._shallow_width}
                shape = [sizes.get(size, size) for size in item.shape]
                array = np.zeros(shape, dtype=np.int64 if item.type == "tensor(int64)" else np.float32)
                inputs[item.name] = array
            binding.bind_input(item.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        outputs: dict[str, np.ndarray] = {}
        count = span.last - span.first + 1
        shapes = {
            "keys_values": (2 * count, groups, self._heads, 1, self._head_width),
            "new_state": (groups, 1, self._width),
            "new_shallow": (groups, self._shallow_width),
            "log_p": (groups, self._model.config.vocabulary_size),
            "decided": (groups, 3),
        }
        for item in session.get_outputs():
            array = np.zeros(shapes.get(item.name, (groups,)), dtype=np.float32)
            outputs[item.name] = array
            binding.bind_output(item.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return _Plan(session, binding, inputs, outputs)

    @property
    def _shallow_width(self) -> int:
        return self._width * (2 if self._model.config.exits == "deecap" else 1)

    def _arithmetic(self, rows: int) -> Arithmetic:
        if not self._int8:
            return Arithmetic("float32")
        return Arithmetic("few" if rows <= FEW_ROWS else "many", self._levels)

    def _decoder(self, span: Span, rows: int) -> onnxruntime.InferenceSession:
        how = self._arithmetic(rows)
        return self._session(span, how, lambda how: decoder_graph(self._model, span, how, self._shallow_until))

    def _regions_session(self, span: Span, regions: int) -> onnxruntime.InferenceSession:
        key, how = ("regions", span.first, span.last), self._arithmetic(regions)
        return self._session(key, how, lambda how: regions_graph(self._model, span, how))

    def _copy_up_session(self, span: Span, words: int) -> onnxruntime.InferenceSession:
        return self._session(("up", span), self._arithmetic(words), lambda how: copy_up_graph(self._model, span, how))

    def _session(
        self, key: Any, how: Arithmetic, graph: Callable[[Arithmetic], bytes], threads: int = 1
    ) -> onnxruntime.InferenceSession:
        if (key, how) not in self._sessions:
            options = onnxruntime.SessionOptions()
            # A word's products are too small to share: a second thread gained nothing, and with threads that spin while
            # they wait, those of several sessions kept the cores from one another.
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.log_severity_level = 3
            self._sessions[key, how] = onnxruntime.InferenceSession(
                graph(how), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[key, how]
