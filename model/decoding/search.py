"""Greedy and beam search where each word leaves the decoder at the first layer that is certain enough.

The plain reference: clear and cached, not the fast engine. Semantics (design, section 4): every live hypothesis
exits on its own; EOS competes at that exit's log-probability; hypotheses compare by log-probability per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.decoding.beam import Beam, Candidates, Step
from model.decoding.repeats import first_allowed, most_ruled_out
from model.decoding.state import DecoderState
from model.deecap import DeeCap, entropy
from model.exits import ExitPolicy
from model.vocabulary import BOS, EOS, NEVER_EMITTED


@dataclass(frozen=True)
class Decoded:
    """The captions of a batch, and the (layer, word) pairs that were computed for them, catch-up included."""

    captions: list[list[Step]]
    executed_rows: int


def emission_logits(model: DeeCap, z: Tensor) -> Tensor:
    """Head logits with the words that are never emitted (padding, BOS, unknown) ruled out: `(..., d)` -> `(..., V)`."""
    logits = model.logits(z)
    ruled_out = torch.tensor(NEVER_EMITTED, device=logits.device)
    return logits.index_fill(-1, ruled_out, torch.finfo(logits.dtype).min)


def advance(state: DecoderState, taus: Tensor, policy: ExitPolicy, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decides the newest word of `rows`, each at its own exit.

    Returns log-probabilities `(len(rows), V)`, exit layers `(len(rows),)` and entropies `(len(rows),)`.
    `taus` has one threshold per row of the state; rows with τ = 0 are not tested, since no entropy is below it.
    Nor are rows whose exit head guesses an entropy beyond the policy's margin.
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
        if not last and policy.margin is not None and len(candidates):
            guesses = model.exit_head(state.newest(m, rows[candidates])[-1], m)
            candidates = candidates[guesses <= taus[rows[candidates]] + policy.margin]
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
    state = DecoderState(model, memory, mask, copied=policy.skipped == "copied")
    thresholds = torch.tensor(taus, dtype=torch.float64, device=memory.device)
    captions: list[list[Step]] = [[] for _ in taus]
    live = torch.arange(len(captions), device=memory.device)
    tokens = torch.full((len(captions),), BOS, device=memory.device)
    for _ in range(model.config.max_words):
        state.append(tokens)
        log_p, exit_layers, entropies = advance(state, thresholds, policy, live)
        best, words = _next_words(model, log_p, [captions[row] for row in live.tolist()])
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


def _next_words(model: DeeCap, log_p: Tensor, captions: Sequence[Sequence[Step]]) -> tuple[Tensor, Tensor]:
    """The likeliest words of `log_p (B, V)` that the captions may go on with: log-probabilities and numbers, `(B,)`."""
    if not model.config.no_repeats:
        best, words = log_p.max(-1)
        return best, words
    best, words = log_p.topk(min(most_ruled_out(model.config.max_words) + 1, log_p.shape[-1]), dim=-1)
    places = [
        first_allowed(candidates, [step.token for step in caption])
        for candidates, caption in zip(words.tolist(), captions, strict=True)
    ]
    rows = torch.arange(len(places), device=log_p.device)
    return best[rows, places], words[rows, places]


@torch.no_grad()
def ranked_search(
    model: DeeCap, memory: Tensor, taus: Sequence[float], policy: ExitPolicy, beam: int, mask: Tensor | None = None
) -> tuple[list[list[list[Step]]], int]:
    """The captions that a beam ends with for each image, best first by log-probability per step, EOS included.

    Beside them, the (layer, word) pairs computed. An image is done when it has `beam` ended hypotheses, or its
    captions are as long as they may be; then those without EOS compete too. Raises `ValueError` for a beam outside
    1..5.
    """
    no_repeats = model.config.no_repeats
    beams = [Beam(beam, no_repeats) for _ in taus]
    looked_at = 2 * beam + (most_ruled_out(model.config.max_words) if no_repeats else 0)
    state = DecoderState(model, memory, mask, beam, policy.skipped == "copied")
    thresholds = torch.tensor(taus, dtype=torch.float64, device=memory.device).repeat_interleave(beam)
    tokens = torch.full((len(taus) * beam,), BOS, device=memory.device)
    for _ in range(model.config.max_words):
        state.append(tokens)
        # Hypothesis `slot` of an image is row image * beam + slot.
        rows = [image * beam + slot for image, search in enumerate(beams) for slot in range(len(search.live))]
        log_p, exit_layers, entropies = advance(state, thresholds, policy, torch.tensor(rows, device=memory.device))
        top_log_p, top_words = log_p.topk(min(looked_at, log_p.shape[-1]), dim=-1)
        columns = zip(top_words.tolist(), top_log_p.tolist(), exit_layers.tolist(), entropies.tolist(), strict=True)
        by_row = {row: Candidates(*column) for row, column in zip(rows, columns, strict=True)}
        parents = list(range(len(taus) * beam))
        for image, search in enumerate(beams):
            first = image * beam
            kept = search.advance([by_row[first + slot] for slot in range(len(search.live))])
            for slot, parent in enumerate(kept):
                parents[first + slot], tokens[first + slot] = first + parent, search.live[slot].steps[-1].token
        if not any(search.live for search in beams):
            break
        state.reorder(torch.tensor(parents, device=memory.device))
    return [search.ranked() for search in beams], state.executed_rows


def beam_search(
    model: DeeCap, memory: Tensor, taus: Sequence[float], policy: ExitPolicy, beam: int, mask: Tensor | None = None
) -> Decoded:
    """The best caption of `ranked_search` for each image. Raises as it does."""
    ranked, executed_rows = ranked_search(model, memory, taus, policy, beam, mask)
    return Decoded([captions[0] for captions in ranked], executed_rows)
