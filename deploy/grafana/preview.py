"""Draws the dashboards without Grafana: each panel's data, from a Prometheus that runs, one PNG for each dashboard.

`python deploy/grafana/preview.py --prometheus http://127.0.0.1:9090 --minutes 30 --out pictures`. It is no copy of what
Grafana draws: it shows what is in each panel, in the same place, so that a person can judge it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DASHBOARDS = Path(__file__).parent / "dashboards"
POINTS = 120  # over the width of a panel
UNIT = 0.62, 0.30  # inches, of one of Grafana's grid units
SHORT = {"percentunit": "share", "reqps": "1/s", "ops": "1/s", "none": "", "decmbytes": "MB"}

Panel = dict[str, Any]
Series = tuple[dict[str, str], np.ndarray, np.ndarray]  # labels, times, values


class Prometheus:
    """Answers for a stretch of time that ends now."""

    def __init__(self, url: str, minutes: float) -> None:
        self._url = url
        self.end = time.time()
        self.start = self.end - 60 * minutes
        self._step = max(1.0, 60 * minutes / POINTS)

    def over_time(self, expression: str) -> list[Series]:
        asked = {"query": expression, "start": self.start, "end": self.end, "step": self._step}
        return [
            (each["metric"], *np.array(each["values"], dtype=float).T)
            for each in self._get("query_range", asked)["result"]
        ]

    def values(self, label: str, metric: str) -> list[str]:
        found: list[str] = self._get(f"label/{label}/values", {"match[]": metric})
        return found

    def _get(self, what: str, asked: dict[str, Any]) -> Any:
        with urllib.request.urlopen(f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(asked)}", timeout=30) as answer:
            return json.loads(answer.read())["data"]


def draw(name: str, prometheus: Prometheus, interval: str = "1m") -> Figure:
    """The dashboard of that name. `interval`: what `$__rate_interval` is."""
    dashboard = json.loads((DASHBOARDS / f"{name}.json").read_text())
    panels = list(_repeated(dashboard["panels"], prometheus))
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = pyplot.figure(figsize=(24 * UNIT[0], height * UNIT[1] + 0.8))
    figure.suptitle(dashboard["title"], x=0.01, ha="left", fontsize=15)
    top = 1 - 0.7 / figure.get_figheight()
    for panel in panels:
        box = panel["gridPos"]
        left, bottom = box["x"] / 24, top * (1 - (box["y"] + box["h"]) / height)
        if panel["type"] == "row":
            figure.text(0.01, bottom, panel["title"], fontsize=12, weight="bold")
            continue
        width, tall = box["w"] / 24, top * box["h"] / height
        axes = figure.add_axes((left + 0.03, bottom + 0.2 * tall, width - 0.042, 0.62 * tall))
        axes.set_title(panel["title"], fontsize=9, loc="left")
        {"stat": _stat, "heatmap": _heatmap, "table": _table}.get(panel["type"], _lines)(
            axes, panel, prometheus, interval
        )
    return figure


def _repeated(panels: list[Panel], prometheus: Prometheus) -> Iterator[Panel]:
    """A panel that is repeated for each value of a variable, once for each, and what comes after it moved down."""
    down = 0
    for panel in panels:
        box = panel["gridPos"]
        if not panel.get("repeat"):
            yield {**panel, "gridPos": {**box, "y": box["y"] + down}}
            continue
        metric = re.findall(r"deecap_\w+", panel["targets"][0]["expr"])[0]
        values = prometheus.values(panel["repeat"], metric) or [""]
        for index, value in enumerate(values):
            text = json.dumps({**panel, "repeat": None}).replace(f"${panel['repeat']}", value)
            place = {**box, "x": index % 3 * 8, "y": box["y"] + index // 3 * box["h"]}
            yield {**json.loads(text), "gridPos": place}
        down += (len(values) - 1) // 3 * box["h"]


def _ask(panel: Panel, prometheus: Prometheus, interval: str) -> Iterator[tuple[str, Series]]:
    """Each series with its legend."""
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", interval).replace("$speed", ".+")
        for series in prometheus.over_time(expression):
            yield re.sub(r"{{(\w+)}}", lambda found, s=series: s[0].get(found[1], ""), target["legendFormat"]), series


def _empty(axes: Axes, panel: Panel) -> None:
    axes.text(0.5, 0.5, "no data", ha="center", va="center", color="#999", transform=axes.transAxes)
    axes.set_xticks([], [])
    axes.set_yticks([], [])


def _stat(axes: Axes, panel: Panel, prometheus: Prometheus, interval: str) -> None:
    axes.axis("off")
    found = [series[2][-1] for _, series in _ask(panel, prometheus, interval) if not math.isnan(series[2][-1])]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.text(0.5, 0.45, _written(found[0], unit) if found else "no data", ha="center", va="center", fontsize=17)


def _written(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.1%}"
    if unit == "s":
        return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
    return f"{value:.3g} {SHORT.get(unit, unit)}"


def _lines(axes: Axes, panel: Panel, prometheus: Prometheus, interval: str) -> None:
    found = sorted(_ask(panel, prometheus, interval), key=lambda each: each[0])
    if not found:
        _empty(axes, panel)
        return
    defaults = panel["fieldConfig"]["defaults"]
    stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    if stacked:
        times = np.unique(np.concatenate([series[1] for _, series in found]))
        rows = [_aligned(series, times) for _, series in found]
        axes.stackplot(_minutes(times, prometheus), rows, labels=[legend for legend, _ in found], alpha=0.7)
    else:
        for legend, (_, times, values) in found:
            style = "--" if "promised" in legend else "-"
            axes.plot(_minutes(times, prometheus), values, style, label=legend, linewidth=1.2)
    axes.set_ylim(bottom=0, top=defaults.get("max"))
    axes.set_ylabel(SHORT.get(defaults["unit"], defaults["unit"]), fontsize=7)
    axes.legend(fontsize=6, loc="upper left", ncols=2)
    _time_axis(axes, prometheus)


def _heatmap(axes: Axes, panel: Panel, prometheus: Prometheus, interval: str) -> None:
    found = sorted((_edge(series), series) for _, series in _ask(panel, prometheus, interval))
    if not found:
        _empty(axes, panel)
        return
    times = np.unique(np.concatenate([series[1] for _, series in found]))
    counts = np.diff([_aligned(series, times) for _, series in found], axis=0, prepend=0)
    last = max(np.flatnonzero(counts.sum(axis=1) > 0), default=0)
    counts = counts[: last + 1]
    edges = ["more" if math.isinf(edge) else f"{edge:g}" for edge, _ in found][: last + 1]
    minutes = _minutes(times, prometheus)
    ends = np.append(minutes, minutes[-1] + (minutes[1] - minutes[0] if len(minutes) > 1 else 1))
    axes.pcolormesh(ends, np.arange(len(edges) + 1) - 0.5, counts)
    axes.set_yticks(np.arange(len(edges)), edges, fontsize=6)
    _time_axis(axes, prometheus)


def _table(axes: Axes, panel: Panel, prometheus: Prometheus, interval: str) -> None:
    axes.axis("off")
    rows = [series[0] for _, series in _ask(panel, prometheus, interval)]
    if not rows:
        _empty(axes, panel)
        return
    names = [name for name in rows[0] if name not in ("__name__", "job")]
    axes.table([[row.get(name, "") for name in names] for row in rows], colLabels=names, loc="center", fontsize=7)


def _edge(series: Series) -> float:
    return float(series[0]["le"])


def _aligned(series: Series, times: np.ndarray) -> np.ndarray:
    """Its values at these times; 0 where it had none."""
    values = np.zeros(len(times))
    values[np.searchsorted(times, series[1])] = np.nan_to_num(series[2])
    return values


def _minutes(times: np.ndarray, prometheus: Prometheus) -> np.ndarray:
    return (times - prometheus.end) / 60


def _time_axis(axes: Axes, prometheus: Prometheus) -> None:
    axes.set_xlim((prometheus.start - prometheus.end) / 60, 0)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)
    axes.set_xlabel("minutes ago: 0 is now", fontsize=6)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--prometheus", default="http://127.0.0.1:9090", help="default: %(default)s")
    words.add_argument("--minutes", type=float, default=30.0, help="how far back; default: %(default)s")
    words.add_argument("--interval", default="1m", help="what rates are taken over; default: %(default)s")
    words.add_argument("--out", type=Path, default=Path("bench/dashboards"), help="folder; default: %(default)s")
    options = words.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(DASHBOARDS.glob("*.json")):
        figure = draw(path.stem, Prometheus(options.prometheus, options.minutes), options.interval)
        figure.savefig(options.out / f"{path.stem}.png", dpi=80)
        pyplot.close(figure)
        print(options.out / f"{path.stem}.png")


if __name__ == "__main__":
    main()
