"""How well and how fast a bundle captions a split: caption metrics, and SpeedUp of all three kinds."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from model.caption import Caption
from model.captioner import Captioner
from model.evaluation.data import EvaluationSet
from model.evaluation.intervals import mean_interval, paired_bootstrap
from model.evaluation.metrics import caption_scores, per_image_cider, ptb_caption_scores
from model.evaluation.speedup import corpus_speedup, executed_speedup, exit_histogram
from model.evaluation.spice import spice_or_reason
from model.exits import ResolvedSpeed

BATCH = 100
TIMED_PHOTOS = 50  # captioned one at a time for the milliseconds


@dataclass(frozen=True)
class Run:
    """The captions of a whole set at one threshold."""

    captions: list[Caption]
    executed_rows: int  # (layer, word) pairs, catch-up included

    @property
    def words(self) -> list[list[str]]:
        return [[word.text for word in caption.words] for caption in self.captions]

    @property
    def exits(self) -> list[list[int]]:
        return [[step.exit_layer for step in caption.steps] for caption in self.captions]


def describe_all(captioner: Captioner, photos: EvaluationSet, tau: float, beam: int = 1) -> Run:
    """Captions of every photo at τ, in batches."""
    speed = captioner.speeds.resolve(tau=tau)
    captions: list[Caption] = []
    executed = 0
    for start in tqdm(range(0, len(photos.regions), BATCH), desc=f"tau {tau:.3g}, beam {beam}", leave=False):
        part = photos.regions[start : start + BATCH]
        described, rows = captioner.describe_counted(part, [speed] * len(part), beam)
        captions += described
        executed += rows
    return Run(captions, executed)


def describe_milliseconds(captioner: Captioner, photos: EvaluationSet, taus: Sequence[float]) -> list[float]:
    """Mean milliseconds of encoder and words for one photo at a time at each τ, the thresholds taking turns."""
    speeds = [captioner.speeds.resolve(tau=tau) for tau in taus]
    totals = [0.0] * len(taus)
    chosen = photos.regions[:TIMED_PHOTOS]
    captioner.describe_batch([chosen[0]], [speeds[0]])  # the first run of anything is slow
    for regions in chosen:
        for index, speed in enumerate(speeds):
            started = time.perf_counter()
            captioner.describe_batch([regions], [speed])
            totals[index] += time.perf_counter() - started
    return [total * 1000 / len(chosen) for total in totals]


def machine(captioner: Captioner) -> str:
    """What the figures were measured on, for the reader of them."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {captioner.device}, {captioner.precision}"


def evaluate(
    captioner: Captioner, photos: EvaluationSet, run: Run, speed: ResolvedSpeed, beam: int = 1, ptb: bool = False
) -> dict[str, Any]:
    """All figures of a bundle's `run` over a set at one speed and beam, ready for JSON; scores x 100.

    With `ptb`, scores on PTB tokens stand beside those on the given ones, the references being their tokens joined.
    Raises `model.evaluation.metrics.JavaError` where that has no Java.
    """
    steps = sum(len(exits) for exits in run.exits)
    cider = per_image_cider(run.words, photos.references)
    _, low, high = mean_interval(cider)
    # A beam computes rows for hypotheses that are not kept, so the two ratios of layers are a greedy search's only.
    greedy = beam == 1
    full, own = describe_milliseconds(captioner, photos, [0.0, speed.tau]) if greedy else (None, None)
    return {
        "bundle": captioner.name,
        "revision": captioner.revision,
        "photos": len(photos.names),
        "tau": speed.tau,
        "beam": beam,
        "scores": {
            **caption_scores(run.words, photos.references),
            "spice": spice_or_reason(run.words, photos.references),
        },
        "cider_d_95": [low, high],
        **({"scores_ptb": _ptb_scores(run, photos)} if ptb else {}),
        "speedup": {
            "paper": corpus_speedup(run.exits, captioner.layers),
            "executed": executed_speedup(steps, captioner.layers, run.executed_rows) if greedy else None,
            "clock": full / own if full and own else None,
        },
        "describe_ms": own,
        "exit_layers": exit_histogram(run.exits, captioner.layers),
    }


def _ptb_scores(run: Run, photos: EvaluationSet) -> dict[str, Any]:
    references = [[" ".join(caption) for caption in captions] for captions in photos.references]
    return ptb_caption_scores([" ".join(words) for words in run.words], references)


def compare(run: Run, other: Captioner, photos: EvaluationSet, speed: str | float, beam: int = 1) -> dict[str, Any]:
    """A bundle at a speed of its own table: CIDEr-D x 100 of `run`, of it or another, less its own, paired over photos.

    `photos` are those of `run`, in the same order, as the other bundle's extractor sees them. Raises
    `model.exits.UnknownSpeedError` for a speed that its table does not have.
    """
    other_run = describe_all(other, photos, other.speeds.resolve(speed).tau, beam)
    ciders = [per_image_cider(one.words, photos.references) for one in (run, other_run)]
    difference, low, high = paired_bootstrap(ciders[0], ciders[1])
    return {
        "bundle": other.name,
        "revision": other.revision,
        "speedup": corpus_speedup(other_run.exits, other.layers),
        "cider_d": float(ciders[1].mean()),
        "cider_d_difference": difference,
        "cider_d_difference_95": [low, high],
    }
