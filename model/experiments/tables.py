"""The paper's tables 1, 3 and 4, from the rows of one comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.config import FUSIONS
from model.evaluation.intervals import mean_interval, paired_bootstrap
from model.evaluation.result_rows import Point, ResultRow
from model.experiments.differences import Difference
from model.experiments.result import Cell, Result, Table, interval
from model.experiments.select import against_all, by_kind, by_seed, deepest, difference, near

TARGET = 4.0  # the SpeedUp of tables 1 and 4
SCORES = ("B-1", "B-4", "METEOR", "ROUGE-L", "CIDEr-D (95%)", "SPICE")
TOKENS = (
    "Scores x 100 on the given tokens, greedy search; CIDEr-D with its bootstrap interval over photos. "
    "An empty cell was not run."
)
ONE_SEED = "One seed of each; how far seeds are apart is shown below where there are several."


def score_cells(point: Point) -> list[Cell]:
    """B-1, B-4, METEOR, ROUGE-L, CIDEr-D with interval, SPICE; None for what was not run."""
    found = [point.scores.get(name) for name in ("bleu_1", "bleu_4", "meteor", "rouge_l", "spice")]
    b1, b4, meteor, rouge, spice = (value if isinstance(value, float) else None for value in found)
    return [b1, b4, meteor, rouge, interval(*mean_interval(point.cider)), spice]


def table1(rows: Sequence[ResultRow]) -> Result:
    """All systems: full depth, fixed depths, and early exit at the target SpeedUp, compared with TF-Complete."""
    found, layers = by_kind(rows), deepest(rows)
    complete = found.get("TF-Complete")
    lines: list[list[Cell]] = []
    for name, row in sorted(found.items(), key=lambda item: (item[1].model["exits"] != "final", -item[1].layers)):
        points = [(row.points[0], name if row.model["exits"] == "final" else f"{name}, full depth")]
        if row.model["exits"] != "final":
            fast = near(row, TARGET)
            points += [(fast, name)] if fast else []
        for point, shown in points:
            against = (
                interval(*paired_bootstrap(point.cider, complete.points[0].cider), signed=True)
                if complete and row is not complete
                else None
            )
            scale = layers / row.layers
            speeds = (point.speedup * scale, point.executed_speedup * scale)
            lines.append([shown, *score_cells(point), against, *speeds, epochs(row)])
    columns = ["System", *SCORES, "CIDEr-D less TF-Complete's", "SpeedUp", "executed", "Epochs"]
    wanted = ["TF-Complete", "TF-2L", "TF-EE", "DeeCap, concatenation"]
    notes = [TOKENS, ONE_SEED]
    notes += ["SpeedUp is the paper's ratio, against all layers; `executed` counts the layer-rows that ran."]
    notes += [
        f"{name} has no measured point within 3% of a SpeedUp of {TARGET:g}."
        for name, row in found.items()
        if row.model["exits"] != "final" and near(row, TARGET) is None
    ]
    return Result("Table 1: all systems", Table(columns, lines), notes=notes, missing=_missing(wanted, found))


def table3(rows: Sequence[ResultRow]) -> Result:
    """Deep information on and off, at SpeedUps of 2 and 4."""
    found, layers = by_kind(rows), deepest(rows)
    names = ["DeeCap, concatenation", "DeeCap w/o deep information"]
    lines: list[list[Cell]] = []
    for speedup in (2.0, 4.0):
        for name in names:
            row = found.get(name)
            point = near(row, speedup) if row else None
            if point is None:
                continue
            fcs, auroc = (None if value is None else 100 * value for value in (point.fcs, point.auroc))
            bleu = point.scores.get("bleu_4")
            lines.append(
                [f"{name} (x{speedup:g})", fcs, auroc, bleu, interval(*mean_interval(point.cider)), point.speedup]
            )
    notes = [
        TOKENS,
        ONE_SEED,
        "FCS and AUROC x 100, teacher-forced, of the confidence at the exit that each token takes.",
    ]
    if all(name in found for name in names):
        for speedup in (2.0, 4.0):
            gap = difference(by_seed(rows, found[names[0]], found[names[1]]), speedup, layers)
            if gap:
                verdict = gap.verdict("as in the paper", "the other way round than in the paper")
                notes.append(f"With less without at x{speedup:g}, paired: CIDEr-D {gap.told()}; {verdict}.")
    columns = ["Method", "FCS", "AUROC", "B-4", "CIDEr-D (95%)", "SpeedUp"]
    return Result("Table 3: deep information", Table(columns, lines), notes=notes, missing=_missing(names, found))


def table4(rows: Sequence[ResultRow]) -> Result:
    """The four fusion strategies at the target SpeedUp."""
    found, layers = by_kind(rows), deepest(rows)
    names = [f"DeeCap, {fusion}" for fusion in FUSIONS]
    best = found.get("DeeCap, concatenation")
    lines: list[list[Cell]] = []
    for name in names:
        row = found.get(name)
        point = near(row, TARGET) if row else None
        if row is None or point is None:
            continue
        gap = difference([(row, best)], TARGET, layers) if best and row is not best else None
        lines.append([name, *score_cells(point), interval(*gap.photos, signed=True) if gap else None, point.speedup])
    columns = ["Fusion", *SCORES, "CIDEr-D less concatenation's", "SpeedUp"]
    notes = [TOKENS, ONE_SEED]
    return Result("Table 4: fusion", Table(columns, lines), notes=notes, missing=_missing(names, found))


def verdicts(rows: Sequence[ResultRow]) -> list[str]:
    """Where DeeCap is better than a baseline at the same SpeedUp, where it is worse, and where neither is shown; and
    what TF-EE loses of its own quality, beside twice what DeeCap loses."""
    found, layers = by_kind(rows), deepest(rows)
    ours = found.get("DeeCap, concatenation")
    if ours is None:
        return []
    told = []
    for name, row in found.items():
        if name.startswith("DeeCap"):
            continue
        fixed = layers / row.layers
        for speedup in [fixed] if row.model["exits"] == "final" else [2.0, 3.0, 4.0]:
            gap = difference(by_seed(rows, ours, row), speedup, layers)
            if gap:
                told.append(
                    f"At a SpeedUp of {speedup:.3g}, DeeCap less {name}: CIDEr-D {gap.told()}; "
                    f"{gap.verdict('DeeCap wins', f'{name} wins')}{_longer(ours, row, name)}."
                )
    early = found.get("TF-EE")
    return told if early is None else told + losses(by_seed(rows, ours, early), layers)


def losses(pairs: Sequence[tuple[ResultRow, ResultRow]], layers: int) -> list[str]:
    """What DeeCap and TF-EE, a pair for each seed, lose against their own full depth, and whether TF-EE loses twice as
    much."""
    told = []
    for speedup in (2.0, 3.0, 4.0):
        found = [(_lost(ours, speedup, layers), _lost(theirs, speedup, layers)) for ours, theirs in pairs]
        lost = [(mine, early) for mine, early in found if mine is not None and early is not None]
        if len(lost) == len(pairs):
            gap = Difference.of([early - 2 * mine for mine, early in lost])
            mine, early = (float(np.mean(side)) for side in zip(*lost, strict=True))
            verdict = gap.verdict(
                "more than twice as much", "less than twice as much", "neither more nor less than twice"
            )
            told.append(
                f"Going to a SpeedUp of {speedup:g}, DeeCap loses {mine:.1f} of its CIDEr-D at full depth and TF-EE "
                f"{early:.1f}; the latter less twice the former: {gap.told()}; {verdict}."
            )
    return told


def _lost(row: ResultRow, speedup: float, layers: int) -> np.ndarray | None:
    """CIDEr-D x 100 of each photo at full depth less that at a SpeedUp."""
    full, fast = (against_all(row, one, layers) for one in (1.0, speedup))
    return None if full is None or fast is None else full - fast


def epochs(row: ResultRow) -> int:
    """Of all stages that the row's configuration has, those of what it starts from left out."""
    return sum(stage["epochs"] for stage in row.configuration.get("stages", ()))


def _longer(ours: ResultRow, row: ResultRow, name: str) -> str:
    """A clause for those that learned for other numbers of epochs than ours."""
    mine, theirs = epochs(ours), epochs(row)
    return "" if mine == theirs else f" ({name} learned for {theirs} epochs, DeeCap for {mine})"


def _missing(wanted: Sequence[str], found: dict[str, ResultRow]) -> list[str]:
    return [name for name in wanted if name not in found]
