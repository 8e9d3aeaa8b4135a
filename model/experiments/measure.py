"""Measures one system on one split: the result row that tables and figures are made of."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.batching import stack_regions
from model.caption import Regions
from model.decoding.search import greedy_search
from model.evaluation.fcs import calibration_error, consistency, reliability
from model.evaluation.metrics import caption_scores, per_image_cider
from model.evaluation.result_rows import ExitQuality, Point, ResultRow
from model.evaluation.speedup import corpus_speedup, executed_speedup, exit_histogram
from model.evaluation.spice import spice_or_reason
from model.exits import ExitPolicy
from model.experiments.systems import System
from model.experiments.teacher import EncodedBatch, Predictions, teacher_forced
from model.training.data import Photo, read_captions

TARGETS = (1.5, 2.0, 3.0, 4.0, 5.0)  # SpeedUps that thresholds are looked for
REPORTED = (2.0, 4.0)  # those that tables show: hit within TOLERANCE where the model can
TOLERANCE = 0.02
REFINEMENTS = 3
EVERY_WORD = 100.0  # nats, beyond any entropy: every word leaves at the first tested layer
BATCH = 100
SAMPLES = 8  # photos whose captions a row keeps


@dataclass(frozen=True)
class Split:
    """Photos with human captions, in the file's order."""

    captions: str  # the file, relative to the data folder
    split: str
    photos: tuple[Photo, ...]


def read_split(captions: Path, name: str, split: str, limit: int | None = None) -> Split:
    """Raises `ValueError` for a file that is none, or a split without captioned photos."""
    chosen = [photo for photo in read_captions(captions) if photo.split == split and photo.captions][:limit]
    if not chosen:
        raise ValueError(f"{captions} has no captioned photos in the split {split!r}")
    return Split(name, split, tuple(chosen))


def measure(system: System, split: Split, policy: ExitPolicy | None, command: str, meteor: bool = True) -> ResultRow:
    """Greedy captions at τ = 0, at thresholds for `TARGETS`, and with every word leaving at once; and every exit's FCS.

    `policy`: in place of the system's own. Raises `ValueError` for one that the model does not have.
    """
    policy = policy or system.policy
    policy.validate(system.model.layers)
    batches = encode(system, system.look(split.photos))
    references = [photo.captions for photo in split.photos]
    predictions = teacher_forced(system.model, system.vocabulary, batches, references)
    points: dict[float, Point] = {}

    def point(tau: float) -> Point:
        if tau not in points:
            points[tau] = _point(system, policy, batches, references, predictions, tau, meteor)
        return points[tau]

    point(0.0)
    if policy.tested:
        fastest = point(EVERY_WORD).speedup
        for target in (target for target in TARGETS if target < fastest):
            tau = threshold_for(predictions, target, policy)
            found = point(tau)
            for _ in range(REFINEMENTS if target in REPORTED else 0):
                if abs(found.speedup / target - 1) <= TOLERANCE:
                    break
                tau = between(list(points.values()), target)
                found = point(tau)
    names = "\n".join(photo.name for photo in split.photos)
    return ResultRow(
        system=system.name,
        budget=system.budget,
        configuration=_plain(system.configuration),
        model=system.model.config.to_json(),
        policy=policy.to_json(),
        data={
            "captions": split.captions,
            "split": split.split,
            "photos": len(split.photos),
            "names": hashlib.sha256(names.encode()).hexdigest()[:12],
            "sample": [photo.name for photo in split.photos[:SAMPLES]],
        },
        origin={
            "command": command,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "weights": system.weights,
            "search": "greedy, float32, plain decoder",
        },
        points=[points[tau] for tau in sorted(points)],
        exits=exit_quality(predictions),
    )


def encode(system: System, regions: Sequence[Regions]) -> list[EncodedBatch]:
    """The encoder's memory of all photos, which every threshold shares."""
    batches = []
    with torch.no_grad():
        for start in range(0, len(regions), BATCH):
            features, boxes, mask = stack_regions(regions[start : start + BATCH])
            rows = range(start, start + len(features))
            batches.append(EncodedBatch(rows, system.model.encode(features, boxes, mask), mask))
    return batches


def threshold_for(predictions: Predictions, target: float, policy: ExitPolicy) -> float:
    """A τ at which the reference tokens would leave for a SpeedUp of `target`; greedy captions come close to it."""
    low, high = 0.0, float(predictions.entropy.max()) + 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if predictions.speedup(middle, policy.tested) >= target else (middle, high)
    return math.ceil(high * 1e4) / 1e4


