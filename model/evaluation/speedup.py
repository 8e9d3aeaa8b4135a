"""What early exit saved over a set of captions: the paper's SpeedUp, the executed one, and where words left.

The third number, milliseconds, is measured with a clock and not computed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model.exits import paper_speedup


def exit_histogram(captions: Iterable[Sequence[int]], layers: int) -> list[int]:
    """w^m of the paper's section 4.1: how many steps left at layer m, for m = 1..`layers` (at index m-1).

    `captions`: for each, the exit layers of its emitted steps, EOS included. Raises `ValueError` for a layer outside
    1..`layers`.
    """
    counts = [0] * layers
    for exits in captions:
        for layer in exits:
            if not 1 <= layer <= layers:
                raise ValueError(f"exit layer {layer} is not one of 1 to {layers}")
            counts[layer - 1] += 1
    return counts


def corpus_speedup(captions: Iterable[Sequence[int]], layers: int) -> float:
    """The paper's SpeedUp (section 4.1) of a set: Σ N·w^m / Σ m·w^m over all steps of all captions, EOS included.

    A ratio of sums, so long captions weigh more; not the mean of the captions' own. It counts neither exit tests nor
    catch-up: see `executed_speedup`. 1 for no captions. Arguments and error as in `exit_histogram`.
    """
    counts = exit_histogram(captions, layers)
    return paper_speedup([layer for layer, count in enumerate(counts, start=1) for _ in range(count)], layers)


def executed_speedup(steps: int, layers: int, executed_rows: int) -> float:
    """Decoder layer-rows of the full-depth model over those that ran: N·steps / `executed_rows`.

    A row is one word through one decoder layer. `steps` are the emitted steps, EOS included; `executed_rows` is the
    decoder's own count over the same captions, catch-up of words that left early included. So it is at most the
    paper's SpeedUp, and equal where no later word went deeper. 1 for no steps.

    Raises `ValueError` for counts that cannot be: fewer rows than steps (each step runs at least one layer).
    """
    if steps < 0 or layers < 1 or executed_rows < steps:
        raise ValueError(f"{executed_rows} rows cannot have been all of {steps} steps through {layers} layers")
    return layers * steps / executed_rows if steps else 1.0
