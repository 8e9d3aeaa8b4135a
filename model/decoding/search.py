"""Greedy and beam search where each word leaves the decoder at the first layer that is certain enough.

The plain reference: clear and cached, not the fast engine. Semantics (design, section 4): every live hypothesis
exits on its own; EOS competes at that exit's log-probability; hypotheses compare by log-probability per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.decoding.state import DecoderState
from model.deecap import DeeCap, entropy
from model.exits import ExitPolicy
from model.vocabulary import BOS, EOS, NEVER_EMITTED

LARGEST_BEAM = 5


@dataclass(frozen=True)
class Step:
    """One emitted word, EOS included."""

    token: int
    exit_layer: int
    entropy: float  # nats, of the distribution at the exit
    log_probability: float


@dataclass(frozen=True)
class Decoded:
    """The captions of a batch, and the (layer, word) pairs that were computed for them, catch-up included."""

    captions: list[list[Step]]
    executed_rows: int


@dataclass
class _Hypothesis:
    steps: list[Step] = field(default_factory=list)
    log_probability: float = 0.0

    def extended(self, step: Step) -> _Hypothesis:
        return _Hypothesis([*self.steps, step], self.log_probability + step.log_probability)

    @property
    def score(self) -> float:
        return self.log_probability / len(self.steps)


def emission_logits(model: DeeCap, z: Tensor) -> Tensor:
    """Head logits with the words that are never emitted (padding, BOS, unknown) ruled out: `(..., d)` -> `(..., V)`."""
    logits = model.logits(z)
    ruled_out = torch.tensor(NEVER_EMITTED, device=logits.device)
    return logits.index_fill(-1, ruled_out, torch.finfo(logits.dtype).min)


def advance(state: DecoderState, taus: Tensor, policy: ExitPolicy, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decides the newest word of `rows`, each at its own exit.

    Returns log-probabilities `(len(rows), V)`, exit layers `(len(rows),)` and entropies `(len(rows),)`.
    `taus` has one threshold per row of the state; rows with τ = 0 are not tested, since no entropy is below it.
    """
    model, tested = state.model, set(policy.tested)
    chosen: Tensor | None = None
    exit_layers = torch.zeros_like(rows)
    entropies = torch.zeros(len(rows), device=rows.device, dtype=torch.float64)
    undecided = torch.arange(len(rows), device=rows.device)
    for m in range(1, model.layers + 1):
        state.run_layer(m, rows[undecided])
        last = m == model.layers
        if not last and m not in tested:
            continue
        candidates = undecided if last else undecided[taus[rows[undecided]] > 0]
        if not len(candidates):
            continue
        logits = emission_logits(model, model.exit_state(state.newest(m, rows[candidates]), m))
        certainty = entropy(logits)
        leaves = torch.ones_like(candidates, dtype=torch.bool) if last else certainty < taus[rows[candidates]]
        leaving = candidates[leaves]
        if chosen is None:
            chosen = logits.new_zeros(len(rows), logits.shape[-1])
        chosen[leaving] = logits[leaves]
        exit_layers[leaving] = m
        entropies[leaving] = certainty[leaves].double()
        undecided = undecided[~torch.isin(undecided, leaving)]
        if not len(undecided):
            break
    assert chosen is not None  # the last layer always decides
    wide = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    return wide.log_softmax(-1), exit_layers, entropies


@torch.no_grad()
def greedy_search(
    model: DeeCap, memory: Tensor, taus: Sequence[float], policy: ExitPolicy, mask: Tensor | None = None
) -> Decoded:
    """One caption per image of `memory (B, R, d)` by the likeliest word each time; `taus` has one threshold each."""
    state = DecoderState(model, memory, mask)
    thresholds = torch.tensor(taus, dtype=torch.float64, device=memory.device)
    captions: list[list[Step]] = [[] for _ in taus]
    live = torch.arange(len(captions), device=memory.device)
    tokens = torch.full((len(captions),), BOS, device=memory.device)
    for _ in range(model.config.max_words):
        state.append(tokens)
        log_p, exit_layers, entropies = advance(state, thresholds, policy, live)
        best, words = log_p.max(-1)
        columns = zip(
            live.tolist(), words.tolist(), exit_layers.tolist(), entropies.tolist(), best.tolist(), strict=True
        )
        for row, word, exit_layer, certainty, probability in columns:
            captions[row].append(Step(word, exit_layer, certainty, probability))
        tokens[live] = words
        live = live[words != EOS]
        if not len(live):
            break
    return Decoded(captions, state.executed_rows)