def between(points: Sequence[Point], target: float) -> float:
    """τ for a SpeedUp by a straight line between the two measured points nearest on either side."""
    below = max((point for point in points if point.speedup <= target), key=lambda point: point.speedup)
    above = min((point for point in points if point.speedup > target), key=lambda point: point.speedup)
    high = min(above.tau, max((point.tau for point in points if point.tau < EVERY_WORD), default=0.0) + 2.0)
    share = (target - below.speedup) / (above.speedup - below.speedup)
    return round(below.tau + share * (high - below.tau), 4)


def exit_quality(predictions: Predictions) -> list[ExitQuality]:
    """Every exit as a classifier of its own."""
    found = []
    for index, layer in enumerate(predictions.layers):
        confidence, hard = predictions.confidence[:, index], predictions.hard[:, index]
        by_probability = consistency(confidence, hard)
        by_entropy = consistency(-predictions.entropy[:, index], hard)
        bins = reliability(confidence, hard)
        found.append(
            ExitQuality(
                layer=layer,
                tokens=len(hard),
                accuracy=_rounded(float((~hard).mean())) or 0.0,
                auroc=_rounded(by_probability.auroc),
                fcs=_rounded(by_probability.fcs),
                entropy_auroc=_rounded(by_entropy.auroc),
                entropy_fcs=_rounded(by_entropy.fcs),
                calibration_error=_rounded(calibration_error(bins)) or 0.0,
                reliability=[[one.tokens, round(one.confidence, 4), round(one.accuracy, 4)] for one in bins],
            )
        )
    return found


def _point(
    system: System,
    policy: ExitPolicy,
    batches: Sequence[EncodedBatch],
    references: Sequence[Sequence[Sequence[str]]],
    predictions: Predictions,
    tau: float,
    meteor: bool,
) -> Point:
    exits: list[list[int]] = []
    words: list[list[str]] = []
    executed = 0
    for batch in tqdm(batches, desc=f"{system.name}, tau {tau:.3g}", leave=False):
        decoded = greedy_search(system.model, batch.memory, [tau] * len(batch.rows), policy, batch.mask)
        executed += decoded.executed_rows
        exits += [[step.exit_layer for step in caption] for caption in decoded.captions]
        words += [system.vocabulary.decode(step.token for step in caption) for caption in decoded.captions]
    layers = system.model.layers
    scores = caption_scores(words, references, meteor)
    scores["spice"] = spice_or_reason(words, references) if meteor else "not run: not asked for"
    taken = predictions.exit_index(tau, policy.tested)
    tokens = np.arange(len(taken))
    consistent = consistency(predictions.confidence[tokens, taken], predictions.hard[tokens, taken])
    return Point(
        tau=tau,
        speedup=round(corpus_speedup(exits, layers), 4),
        executed_speedup=round(executed_speedup(sum(map(len, exits)), layers, executed), 4),
        scores={name: round(value, 3) if isinstance(value, float) else value for name, value in scores.items()},
        cider=[round(float(value), 1) for value in per_image_cider(words, references)],
        depth=[round(sum(caption) / len(caption), 2) for caption in exits],
        exit_layers=exit_histogram(exits, layers),
        auroc=_rounded(consistent.auroc),
        fcs=_rounded(consistent.fcs),
        captions=[" ".join(caption) for caption in words[:SAMPLES]],
    )


def _rounded(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 5) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them, so that a row read back is the row written."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def parse_policy(
    system: System, tested: str | None, skipped: str | None, margin: str | None = None
) -> ExitPolicy | None:
    """The system's policy with what the command line says in its place; None where it says nothing.

    `tested`: layer numbers with commas, or `every`. `margin`: in nats, for the exit head's guess, or `none` to test
    every word. Raises `ValueError` for what is no policy of this model.
    """
    if tested is None and skipped is None and margin is None:
        return None
    if tested == "every":
        layers = ExitPolicy.every_layer(system.model.layers).tested
    elif tested is None:
        layers = system.policy.tested
    else:
        layers = tuple(int(layer) for layer in tested.split(",") if layer)
    nats = system.policy.margin if margin is None else None if margin == "none" else float(margin)
    if nats is not None and not system.model.config.exit_head:
        raise ValueError("a margin is for a model with an exit head")
    policy = ExitPolicy(layers, skipped or system.policy.skipped, nats)
    policy.validate(system.model.layers)
    return policy
