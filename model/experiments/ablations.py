"""What one choice does: systems trained with one setting changed, or with another seed, beside the one they vary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

from model.evaluation.intervals import mean_interval
from model.evaluation.result_rows import ResultRow
from model.experiments.result import Cell, Result, Table, interval
from model.experiments.select import cider_at, deepest, difference, kind, same_but_seed

BASE_SYSTEM = "small"  # a smaller model of the kind that ships
SPEEDUPS = (1.0, 2.0, 4.0)
ABSENT = "not set"


def ablations(rows: Sequence[ResultRow]) -> Result:
    """The rows of the base with one choice changed: which, and what it does to CIDEr-D."""
    layers = deepest(rows)
    lines: list[list[Cell]] = []
    for base, row in product((row for row in rows if row.system == BASE_SYSTEM), rows):
        alike = (kind(row, layers), row.policy) == (kind(base, layers), base.policy)
        changed = one_choice(changes(base.configuration, row.configuration))
        if not alike or changed is None or changed[0] == "seed":
            continue
        name, old, new = changed
        gaps = [difference([(row, base)], speedup, layers) for speedup in SPEEDUPS]
        cells = [None if gap is None else interval(*gap.photos, signed=True) for gap in gaps]
        lines.append([f"{name} {_told(new)} ({_told(old)})", interval(*mean_interval(row.points[0].cider)), *cells])
    columns = ["Changed", "CIDEr-D (95%), full depth", *(f"less unchanged, x{speedup:g}" for speedup in SPEEDUPS)]
    note = (
        f"What {BASE_SYSTEM} was told stands in brackets. Differences are paired over photos, of one run each: another "
        f"seed may move them (several seeds, below), and of {len(lines) * len(SPEEDUPS)} intervals at 95% some miss."
    )
    missing = [] if lines else [f"a change of {BASE_SYSTEM} (`model/training/configs/ablations`)"]
    return Result("One choice changed", Table(columns, lines), notes=[note] if lines else [], missing=missing)


def seeds(rows: Sequence[ResultRow]) -> Result:
    """Systems trained with several seeds: how far apart they come out."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(same_but_seed(row), []).append(row)
    layers = deepest(rows)
    several = [group for group in groups.values() if len({row.configuration.get("seed") for row in group}) > 1]
    lines: list[list[Cell]] = []
    for group in several:
        fixed = layers / group[0].layers
        for speedup in (fixed,) if group[0].model["exits"] == "final" else SPEEDUPS:
            found = [cider for row in group if (cider := cider_at(row, speedup / fixed)) is not None]
            if len(found) == len(group):
                means = [float(cider.mean()) for cider in found]
                name = kind(group[0], layers)
                lines.append([name, f"x{speedup:.3g}", len(group), statistics.mean(means), statistics.stdev(means)])
    columns = ["System", "SpeedUp", "Seeds", "CIDEr-D, mean", "standard deviation"]
    note = "Where runs share a backbone, its seed is not varied."
    notes = [note] if lines else []
    missing = [] if several else ["a second seed of any system"]
    return Result("Several seeds", Table(columns, lines), notes=notes, missing=missing)


def changes(before: Any, after: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """The leaves of two nested configurations that differ: dotted name -> (before, after)."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in {**before, **after}]
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        pairs = [(_name(one, number), one, after[number]) for number, one in enumerate(before)]
    else:
        return {} if before == after else {name.rstrip("_"): (before, after)}
    found: dict[str, tuple[Any, Any]] = {}
    for key, old, new in pairs:
        found |= changes(old, new, f"{name}.{key}" if name else key)
    return found


def one_choice(changed: dict[str, tuple[Any, Any]]) -> tuple[str, Any, Any] | None:
    """What changed, from what, to what: one leaf, or the same one in every stage that changed. None for more."""
    if not changed:
        return None
    if len(changed) == 1:
        [(name, (old, new))] = changed.items()
        return name, old, new
    leaves = {(name.rpartition(".")[2], repr(values)) for name, values in changed.items()}
    if len(leaves) > 1 or not all(name.startswith("stages.") for name in changed):
        return None
    name, (old, new) = next(iter(changed.items()))
    return f"stages.{name.rpartition('.')[2]}", old, new


def _told(value: Any) -> Any:
    return ABSENT if value == "" else value


def _name(item: Any, number: int) -> str:
    """A stage goes by its name."""
    return str(item["name"]) if isinstance(item, dict) and "name" in item else str(number + 1)