@torch.no_grad()
def ranked_search(
    model: DeeCap, memory: Tensor, taus: Sequence[float], policy: ExitPolicy, beam: int, mask: Tensor | None = None
) -> tuple[list[list[list[Step]]], int]:
    """The captions that a beam ends with for each image, best first by log-probability per step, EOS included.

    Beside them, the (layer, word) pairs computed. An image is done when it has `beam` ended hypotheses, or its
    captions are as long as they may be; then those without EOS compete too. Raises `ValueError` for a beam outside
    1..5.
    """
    if not 1 <= beam <= LARGEST_BEAM:
        raise ValueError(f"beam must be from 1 to {LARGEST_BEAM}, not {beam}")
    images = len(taus)
    state = DecoderState(model, memory, mask, captions_per_image=beam)
    thresholds = torch.tensor(taus, dtype=torch.float64, device=memory.device).repeat_interleave(beam)
    # Slots of an image; all start alike, so at the first step only the first slot is live.
    live: list[list[_Hypothesis]] = [[_Hypothesis()] for _ in range(images)]
    ended: list[list[_Hypothesis]] = [[] for _ in range(images)]
    tokens = torch.full((images * beam,), BOS, device=memory.device)
    for _ in range(model.config.max_words):
        state.append(tokens)
        rows = [image * beam + slot for image in range(images) for slot in range(len(live[image]))]
        log_p, exit_layers, entropies = advance(state, thresholds, policy, torch.tensor(rows, device=memory.device))
        top_log_p, top_words = log_p.topk(min(2 * beam, log_p.shape[-1]), dim=-1)
        columns = zip(top_log_p.tolist(), top_words.tolist(), exit_layers.tolist(), entropies.tolist(), strict=True)
        by_row = dict(zip(rows, columns, strict=True))
        parents = list(range(images * beam))
        for image in range(images):
            candidates: list[tuple[float, int, _Hypothesis]] = []
            for slot, hypothesis in enumerate(live[image]):
                row = image * beam + slot
                probabilities, words, exit_layer, certainty = by_row[row]
                for probability, word in zip(probabilities, words, strict=True):
                    extended = hypothesis.extended(Step(word, exit_layer, certainty, probability))
                    candidates.append((-extended.log_probability, row, extended))
            candidates.sort(key=lambda candidate: candidate[:2])
            survivors: list[_Hypothesis] = []
            for rank, (_, row, extended) in enumerate(candidates[: 2 * beam]):
                if extended.steps[-1].token == EOS:
                    if rank < beam:
                        ended[image].append(extended)
                elif len(survivors) < beam:
                    slot_row = image * beam + len(survivors)
                    parents[slot_row], tokens[slot_row] = row, extended.steps[-1].token
                    survivors.append(extended)
            live[image] = [] if len(ended[image]) >= beam else survivors
        if not any(live):
            break
        state.reorder(torch.tensor(parents, device=memory.device))
    ranked = [
        [hypothesis.steps for hypothesis in sorted([*done, *going], key=lambda hypothesis: -hypothesis.score)]
        for done, going in zip(ended, live, strict=True)
    ]
    return ranked, state.executed_rows


def beam_search(
    model: DeeCap, memory: Tensor, taus: Sequence[float], policy: ExitPolicy, beam: int, mask: Tensor | None = None
) -> Decoded:
    """The best caption of `ranked_search` for each image. Raises as it does."""
    ranked, executed_rows = ranked_search(model, memory, taus, policy, beam, mask)
    return Decoded([captions[0] for captions in ranked], executed_rows)
