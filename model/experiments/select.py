"""Finds its way among result rows: which system a row is of, and what it does at a given SpeedUp."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from model.evaluation.result_rows import Point, ResultRow, configuration_key
from model.exits import ExitPolicy
from model.experiments.differences import Difference

NEAR = 0.03  # a measured point stands for a SpeedUp that it is this near to


def deepest(rows: Sequence[ResultRow]) -> int:
    """N: the layers of the deepest decoder among the rows."""
    return max((row.layers for row in rows), default=0)


def kind(row: ResultRow, layers: int) -> str:
    """The paper's name for the system, where the deepest decoder has `layers`."""
    exits = row.model["exits"]
    if exits == "final":
        return "TF-Complete" if row.layers == layers else f"TF-{row.layers}L"
    return {"plain": "TF-EE", "shallow": "DeeCap w/o deep information", "deecap": f"DeeCap, {row.model['fusion']}"}[
        exits
    ]


def by_kind(rows: Sequence[ResultRow]) -> dict[str, ResultRow]:
    """One row of each system: of several (seeds, policies), the one with the reference policy, then by name and key."""
    layers = deepest(rows)
    found: dict[str, ResultRow] = {}
    for row in sorted(rows, key=lambda row: (not is_reference(row), row.system, row.key)):
        found.setdefault(kind(row, layers), row)
    return found


def is_reference(row: ResultRow) -> bool:
    """Whether every layer is tested (or none, where there is but one exit) and every state computed."""
    reference = ExitPolicy(()) if row.model["exits"] == "final" else ExitPolicy.every_layer(row.layers)
    return row.policy == reference.to_json()


def training_of(row: ResultRow) -> str:
    """The same for rows of one trained model under different policies."""
    return configuration_key([row.configuration, row.origin.get("weights")])


def near(row: ResultRow, speedup: float) -> Point | None:
    """The measured point nearest to a SpeedUp of the row's own full depth, where one is near enough."""
    best = min(row.points, key=lambda point: abs(point.speedup / speedup - 1))
    return best if abs(best.speedup / speedup - 1) <= NEAR else None


def cider_at(row: ResultRow, speedup: float) -> np.ndarray | None:
    """CIDEr-D x 100 of each photo at a SpeedUp, between the two measured points around it by a straight line.

    None where the row does not reach so far.
    """
    points = sorted(row.points, key=lambda point: point.speedup)
    for low, high in pairwise(points):
        if low.speedup <= speedup <= high.speedup:
            width = high.speedup - low.speedup
            share = (speedup - low.speedup) / width if width else 0.0
            return (1 - share) * np.array(low.cider) + share * np.array(high.cider)
    return np.array(points[0].cider) if len(points) == 1 and points[0].speedup == speedup else None


def same_but_seed(row: ResultRow) -> str:
    """The same for runs that were told the same but the seed, under one policy."""
    told = {name: value for name, value in row.configuration.items() if name != "seed"}
    return configuration_key([told, row.policy])


def by_seed(rows: Sequence[ResultRow], row: ResultRow, other: ResultRow) -> list[tuple[ResultRow, ResultRow]]:
    """Runs of the systems that two rows are of, a pair for each seed that both have; else these two."""
    runs = []
    for system in (row, other):
        told = same_but_seed(system)
        runs.append({one.configuration.get("seed"): one for one in rows if same_but_seed(one) == told})
    both = sorted(seed for seed in runs[0] if seed is not None and seed in runs[1])
    return [(runs[0][seed], runs[1][seed]) for seed in both] or [(row, other)]


def against_all(row: ResultRow, speedup: float, layers: int) -> np.ndarray | None:
    """`cider_at` a SpeedUp against `layers` layers, of which the row's own decoder may have fewer."""
    return cider_at(row, speedup * row.layers / layers)


def difference(pairs: Sequence[tuple[ResultRow, ResultRow]], speedup: float, layers: int) -> Difference | None:
    """CIDEr-D of the first less that of the second, both at a SpeedUp against `layers` layers, a pair for each seed."""
    found = []
    for pair in pairs:
        ours, theirs = (against_all(row, speedup, layers) for row in pair)
        if ours is None or theirs is None:
            return None
        found.append(ours - theirs)
    return Difference.of(found)
