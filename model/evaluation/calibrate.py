"""Measures a bundle's speed table: τ against SpeedUp, CIDEr-D and milliseconds, and the τ of each tier."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from model.captioner import Captioner
from model.evaluation.data import EvaluationSet
from model.evaluation.evaluate import describe_all, describe_milliseconds
from model.evaluation.metrics import per_image_cider
from model.evaluation.speedup import corpus_speedup, executed_speedup
from model.exits import TIERS, SpeedRow, SpeedTable

COARSE = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)  # nats
TOLERANCE = 0.03  # a tier's SpeedUp is at least its target, and above it by no more than this share where possible
BISECTIONS = 6


def measure(captioner: Captioner, photos: EvaluationSet, tau: float) -> SpeedRow:
    """One row of the table, its milliseconds still to be measured beside the others'."""
    run = describe_all(captioner, photos, tau)
    steps = sum(len(exits) for exits in run.exits)
    return SpeedRow(
        tau=tau,
        speedup=round(corpus_speedup(run.exits, captioner.layers), 4),
        executed_speedup=round(executed_speedup(steps, captioner.layers, run.executed_rows), 4),
        cider=round(float(np.mean(per_image_cider(run.words, photos.references))), 2),
        describe_ms=0.0,
    )


def calibrate(captioner: Captioner, photos: EvaluationSet, measured: dict[str, Any]) -> SpeedTable:
    """The bundle's speed table on `photos`, greedy search; `measured` says how, for the reader of the table.

    A tier that no threshold reaches gets the fastest one: the table tells what it achieves.
    """
    rows: dict[float, SpeedRow] = {}

    def row(tau: float) -> SpeedRow:
        if tau not in rows:
            rows[tau] = measure(captioner, photos, tau)
        return rows[tau]

    for tau in COARSE:
        if row(tau).speedup >= 0.98 * captioner.layers:
            break
    tiers = {name: 0.0 if target <= 1 else _threshold(row, sorted(rows), target) for name, target in TIERS.items()}
    taus = sorted(rows)
    milliseconds = describe_milliseconds(captioner, photos, taus)
    complete = [replace(rows[tau], describe_ms=round(ms, 2)) for tau, ms in zip(taus, milliseconds, strict=True)]
    return SpeedTable(tuple(complete), tiers, measured)


def _threshold(row: Any, taus: list[float], target: float) -> float:
    """The smallest τ found whose SpeedUp reaches `target`, by bisection between measured rows."""
    reaching = [tau for tau in taus if row(tau).speedup >= target]
    if not reaching:
        return max(taus, key=lambda tau: row(tau).speedup)
    high = min(reaching)
    low = max((tau for tau in taus if tau < high), default=0.0)
    for _ in range(BISECTIONS):
        if row(high).speedup <= target * (1 + TOLERANCE):
            break
        middle = round((low + high) / 2, 4)
        low, high = (low, middle) if row(middle).speedup >= target else (middle, high)
    return high
