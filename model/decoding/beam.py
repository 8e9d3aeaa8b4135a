"""One image's beam search, apart from any network: which hypotheses go on, which have ended, and which is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from model.decoding.repeats import ruled_out
from model.vocabulary import EOS

LARGEST_BEAM = 5


@dataclass(frozen=True)
class Step:
    """One emitted word, EOS included."""

    token: int
    exit_layer: int
    entropy: float  # nats, of the distribution at the exit
    log_probability: float


@dataclass
class Hypothesis:
    """A caption in the making."""

    steps: list[Step] = field(default_factory=list)
    log_probability: float = 0.0

    def extended(self, step: Step) -> Hypothesis:
        return Hypothesis([*self.steps, step], self.log_probability + step.log_probability)

    @property
    def score(self) -> float:
        """Log-probability per step, EOS included: how hypotheses of different lengths compare."""
        return self.log_probability / len(self.steps)


@dataclass(frozen=True)
class Candidates:
    """What one live hypothesis may be followed by: its exit, and the likeliest words there, best first."""

    words: Sequence[int]
    log_probabilities: Sequence[float]
    exit_layer: int
    entropy: float


class Beam:
    """EOS competes at its exit's log-probability; done with `width` ended hypotheses. All start alike, as one."""

    def __init__(self, width: int, no_repeats: bool = False) -> None:
        """`no_repeats`: none goes on with what is `ruled_out`. Raises `ValueError` for a width outside 1..5."""
        if not 1 <= width <= LARGEST_BEAM:
            raise ValueError(f"beam must be from 1 to {LARGEST_BEAM}, not {width}")
        self.width = width
        self.no_repeats = no_repeats
        self.live: list[Hypothesis] = [Hypothesis()]
        self.ended: list[Hypothesis] = []

    def advance(self, columns: Sequence[Candidates]) -> list[int]:
        """One step on: `columns` has the candidates of each live hypothesis, at least 2 * width that may follow it.

        Returns for each hypothesis now live which of the former ones it extends; none once the search is done.
        """
        ranked: list[tuple[float, int, Hypothesis]] = []
        for parent, (hypothesis, column) in enumerate(zip(self.live, columns, strict=True)):
            for word, log_p in self._allowed(hypothesis, column):
                extended = hypothesis.extended(Step(word, column.exit_layer, column.entropy, log_p))
                ranked.append((-extended.log_probability, parent, extended))
        ranked.sort(key=lambda candidate: candidate[:2])
        survivors: list[Hypothesis] = []
        parents: list[int] = []
        for rank, (_, parent, extended) in enumerate(ranked[: 2 * self.width]):
            if extended.steps[-1].token == EOS:
                if rank < self.width:
                    self.ended.append(extended)
            elif len(survivors) < self.width:
                survivors.append(extended)
                parents.append(parent)
        done = len(self.ended) >= self.width
        self.live = [] if done else survivors
        return [] if done else parents

    def _allowed(self, hypothesis: Hypothesis, column: Candidates) -> list[tuple[int, float]]:
        """The 2 * width likeliest words that the hypothesis may go on with; of all, where none may."""
        every = list(zip(column.words, column.log_probabilities, strict=True))
        out = ruled_out([step.token for step in hypothesis.steps]) if self.no_repeats else ()
        return ([(word, log_p) for word, log_p in every if word not in out] or every)[: 2 * self.width]

    def ranked(self) -> list[list[Step]]:
        """The captions, best first; those that never ended compete too."""
        return [hypothesis.steps for hypothesis in sorted([*self.ended, *self.live], key=lambda one: -one.score)]
