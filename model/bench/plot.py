"""A measurement as pictures: PNG files, drawn without a screen. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from model.bench.breakdown import PARTS
from model.bench.report import threads_of

OURS, THEIRS, LIGHTER = "#1b6ca8", "#c2571a", "#e3a27c"
PART_COLOURS = ("#dfe3e8", "#c3cad3", "#a3adb9", "#d9c36a", "#1b6ca8", "#c2571a", "#8fbfe3", "#eaae8a", "#4a4a4a")
LEGEND = {"tests, deep": "tests and catch-up, deep"}


def plot_bench(result: dict[str, Any], path: Path) -> None:
    """Left the decoder alone by tier, right end to end beside the peers."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _plot_decoder(left, result)
    _plot_end_to_end(right, result)
    machine = result["machine"]
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['processor']}, {threads_of(machine)}"
    figure.suptitle(f"{result['bundle']['name']} on {where}, {result['precision']}, one photo at a time", fontsize=11)
    figure.savefig(path, dpi=150)


def _plot_decoder(axes: Axes, result: dict[str, Any]) -> None:
    rows = [row for row in result["decoder"]["rows"] if not row["random_weights"]]
    means = [row["ms"]["mean"] for row in rows]
    axes.bar(range(len(rows)), means, color=OURS, width=0.6)
    for index, (row, mean) in enumerate(zip(rows, means, strict=True)):
        speed = row["speedup"]
        words = f"{mean:.1f} ms\nclock {speed['clock']:.2f}x\nlayers {speed['paper']:.2f}x"
        axes.text(index, mean, words, ha="center", va="bottom", fontsize=8, linespacing=1.3)
    axes.set_xticks(range(len(rows)), [row["name"].replace(", ", ",\n") for row in rows])
    axes.set_ylim(0, max(means) * 1.3)
    axes.set_ylabel("milliseconds per caption, mean")
    axes.set_title("Decoder alone", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_end_to_end(axes: Axes, result: dict[str, Any]) -> None:
    """Points and not bars: a logarithmic axis has no zero for a bar to stand on."""
    points = [(row["name"], row["ms"]["p50"], OURS) for row in result["end_to_end"]]
    for peer in result.get("peers", []):
        points += [
            (f"{peer['name']}, {dtype}", peer["ms"][dtype], colour)
            for dtype, colour in (("bfloat16", LIGHTER), ("float32", THEIRS))
        ]
    for place, (_, value, colour) in enumerate(points):
        axes.plot([value], [place], "o", color=colour, markersize=8)
        axes.annotate(f"{value:,.0f} ms", (value, place), (9, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(points)), [name for name, _, _ in points])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    values = [value for _, value, _ in points]
    axes.set_xlim(min(values) / 1.5, max(values) * 2.5)
    axes.set_xlabel("milliseconds per photo, median, logarithmic")
    title = "End to end: ours from the file's bytes"
    axes.set_title(f"{title}, peers from ready pixels" if "peers" in result else title, fontsize=10)
    axes.grid(axis="x", which="major", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def plot_breakdown(breakdown: dict[str, Any], path: Path) -> None:
    """A bar for each tier, its parts in the order in which they happen."""
    rows = breakdown["tiers"]
    figure = Figure(figsize=(11, 1.6 + 0.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    starts = [0.0] * len(rows)
    for part, colour in zip(PARTS, PART_COLOURS, strict=True):
        values = [max(0.0, row["ms"][part]) for row in rows]  # a difference of noisy figures can come out below 0
        axes.barh(range(len(rows)), values, left=starts, color=colour, height=0.6, label=LEGEND.get(part, part))
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    for place, end in enumerate(starts):
        axes.text(end, place, f" {end:.1f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(starts) * 1.12)
    axes.set_xlabel("milliseconds per photo, one at a time")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=len(PARTS), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
