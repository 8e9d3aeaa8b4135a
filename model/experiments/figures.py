"""The paper's figures 2, 3 and 5, and a reliability diagram, from the rows of one comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from model.evaluation.intervals import mean_interval, paired_bootstrap
from model.evaluation.result_rows import ExitQuality, ResultRow
from model.experiments.result import Cell, Result, Table, interval
from model.experiments.select import by_kind, deepest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1b6ca8", "#c2571a", "#4f8a3c", "#7a4fa3", "#8a6d1f", "#4a4a4a", "#b03a6a", "#2a9d9d")
FIXED = "#4a4a4a"  # of systems without exits: a point each, with its name beside it
FEWEST = 10  # photos in a bin, or it is left out
BANDED = ("DeeCap, concatenation", "TF-EE")  # bands of all systems would lie over one another
NARROWEST = 5.0  # points that colours span at least, so that what hardly differs looks so


def figure5(rows: Sequence[ResultRow]) -> Result:
    """Quality against SpeedUp of every system with exits; at the right what each loses against its own full depth."""
    found, layers = by_kind(rows), deepest(rows)
    curves: dict[str, list[dict[str, float]]] = {}
    lines: list[list[Cell]] = []
    for name, row in found.items():
        curve = []
        for point in sorted(row.points, key=lambda point: point.speedup):
            speedup = point.speedup * layers / row.layers
            mean, low, high = mean_interval(point.cider)
            loss = paired_bootstrap(point.cider, row.points[0].cider)
            curve.append(
                {
                    "speedup": speedup, "executed": point.executed_speedup * layers / row.layers, "tau": point.tau,
                    "cider": mean, "low": low, "high": high,
                    "loss": loss.estimate, "loss_low": loss.low, "loss_high": loss.high,
                }
            )  # fmt: skip
            shown_loss = interval(*loss, signed=True) if point.tau > 0 else None
            lines.append([name, point.tau, speedup, curve[-1]["executed"], interval(mean, low, high), shown_loss])
        curves[name] = curve

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for name, curve in curves.items():
            if len(curve) == 1:
                _fixed(left, curve[0], name)
        with_exits = ((name, curve) for name, curve in curves.items() if len(curve) > 1)
        for colour, (name, curve) in zip(COLOURS, with_exits, strict=False):
            _curve(left, curve, ("cider", "low", "high"), name, colour)
            _curve(right, curve, ("loss", "loss_low", "loss_high"), name, colour)
        left.set(xlabel="SpeedUp, the paper's ratio", ylabel="CIDEr-D x 100", title="Quality")
        right.set(xlabel="SpeedUp, the paper's ratio", ylabel="CIDEr-D less that at full depth", title="Loss, paired")
        right.axhline(0, color="#999999", linewidth=0.8)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)

    columns = ["System", "τ", "SpeedUp", "executed", "CIDEr-D (95%)", "less full depth's, paired"]
    missing = [name for name in ("TF-EE", "DeeCap, concatenation") if name not in found]
    notes = [
        f"One seed of each. 95% bootstrap bands over photos, drawn of {' and '.join(BANDED)} alone. A τ of 100 is "
        "beyond any entropy: every word leaves at the first tested layer."
    ]
    return Result("Figure 5: quality against SpeedUp", Table(columns, lines), {"curves": curves}, draw, notes, missing)


def _curve(axes: Axes, curve: Sequence[dict[str, float]], keys: tuple[str, str, str], name: str, colour: str) -> None:
    x = [point["speedup"] for point in curve]
    middle, low, high = ([point[key] for point in curve] for key in keys)
    banded = name in BANDED
    axes.plot(x, middle, "o-", color=colour, label=name, markersize=3, linewidth=2.0 if banded else 0.9)
    if banded:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _fixed(axes: Axes, point: dict[str, float], name: str) -> None:
    x, y = point["speedup"], point["cider"]
    axes.errorbar([x], [y], [[y - point["low"]], [point["high"] - y]], fmt="s", color=FIXED, capsize=3)
    axes.annotate(name, (x, y), (5, 5), textcoords="offset points", fontsize=7, color=FIXED)


def figure2(rows: Sequence[ResultRow]) -> Result:
    """CIDEr-D by number of layers: TF-kL and TF-Complete as they are, TF-EE's captions by their mean exit layer.

    Captions that leave early are of easier photos, so beside each bin stands TF-Complete on that bin's own photos.
    """
    found, layers = by_kind(rows), deepest(rows)
    complete, early = found.get("TF-Complete"), found.get("TF-EE")
    fixed = sorted((row.layers, row) for name, row in found.items() if row.model["exits"] == "final")
    lines: list[list[Cell]] = []
    data: dict[str, list[dict[str, Any]]] = {"fixed": [], "early": []}
    for depth, row in fixed:
        mean, low, high = mean_interval(row.points[0].cider)
        data["fixed"].append({"layers": depth, "cider": mean, "low": low, "high": high})
        name = "TF-Complete" if depth == layers else f"TF-{depth}L"
        lines.append([name, depth, len(row.points[0].cider), interval(mean, low, high), None])
    # Where all words leave at one layer, at either end, it is not the captions that choose it.
    adaptive = [point for point in early.points if 1 < point.speedup < early.layers] if early else []
    if adaptive:
        depths = np.concatenate([point.depth for point in adaptive])
        ciders = np.concatenate([point.cider for point in adaptive])
        same = np.tile(complete.points[0].cider, len(adaptive)) if complete else None
        for depth in range(1, layers + 1):
            chosen = np.rint(depths) == depth
            if chosen.sum() < FEWEST:
                continue
            mean, low, high = mean_interval(ciders[chosen])
            theirs = float(same[chosen].mean()) if same is not None else None
            data["early"].append(
                {"layers": depth, "cider": mean, "low": low, "high": high, "complete_same_photos": theirs}
            )
            lines.append(["TF-EE", depth, int(chosen.sum()), interval(mean, low, high), theirs])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for colour, (name, points) in zip(COLOURS, data.items(), strict=False):
            if points:
                label = {"fixed": "TF-kL, TF-Complete at the end", "early": "TF-EE by mean exit layer"}[name]
                x, y = ([point[key] for point in points] for key in ("layers", "cider"))
                errors = [[p["cider"] - p["low"] for p in points], [p["high"] - p["cider"] for p in points]]
                axes.errorbar(x, y, errors, fmt="o-", color=colour, label=label, capsize=3)
        both = [point for point in data["early"] if point["complete_same_photos"] is not None]
        if both:
            x, y = ([point[key] for point in both] for key in ("layers", "complete_same_photos"))
            axes.plot(x, y, "x--", color=COLOURS[5], label="TF-Complete on TF-EE's photos of that bin")
        axes.set(xlabel="decoder layers", ylabel="CIDEr-D x 100")
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)

    columns = ["System", "Layers", "Captions", "CIDEr-D (95%)", "TF-Complete on the same photos"]
    wanted = ["TF-Complete", *(f"TF-{depth}L" for depth in range(1, layers)), "TF-EE"]
    notes = [
        "TF-EE's captions at all measured thresholds but the two ends, each photo once per threshold; its intervals "
        f"take them for independent and are too narrow. Bins of fewer than {FEWEST} captions are left out."
    ]
    missing = [name for name in wanted if name not in found]
    return Result("Figure 2: layers against quality", Table(columns, lines), data, draw, notes, missing)


def figure3(rows: Sequence[ResultRow]) -> Result:
    """FCS and AUROC of every exit of every system; TF-kL fill one row together, each at its own depth."""
    found, layers = by_kind(rows), deepest(rows)
    exits: dict[str, dict[int, ExitQuality]] = {}
    for name, row in found.items():
        line = "TF-kL" if row.model["exits"] == "final" and row.layers < layers else name
        exits.setdefault(line, {}).update({one.layer: one for one in row.exits})
    lines: list[list[Cell]] = []
    cells: dict[str, dict[str, list[float | None]]] = {"AUROC": {}, "FCS": {}}
    for name, by_layer in exits.items():
        for measure, field in (("AUROC", "auroc"), ("FCS", "fcs")):
            values = [getattr(by_layer[m], field) if m in by_layer else None for m in range(1, layers + 1)]
            percent = [None if value is None else 100 * value for value in values]
            cells[measure][name] = percent
            lines.append([name, measure, *percent])

    def draw(figure: Figure) -> None:
        for axes, (measure, by_name) in zip(figure.subplots(1, 2), cells.items(), strict=True):
            grid = np.array([[np.nan if v is None else v for v in values] for values in by_name.values()], float)
            middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
            half = max(NARROWEST, np.nanmax(grid) - np.nanmin(grid)) / 2
            image = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=middle - half, vmax=middle + half)
            for (y, x), value in np.ndenumerate(grid):
                if np.isfinite(value):
                    colour = "black" if image.norm(value) > 0.6 else "white"
                    axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
            axes.set_xticks(range(layers), [str(m) for m in range(1, layers + 1)])
            axes.set_yticks(range(len(by_name)), list(by_name))
            axes.set(title=measure, xlabel="decoder layer")
            figure.colorbar(image, ax=axes)

    columns = ["System", "x 100", *(f"Layer {m}" for m in range(1, layers + 1))]
    notes = [
        "One seed of each. Teacher-forced over every reference token, EOS included. Hard: the likeliest word is not "
        "the reference's; confidence: the probability of the likeliest word. AUROC is the share of easy-hard pairs in "
        "the right order. "
        "FCS is 1 less the discordant share of *all* pairs, the only reading of equation 2 that can reach the paper's "
        "80%: it rises, too, when easy and hard tokens are unequal in number, so compare AUROC first."
    ]
    missing = [name for name in ("TF-Complete", "TF-EE", "DeeCap, concatenation") if name not in found]
    return Result("Figure 3: FCS by layer", Table(columns, lines), cells, draw, notes, missing)


def reliability(rows: Sequence[ResultRow]) -> Result:
    """Beyond the paper: is a word as often right as its probability says, and does entropy know hard words as well?"""
    found = by_kind(rows)
    lines: list[list[Cell]] = []
    diagrams: dict[str, dict[str, list[list[float]]]] = {}
    for name, row in found.items():
        for one in row.exits:
            shares = [one.accuracy, one.calibration_error, one.auroc, one.entropy_auroc]
            lines.append([name, one.layer, one.tokens, *(None if share is None else 100 * share for share in shares)])
            diagrams.setdefault(name, {})[str(one.layer)] = one.reliability

    def draw(figure: Figure) -> None:
        across = min(len(diagrams), 4)
        down = -(-len(diagrams) // across)
        figure.set_size_inches(10, 0.5 + 3.5 * down)
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        for empty in panels[len(diagrams) :]:
            empty.set_visible(False)
        for axes, (name, layers) in zip(panels, diagrams.items(), strict=False):
            axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
            for colour, (layer, bins) in zip(COLOURS * 2, layers.items(), strict=False):
                axes.plot([b[1] for b in bins], [b[2] for b in bins], "o-", color=colour, markersize=3, label=layer)
            axes.set(title=name, xlabel="confidence")
            axes.title.set_fontsize(8)
            axes.legend(title="layer", fontsize=6, title_fontsize=6)
        panels[0].set_ylabel("share that is right")

    columns = ["System", "Layer", "Tokens", "Accuracy", "Calibration error", "AUROC of probability", "of -entropy"]
    notes = ["All but counts x 100. Calibration error: mean distance of confidence from accuracy over ten bins."]
    return Result("Reliability of the exits", Table(columns, lines), {"diagrams": diagrams}, draw, notes)
