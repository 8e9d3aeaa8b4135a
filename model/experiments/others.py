"""Beyond tables of quality: captions side by side (figure 6), exit policies, and the three SpeedUps of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.evaluation.intervals import mean_interval, paired_bootstrap
from model.evaluation.result_rows import ResultRow
from model.exits import SpeedTable
from model.experiments.result import Cell, Result, Table, interval
from model.experiments.select import by_kind, difference, is_reference, near, training_of


def figure6(rows: Sequence[ResultRow]) -> Result:
    """Captions side by side: TF-EE and DeeCap at a SpeedUp of 4, and TF-Complete. The first photos, not chosen ones."""
    found = by_kind(rows)
    columns: list[str] = ["Photo"]
    captions: list[Sequence[str]] = []
    for name in ("TF-Complete", "TF-EE", "DeeCap, concatenation"):
        row = found.get(name)
        point = None if row is None else row.points[0] if name == "TF-Complete" else near(row, 4.0)
        if row and point:
            columns.append(name)
            captions.append(point.captions)
    names = rows[0].data["sample"] if rows and captions else []
    lines: list[list[Cell]] = [[photo, *words] for photo, *words in zip(names, *captions, strict=True)]
    notes = ["The human study of the paper's section 4.5 is not reproduced."]
    missing = [name for name in ("TF-EE", "DeeCap, concatenation") if name not in columns]
    return Result("Figure 6: captions side by side", Table(columns, lines), notes=notes, missing=missing)


def policies(rows: Sequence[ResultRow]) -> Result:
    """One trained model under different exit policies: layers tested, and what deeper layers see of words left."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(training_of(row), []).append(row)
    lines: list[list[Cell]] = []
    for group in groups.values():
        if len(group) == 1:
            continue
        reference = next((row for row in group if is_reference(row)), None)
        for row in sorted(group, key=is_reference, reverse=True):
            for speedup in (2.0, 3.0, 4.0):
                point = near(row, speedup)
                if point is None:
                    continue
                full = paired_bootstrap(point.cider, row.points[0].cider)
                gap = (
                    difference([(row, reference)], speedup, row.layers) if reference and row is not reference else None
                )
                policy = row.policy
                lines.append(
                    [row.system, ", ".join(map(str, policy["tested"])), policy["skipped"], policy["margin"],
                     point.speedup, point.executed_speedup, interval(*mean_interval(point.cider)),
                     interval(*full, signed=True), interval(*gap.photos, signed=True) if gap else None]
                )  # fmt: skip
    columns = [
        "Run", "Tested layers", "Skipped states", "Margin, nats", "SpeedUp", "executed", "CIDEr-D (95%)",
        "less its full depth's", "less the reference policy's",
    ]  # fmt: skip
    missing = [] if lines else ["a second policy of the same training (`measure --tested ... --skipped ...`)"]
    notes = [
        "Differences are paired over photos; those with the reference policy (every layer tested, every state "
        "computed) are at SpeedUps of 2, 3 and 4, between measured points.",
        "Margin: words whose entropy the exit head guesses above τ by more than this are not tested and go deeper; "
        "without one the entropy alone decides.",
    ]
    return Result("Exit policies", Table(columns, lines), notes=notes, missing=missing)


def speedups(table: SpeedTable, bundle: str) -> Result:
    """The three SpeedUps of a bundle's own, measured table: the paper's, executed layer-rows, and the clock's."""
    names = {tau: name for name, tau in reversed(table.tiers.items())}
    full = table.rows[0]
    lines: list[list[Cell]] = []
    curve = []
    for row in table.rows:
        clock = full.describe_ms / row.describe_ms if row.describe_ms > 0 else None
        lines.append(
            [names.get(row.tau, ""), row.tau, row.speedup, row.executed_speedup, clock, row.describe_ms, row.cider]
        )
        curve.append({"paper": row.speedup, "executed": row.executed_speedup, "clock": clock, "cider": row.cider})

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for key, colour, marker in (
            ("paper", "#1b6ca8", "o-"),
            ("executed", "#4f8a3c", "x--"),
            ("clock", "#c2571a", "s-"),
        ):
            kept = [point for point in curve if point[key] is not None]
            axes.plot([p[key] for p in kept], [p["cider"] for p in kept], marker, color=colour, label=key, markersize=4)
        axes.set(xlabel="SpeedUp", ylabel="CIDEr-D x 100", title=bundle)
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)

    columns = ["Tier", "τ", "Paper", "Executed", "Clock", "ms", "CIDEr-D"]
    how = "; ".join(f"{name}: {value}" for name, value in table.measured.items())
    notes = [
        f"From the speed table of {bundle}, as it was measured. {how}.",
        "Clock: milliseconds of encoder and words at τ = 0 over those at τ. Executed: layer-rows; words whose deeper "
        "states are copied cost none there, though their keys and values are still made.",
    ]
    return Result("The three SpeedUps", Table(columns, lines), {"curve": curve}, draw, notes)
