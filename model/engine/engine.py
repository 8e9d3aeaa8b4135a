"""The decoding engine: many captions in the making share every step, each at its own τ, beam and length.

A caption joins or leaves at any step, and a layer runs only for the words that still need it. One thread drives it:
`submit` and `cancel`, then `step` until `finished` has what was asked for. It decides as `model.decoding.search` does.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from model.decoding.beam import LARGEST_BEAM, Beam, Candidates, Step
from model.decoding.repeats import first_allowed, most_ruled_out, repeating
from model.deecap import DeeCap
from model.engine.backend import Reached, Span
from model.engine.folding import ENGINE_FUSIONS
from model.engine.precision import Precision
from model.exits import ExitPolicy
from model.vocabulary import BOS, EOS


@dataclass(frozen=True)
class Finished:
    """A request that is over: `ended` with its caption, or `cancelled` or past its `deadline` with what there was."""

    number: int  # as `submit` gave it
    steps: list[Step]
    reason: str  # ended, cancelled or deadline


@dataclass
class _Request:
    number: int
    memory: Tensor  # (R, d)
    tau: float
    beam: Beam | None  # None: greedy
    deadline: float
    slots: list[int] = field(default_factory=list)  # one for each live hypothesis, in the beam's order

    @property
    def width(self) -> int:
        return self.beam.width if self.beam else 1


WORD, ENTROPY, LOG_PROBABILITY, EXIT_LAYER = range(4)  # columns of what is noted of a step


class Engine:
    """Continuous batching over a fixed number of slots; a beam takes one slot for each hypothesis."""

    def __init__(
        self,
        model: DeeCap,
        policy: ExitPolicy,
        precision: Precision,
        slots: int = 32,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `ValueError` for a fusion that only the plain decoder has, or no slots."""
        if slots < 1:
            raise ValueError(f"slots must be 1 or more, not {slots}")
        config = model.config
        if policy.tested and config.exits in ("deecap", "shallow") and config.fusion not in ENGINE_FUSIONS:
            raise ValueError(f"the engine has no {config.fusion} fusion: use the plain decoder")
        self._backend = precision.backend(model, policy.tested, slots)
        self._policy, self._clock = policy, clock
        self._copied = policy.skipped == "copied"
        self._width, self._vocabulary_size, self._max_words = config.width, config.vocabulary_size, config.max_words
        self._layers, self._no_repeats = model.layers, config.no_repeats
        ends = [0, *policy.tested, model.layers]
        self._spans = [Span(a + 1, b, b < model.layers) for a, b in pairwise(ends)]
        self._whole = [Span(1, model.layers, False)]
        self._slots = slots
        self._numbers = 0
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}  # by number
        self._finished: list[Finished] = []
        self._soonest = math.inf  # deadline of those that wait or run, or an earlier one
        # By slot; slots in use are always 0, 1, ... `_used` - 1.
        self._filled = np.zeros((model.layers, slots), dtype=np.int64)  # words with keys and values at each layer
        self._used = 0
        self._owner: list[_Request | None] = [None] * slots
        self._live = np.zeros(slots, dtype=bool)  # false: kept for a hypothesis that its beam does not have yet
        self._taus = np.zeros(slots)
        self._tokens = np.zeros(slots, dtype=np.int64)  # the newest word, not yet run
        self._lengths = np.zeros(slots, dtype=np.int64)  # words decided so far
        self._history = np.zeros((slots, config.max_words, 4))  # of greedy captions; see the columns above
        self._every_slot = np.arange(slots)
        # What the step under way decided; the candidates only where there are beams.
        self._decided = np.zeros((slots, 4))
        spare = most_ruled_out(config.max_words) if config.no_repeats else 0
        self._most = min(2 * LARGEST_BEAM + spare, config.vocabulary_size)
        self._top_words = np.zeros((slots, self._most), dtype=np.int64)
        self._top_log_probabilities = np.zeros((slots, self._most))
        # What the requests that run have in common, so that steps without beams, or at full depth, spare the looking.
        self._searches: list[_Request] = []
        self._early = False
        self.executed_rows = 0  # (layer, word) pairs so far, as `DecoderState` counts them

    # What a worker calls ---------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Slots that neither run a hypothesis nor are spoken for by a waiting request."""
        return self._slots - self._used - sum(request.width for request in self._waiting)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._running or self._waiting)

    def prepare(self) -> None:
        """Makes what would otherwise be made when it is first needed, which one caption would wait for."""
        self._backend.prepare([*self._spans, *self._whole], self._copied)

    def encode(self, features: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        """Regions `(B, R, F)` with boxes `(B, R, 4)`, `mask (B, R)` True where a region is -> memory `(B, R, d)`."""
        return self._backend.encode(features, boxes, mask)

    def submit(self, memory: Tensor, tau: float, beam: int = 1, deadline: float = math.inf) -> int:
        """Takes an image's memory `(R, d)` to be captioned; returns the request's number.

        `tau` in nats, `deadline` by the engine's clock in seconds. A request that finds no free slots waits for its
        turn. Raises `ValueError` for a beam outside 1..5 or one wider than the engine, a memory that is none, or a τ
        that is negative or no number.
        """
        if memory.ndim != 2 or memory.shape[1] != self._width or not len(memory):
            raise ValueError(f"memory must be (R, {self._width}), not {tuple(memory.shape)}")
        if not tau >= 0:
            raise ValueError(f"tau must be 0 or more, not {tau}")
        if not 1 <= beam <= min(LARGEST_BEAM, self._slots):
            raise ValueError(f"beam must be from 1 to {min(LARGEST_BEAM, self._slots)}, not {beam}")
        self._numbers += 1
        self._soonest = min(self._soonest, deadline)
        search = Beam(beam, self._no_repeats) if beam > 1 else None
        self._waiting.append(_Request(self._numbers, memory, tau, search, deadline))
        return self._numbers

    def cancel(self, number: int) -> None:
        """Gives a request up; it is among the `finished` at once. Without effect on one that is over, or never was."""
        for request in self._waiting:
            if request.number == number:
                self._waiting.remove(request)
                self._finished.append(Finished(number, [], "cancelled"))
                return
        if number in self._running:
            self._stop([self._running[number]], "cancelled")

    def words_so_far(self, number: int, begin: int = 0) -> list[Step]:
        """What is decided of a greedy request that runs, from word `begin` on; no EOS is among it, since that ends it.

        Nothing for a beam, whose words are only known at its end, and for a request that waits, is over or never was.
        Costs no more than to read it: each step has brought its words to this side of the device.
        """
        request = self._running.get(number)
        return [] if request is None or request.beam else self._greedy_steps(request.slots[0], begin)

    def finished(self) -> list[Finished]:
        """The requests that are over since the last call, in the order in which they were."""
        over, self._finished = self._finished, []
        return over

    def step(self) -> None:
        """One word more for every request that is running, after those past their deadline went and others joined."""
        self._expire()
        self._admit()
        if not self._used:
            return
        self._decide()
        used = self._used
        decided, lengths = self._decided[:used], self._lengths[:used]
        words = decided[:, WORD]
        self._history[self._every_slot[:used], lengths] = decided
        self._tokens[:used] = words
        lengths += 1
        ended = (words == EOS) | (lengths == self._max_words)
        over: list[_Request] = []
        if ended.any():
            over = [owner for slot in np.flatnonzero(ended) if (owner := self._owner[slot]) and owner.beam is None]
        if self._searches:
            over += self._advance_beams()
        if over:
            self._stop(over, "ended")

    # Requests --------------------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        if self._soonest == math.inf or self._soonest > (now := self._clock()):
            return
        late = [request for request in self._waiting if request.deadline <= now]
        for request in late:
            self._waiting.remove(request)
            self._finished.append(Finished(request.number, [], "deadline"))
        running = [request for request in self._running.values() if request.deadline <= now]
        if running:
            self._stop(running, "deadline")
        left = [*self._waiting, *self._running.values()]
        self._soonest = min((request.deadline for request in left), default=math.inf)

    def _admit(self) -> None:
        """Waiting requests in their order, as long as the next one's hypotheses find room."""
        if not self._waiting:
            return
        while self._waiting and self._used + self._waiting[0].width <= self._slots:
            request = self._waiting.popleft()
            # All hypotheses of a beam start alike, as one; the room for the others is kept.
            request.slots = list(range(self._used, self._used + request.width))
            for slot in request.slots:
                self._owner[slot] = request
            self._taus[request.slots], self._tokens[request.slots], self._lengths[request.slots] = request.tau, BOS, 0
            self._live[request.slots] = [True, *[False] * (request.width - 1)]
            self._used += request.width
            self._running[request.number] = request
            self._filled[:, request.slots] = 0
            self._history[request.slots, :, WORD] = -1  # no word: see `repeating`
            self._backend.admit(request.slots, request.memory)
        self._look_over()

    def _stop(self, requests: Sequence[_Request], reason: str) -> None:
        """Hands out what the requests have come to and frees their slots."""
        for request in requests:
            self._finished.append(Finished(request.number, self._steps_of(request), reason))
            del self._running[request.number]
            for slot in request.slots:
                self._owner[slot] = None
        # Slots in use stay a run from 0: those beyond the new end move into the holes.
        used = sum(owner is not None for owner in self._owner)
        holes = [slot for slot in range(used) if self._owner[slot] is None]
        if holes:
            moving = [slot for slot in range(used, self._used) if self._owner[slot] is not None]
            self._move(np.array(moving), np.array(holes))
        self._used = used
        self._look_over()

    def _look_over(self) -> None:
        """Notes what the requests that now run have in common."""
        self._searches = [request for request in self._running.values() if request.beam]
        self._early = bool(self._taus[: self._used].any())

    def _move(self, source: np.ndarray, to: np.ndarray) -> None:
        self._backend.copy(to, source, regions=True)
        self._filled[:, to] = self._filled[:, source]
        for old, new in zip(source.tolist(), to.tolist(), strict=True):
            owner = self._owner[old]
            assert owner is not None
            owner.slots[owner.slots.index(old)] = new
            self._owner[new], self._owner[old] = owner, None
        for kept in (self._live, self._taus, self._tokens, self._lengths):
            kept[to] = kept[source]
        self._history[to] = self._history[source]

    def _steps_of(self, request: _Request) -> list[Step]:
        if request.beam:
            ranked = request.beam.ranked()
            return ranked[0] if ranked else []
        return self._greedy_steps(request.slots[0])

    def _greedy_steps(self, slot: int, begin: int = 0) -> list[Step]:
        return [
            Step(int(word), int(exit_layer), entropy, log_probability)
            for word, entropy, log_probability, exit_layer in self._history[slot, begin : self._lengths[slot]].tolist()
        ]

    # One step --------------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        """Runs the newest word of every live slot until each has left at its own exit."""
        slots = self._every_slot[: self._used]
        if self._searches:
            slots = np.flatnonzero(self._live[: self._used])
        rows = self._every_slot[: len(slots)]
        reached: Any = None
        for span in self._spans if self._early else self._whole:  # at τ = 0 no exit is tested
            reached = self._run(span, slots, reached, rows)
            if span.last == self._layers:
                self._take(span.last, slots, reached, None)
                return
            leaving = self._leaving(slots, reached)
            rows = np.flatnonzero(~leaving)
            if not len(rows):
                self._take(span.last, slots, reached, None)
                return
            if len(rows) < len(slots):
                self._take(span.last, slots, reached, leaving)
            slots = slots[rows]

    def _run(self, span: Span, slots: np.ndarray, before: Any, rows: np.ndarray) -> Any:
        """A span for the newest word of `slots`, with its catch-up; they are `rows` of the pass `before`."""
        newest = self._lengths[slots]
        depth = span.last - span.first + 1
        if span.first == 1:
            self.executed_rows += depth * len(slots)
            if span.last == self._layers:  # else nobody asks: no word is ever missing at the layers of the first span
                self._filled[:, slots] = newest + 1
            return self._backend.start(span, slots, newest, self._tokens[slots])
        filled = self._filled[span.first - 1, slots]
        missing = newest - filled
        words = newest[:, None]
        most = int(missing.max())
        self.executed_rows += depth * (len(slots) if self._copied else int((missing + 1).sum()))
        if most and self._copied:
            owners = np.repeat(slots, missing)
            within = np.arange(len(owners)) - np.repeat(missing.cumsum() - missing, missing)
            self._backend.copy_up(span, owners, np.repeat(filled, missing) + within)
        elif most:
            # Slots that lack fewer words than others run their newest one more than once, to the same values.
            words = np.minimum(filled[:, None] + np.arange(most + 1), words)
        self._filled[span.first - 1 : span.last, slots] = newest + 1
        return self._backend.go_on(span, slots, words, before, rows)

    def _leaving(self, slots: np.ndarray, reached: Reached) -> np.ndarray:
        """Which rows leave at an exit above which there are layers, as booleans."""
        taus = self._taus[slots]
        leaving: np.ndarray = reached.decided[:, ENTROPY] < taus
        if self._policy.margin is not None:
            assert reached.guesses is not None  # `load_bundle` sees to it that there is a head
            leaving &= reached.guesses <= taus + self._policy.margin
        return leaving

    def _take(self, m: int, slots: np.ndarray, reached: Reached, leaving: np.ndarray | None) -> None:
        """Notes what the rows that leave at layer m say; None: all of them."""
        said = reached.decided
        if leaving is not None:
            slots, said = slots[leaving], said[leaving]
        self._decided[slots, :EXIT_LAYER] = said
        self._decided[slots, EXIT_LAYER] = m
        if not (self._searches or self._no_repeats):
            return
        rows = self._every_slot[: len(slots)] if leaving is None else np.flatnonzero(leaving)
        if self._searches:
            self._top_words[slots], self._top_log_probabilities[slots] = reached.top(rows, self._most)
        if self._no_repeats:
            if self._searches:  # beams see to it themselves
                greedy = np.array([owner is not None and owner.beam is None for owner in self._owner])[slots]
                slots, rows = slots[greedy], rows[greedy]
            self._put_other_words(slots, reached, rows)

    def _put_other_words(self, slots: np.ndarray, reached: Reached, rows: np.ndarray) -> None:
        """Where the likeliest word would repeat, the likeliest that does not. `slots`: `rows` of what was reached."""
        again = repeating(self._history[slots, :, WORD], self._lengths[slots], self._decided[slots, WORD])
        if not again.any():
            return
        slots = slots[again]
        words, log_probabilities = reached.top(rows[again], self._most)
        for slot, candidates, probabilities in zip(slots.tolist(), words.tolist(), log_probabilities, strict=True):
            place = first_allowed(candidates, self._history[slot, : self._lengths[slot], WORD].tolist())
            self._decided[slot, [WORD, LOG_PROBABILITY]] = candidates[place], probabilities[place]

    def _advance_beams(self) -> list[_Request]:
        """Moves beams one step on; returns those that are over."""
        over: list[_Request] = []
        sources, targets = [], []
        for request in self._searches:
            search = request.beam
            assert search is not None
            used = request.slots[: len(search.live)]
            parents = search.advance(
                [
                    Candidates(
                        self._top_words[slot].tolist(),
                        self._top_log_probabilities[slot].tolist(),
                        int(self._decided[slot, EXIT_LAYER]),
                        float(self._decided[slot, ENTROPY]),
                    )
                    for slot in used
                ]
            )
            if not search.live or self._lengths[request.slots[0]] == self._max_words:
                over.append(request)
                continue
            self._live[request.slots] = np.arange(search.width) < len(search.live)
            for slot, parent, hypothesis in zip(request.slots, parents, search.live, strict=False):
                self._tokens[slot] = hypothesis.steps[-1].token
                if used[parent] != slot:
                    targets.append(slot)
                    sources.append(used[parent])
        if targets:
            to, source = np.array(targets), np.array(sources)
            self._backend.copy(to, source, regions=False)
            self._filled[:, to] = self._filled[:, source]
        return over
