"""What one choice does: systems trained with one setting changed, or with another seed, beside the one they vary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from model.evaluation.intervals import mean_interval
from model.evaluation.result_rows import ResultRow, configuration_key
from model.experiments.result import Cell, Result, Table, interval
from model.experiments.select import by_kind, cider_at, deepest, difference, is_reference, kind

BASE = "DeeCap, concatenation"
SPEEDUPS = (1.0, 2.0, 4.0)
ABSENT = "not set"


def ablations(rows: Sequence[ResultRow]) -> Result:
    """DeeCap's rows that differ from its own in what training was told: what differs, and what that does to CIDEr-D."""
    base, layers = by_kind(rows).get(BASE), deepest(rows)
    lines: list[list[Cell]] = []
    for row in rows:
        if base is None:
            break
        changed = changes(base.configuration, row.configuration)
        if kind(row, layers) != BASE or not is_reference(row) or not changed or set(changed) == {"seed"}:
            continue
        gaps = [difference(row, base, speedup, layers) for speedup in SPEEDUPS]
        told = "; ".join(f"{name} {new} ({old})" for name, (old, new) in changed.items())
        cells = [None if gap is None else interval(*gap, signed=True) for gap in gaps]
        lines.append([told, interval(*mean_interval(row.points[0].cider)), *cells])
    columns = ["Changed", "CIDEr-D (95%), full depth", *(f"less unchanged, x{speedup:g}" for speedup in SPEEDUPS)]
    notes = [f"What {BASE} was told stands in brackets; differences are paired over photos."] if lines else []
    missing = [] if lines else [f"a change of {BASE} (`model/training/configs/ablations`)"]
    return Result("One choice changed", Table(columns, lines), notes=notes, missing=missing)


def seeds(rows: Sequence[ResultRow]) -> Result:
    """Systems trained with several seeds: how far apart they come out."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        same = {name: value for name, value in row.configuration.items() if name != "seed"}
        groups.setdefault(configuration_key([same, row.policy]), []).append(row)
    layers = deepest(rows)
    lines: list[list[Cell]] = []
    for group in groups.values():
        if len({row.configuration.get("seed") for row in group}) < 2:
            continue
        for speedup in SPEEDUPS:
            found = [cider for row in group if (cider := cider_at(row, speedup * group[0].layers / layers)) is not None]
            if len(found) == len(group):
                means = [float(cider.mean()) for cider in found]
                name = kind(group[0], layers)
                lines.append([name, f"x{speedup:g}", len(group), statistics.mean(means), statistics.stdev(means)])
    columns = ["System", "SpeedUp", "Seeds", "CIDEr-D, mean", "standard deviation"]
    notes = [] if not lines else ["Intervals over photos elsewhere on this page hold one seed still."]
    missing = [] if lines else ["a second seed of any system"]
    return Result("Several seeds", Table(columns, lines), notes=notes, missing=missing)


def changes(before: Any, after: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """The leaves of two nested configurations that differ: dotted name -> (before, after)."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in {**before, **after}]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(_name(one, number), one, after[number]) for number, one in enumerate(before)]
    else:
        return {} if before == after else {name.rstrip("_"): (before, after)}
    found: dict[str, tuple[Any, Any]] = {}
    for key, old, new in pairs:
        found |= changes(old, new, f"{name}.{key}" if name else key)
    return found


def _name(item: Any, number: int) -> str:
    """A stage goes by its name."""
    return str(item["name"]) if isinstance(item, dict) and "name" in item else str(number + 1)
