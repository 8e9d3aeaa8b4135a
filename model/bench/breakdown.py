"""Where a caption's milliseconds go, told from outside the engine: whole steps are timed and compared.

A word that left at layer m is compared with a word of a decoder of m layers alone, untested: what it took beyond that
went into exit tests and catch-up. The fixed cost of a step, all that the host does before any arithmetic, is what the
latter takes on a network of the same layers and next to no width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.bench.clock import now
from model.bench.ours import Contender, fixed_depth
from model.deecap import DeeCap

PARTS = (
    "decode image",
    "look",
    "encode",
    "begin",  # taking the caption in: its regions' keys and values, at the layers that the first word used
    "layers, early",  # and vocabulary head, of the words that left at the first tested layer
    "tests, early",  # of these words
    "layers, deep",  # and vocabulary head, of the words that went on
    "tests, deep",  # of these, and the catch-up that they needed, the regions' keys and values among it
    "fixed",  # of all words: Python, dispatch, bookkeeping
)
TINY_VOCABULARY = 16

Steps = list[tuple[float, int]]  # milliseconds and exit layer of each step of a caption


def time_steps(contender: Contender, memory: Tensor, device: str) -> Steps:
    """One caption, step by step; the first step takes the caption in as well."""
    engine = contender.decoder.engine(1)
    engine.submit(memory, contender.tau)
    times: list[float] = []
    while engine.busy:
        started = now(device)
        engine.step()
        times.append((now(device) - started) * 1000)
    (over,) = engine.finished()
    return [(taken, step.exit_layer) for taken, step in zip(times, over.steps, strict=True)]


def break_down(
    tiers: Sequence[Contender],
    memories: Sequence[Tensor],
    before: Mapping[str, float],
    words: int,
    rounds: int,
    device: str,
) -> dict[str, Any]:
    """Milliseconds of each of `PARTS` per caption, of `tiers` that share one decoder.

    `before`: what "decode image", "look" and "encode" take. `words`: how long the captions are that are compared with.
    """
    decoder = tiers[0].decoder
    model, precision = decoder.model, decoder.precision
    depths = [*decoder.policy.tested, model.layers]
    tiny, tiny_memory = shrunk(model, len(memories[0]))
    alone = {depth: fixed_depth(model, depth, words, precision) for depth in depths}
    empty = {depth: fixed_depth(tiny, depth, words, precision) for depth in depths}
    contenders = {tier.name: tier for tier in tiers} | {f"alone {depth}": one for depth, one in alone.items()}
    taken = _take_turns(contenders, memories, rounds, device)
    fixed = _take_turns(
        {f"empty {depth}": one for depth, one in empty.items()},
        [tiny_memory.to(device)] * len(memories),
        rounds,
        device,
    )
    step_ms = {depth: _later_step(taken[f"alone {depth}"]) for depth in depths}
    fixed_ms = {depth: _later_step(fixed[f"empty {depth}"]) for depth in depths}
    begin_ms = {}
    for depth in depths:
        firsts = [steps[0][0] for steps in taken[f"alone {depth}"]]
        begin_ms[depth] = max(0.0, float(np.median(firsts)) - step_ms[depth])
    return {
        "tiers": [
            {"name": tier.name, "ms": {**before, **words_apart(taken[tier.name], depths, step_ms, fixed_ms, begin_ms)}}
            for tier in tiers
        ],
        "step_ms": {str(depth): value for depth, value in step_ms.items()},
        "fixed_step_ms": {str(depth): value for depth, value in fixed_ms.items()},
    }


def words_apart(
    captions: Sequence[Steps],
    depths: Sequence[int],
    step_ms: Mapping[int, float],
    fixed_ms: Mapping[int, float],
    begin_ms: Mapping[int, float],
) -> dict[str, float]:
    """The parts of the words, milliseconds per caption, the mean of `captions`.

    `step_ms` and `fixed_ms`: of a step of a decoder of so many layers alone, at its width and at next to none.
    `begin_ms`: what its first step takes beyond a later one.
    """
    apart = dict.fromkeys(PARTS[3:], 0.0)
    for caption in captions:
        for index, (taken, left) in enumerate(caption):
            begin = begin_ms[left] if index == 0 else 0.0
            apart["begin"] += begin
            kind = "early" if left == depths[0] and len(depths) > 1 else "deep"
            apart[f"layers, {kind}"] += step_ms[left] - fixed_ms[left]
            apart[f"tests, {kind}"] += taken - step_ms[left] - begin
            apart["fixed"] += fixed_ms[left]
    return {part: value / len(captions) for part, value in apart.items()}


def shrunk(model: DeeCap, regions: int) -> tuple[DeeCap, Tensor]:
    """A network of the same layers with next to no width, and a memory for it: arithmetic left out."""
    config = replace(
        model.config,
        width=model.config.heads,
        feed_forward=model.config.heads,
        vocabulary_size=TINY_VOCABULARY,
        encoder_layers=0,
        exits="final",
        exit_head=False,
    )
    return DeeCap(config).requires_grad_(False).eval(), torch.zeros(regions, config.width)


def _take_turns(
    contenders: Mapping[str, Contender], memories: Sequence[Tensor], rounds: int, device: str
) -> dict[str, list[Steps]]:
    """Captions of each contender, each step the median of its rounds."""
    names = list(contenders)
    for contender in contenders.values():
        for memory in memories:  # every length of catch-up comes up once before it counts
            time_steps(contender, memory, device)
    taken: dict[str, list[list[Steps]]] = {name: [[] for _ in memories] for name in names}
    for turn in tqdm(range(rounds * len(memories)), desc="breaking down", leave=False):
        shift, item = turn % len(names), turn % len(memories)
        for name in names[shift:] + names[:shift]:
            taken[name][item].append(time_steps(contenders[name], memories[item], device))
    return {name: [_median_steps(again) for again in items] for name, items in taken.items()}


def _median_steps(again: Sequence[Steps]) -> Steps:
    """Of the same caption several times."""
    return [(float(np.median([taken for taken, _ in step])), step[0][1]) for step in zip(*again, strict=False)]


def _later_step(captions: Sequence[Steps]) -> float:
    """Median milliseconds of a step that is not a caption's first, where there is one."""
    return float(np.median([taken for caption in captions for taken, _ in caption[1:] or caption]))
