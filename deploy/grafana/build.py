"""The three Grafana dashboards, one line or two for each panel: `python deploy/grafana/build.py` writes their JSON.

Every metric they ask for is described in service/metrics.py or service/worker_metrics.py, or recorded by
deploy/prometheus/rules. A test holds that the files in dashboards/ are what this writes, and that each query has data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "deecap-prometheus"}
WIDTH = 24  # of a row, in Grafana's units

Panel = dict[str, Any]


# What the panels ask, in words that come more than once ---------------------------------------------------------------

CAPTIONS = 'route=~"/(v1/)?captions?"'
GOOD = CAPTIONS + ', outcome="ok"'
GOOD_WITH_SPEED = GOOD + ', speed=~"$speed"'
WITH_SPEED = CAPTIONS + ', speed=~"$speed", speed!="none"'
REQUESTS = "deecap_request_duration_seconds"
BUDGET = 0.005  # of captions that may fail: the promise in deploy/prometheus/rules/recording.yml


def rate(metric: str, labels: str = "") -> str:
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def total(metric: str, labels: str = "", by: str = "") -> str:
    """Per second, all processes together."""
    return f"sum{f' by ({by})' if by else ''} ({rate(metric, labels)})"


def mean(histogram: str, labels: str = "", by: str = "") -> str:
    return f"{total(histogram + '_sum', labels, by)} / {total(histogram + '_count', labels, by)}"


def quantile(share: float, histogram: str, labels: str = "", by: str = "") -> str:
    return f"histogram_quantile({share}, {total(histogram + '_bucket', labels, f'le, {by}' if by else 'le')})"


def within(seconds: float) -> str:
    """The share of captions that were answered, and in this time."""
    good = total(REQUESTS + "_bucket", f'{GOOD}, le="{seconds}"')
    return f"{good} / {total(REQUESTS + '_count', GOOD)}"


# Panels ---------------------------------------------------------------------------------------------------------------


def _panel(kind: str, title: str, words: str, unit: str, width: int, height: int, queries: dict[str, str]) -> Panel:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
        for index, (legend, expr) in enumerate(queries.items())
    ]
    return {
        "type": kind,
        "title": title,
        "description": words,
        "datasource": SOURCE,
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": targets,
    }


def stat(title: str, unit: str, expr: str, words: str = "") -> Panel:
    """One number: how it is now."""
    panel = _panel("stat", title, words, unit, 4, 4, {title: expr})
    panel["options"] = {"graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"]}}
    return panel


def graph(
    title: str, unit: str, queries: dict[str, str], words: str = "", stacked: bool = False, top: float = 0
) -> Panel:
    """Lines over time, each under its legend. `top`: the end of the axis, where that is known."""
    panel = _panel("timeseries", title, words, unit, 8, 8, queries)
    defaults = panel["fieldConfig"]["defaults"]
    defaults["min"] = 0
    if top:
        defaults["max"] = top
    defaults["custom"] = {"fillOpacity": 40 if stacked else 8, "stacking": {"mode": "normal" if stacked else "none"}}
    panel["options"] = {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    for target in panel["targets"]:
        target["exemplar"] = "histogram_quantile" in target["expr"]  # a slow request's id, to look for in the log
    return panel


def heatmap(title: str, unit: str, buckets: str, words: str = "", repeat: str = "") -> Panel:
    """Time, a histogram's buckets, and in colour how many. `repeat`: a variable with a panel for each of its values."""
    panel = _panel("heatmap", title, words, unit, 8, 8, {"{{le}}": buckets})
    panel["targets"][0]["format"] = "heatmap"
    panel["options"] = {
        "calculate": False,
        "cellGap": 0,
        "color": {"mode": "scheme", "scheme": "Viridis"},
        "yAxis": {"unit": unit},
        "tooltip": {"mode": "single", "yHistogram": True},
    }
    if repeat:
        panel |= {"repeat": repeat, "repeatDirection": "h", "maxPerRow": 3}
    return panel


def table(title: str, expr: str, words: str = "") -> Panel:
    """The labels of series, one row each."""
    panel = _panel("table", title, words, "none", 16, 6, {"": expr})
    panel["targets"][0] |= {"format": "table", "instant": True}
    hidden = dict.fromkeys(("Time", "Value", "__name__", "job"), True)
    panel["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return panel


def row(title: str) -> Panel:
    return {"type": "row", "title": title, "gridPos": {"w": WIDTH, "h": 1}, "collapsed": False, "panels": []}


# Dashboards -----------------------------------------------------------------------------------------------------------

LATENCY = [
    stat("Captions asked for", "reqps", total(REQUESTS + "_count", CAPTIONS)),
    stat(
        "Answered well",
        "percentunit",
        f"{total(REQUESTS + '_count', GOOD)} / {total(REQUESTS + '_count', CAPTIONS)}",
        "Of all, also of those that clients got wrong.",
    ),
    stat("Slowest of 20 (p95)", "s", quantile(0.95, REQUESTS, GOOD)),
    stat(
        "Error budget, last hour",
        "none",
        f"deecap:slo_errors:ratio_rate1h / {BUDGET}",
        "1: just what the promise allows.",
    ),
    stat("Photos that wait", "none", "sum(max by (priority) (deecap_queue_jobs))"),
    stat("Workers that caption", "none", 'max(deecap_workers{state="ready"})'),
    row("Latency"),
    *[
        graph(
            f"{name} by speed",
            "s",
            {"{{speed}}": quantile(share, REQUESTS, GOOD_WITH_SPEED, "speed")},
            "From the request's headers to the end of the answer.",
        )
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    ],
    graph(
        "Where the time goes",
        "s",
        {"{{stage}}": mean("deecap_stage_duration_seconds", by="stage")},
        "Mean of each part of a caption, as workers see it.",
        stacked=True,
    ),
    heatmap("All captions", "s", total(REQUESTS + "_bucket", GOOD, "le")),
    graph("Answered within", "percentunit", {f"{edge} s": within(edge) for edge in (0.1, 0.25, 1.0)}, top=1),
    row("Traffic"),
    graph("Captions by speed", "reqps", {"{{speed}}": total(REQUESTS + "_count", WITH_SPEED, "speed")}, stacked=True),
    graph(
        "Not answered well",
        "reqps",
        {"{{outcome}}": total(REQUESTS + "_count", CAPTIONS + ', outcome!~"ok|accepted"', "outcome")},
        "By the code that the client was told.",
    ),
    graph(
        "Refused", "reqps", {"{{reason}}": total("deecap_rejections_total", by="reason")}, "Before any work was done."
    ),
    graph(
        "Queue",
        "none",
        {"waiting, {{priority}}": "max by (priority) (deecap_queue_jobs)", "running": "max(deecap_jobs_running)"},
        "Every front tells the same of it.",
    ),
    graph("Oldest photo in the queue", "s", {"waits": "max(deecap_queue_oldest_seconds)"}),
    graph(
        "Made faster for the load",
        "none",
        {
            "{{instance}}": "deecap_load_level",
            "captions per second": total("deecap_speed_moved_total"),
        },
        "How far each worker moves the speed of photos that allow it, 0 to 1, and how many.",
    ),
    graph("At the fronts", "none", {"{{instance}}": "deecap_requests_in_flight"}, "Requests being answered."),
    row("Promise: 99.5% answered"),
    graph(
        "Error budget burns",
        "none",
        {window: f"deecap:slo_errors:ratio_rate{window} / {BUDGET}" for window in ("5m", "1h", "6h")},
        "Times what the promise allows; 14.4 for an hour wakes somebody.",
    ),
    graph(
        "Too late",
        "reqps",
        {"in the {{place}}": total("deecap_deadline_misses_total", by="place")},
        "Captions whose deadline passed.",
    ),
    graph(
        "Lost and found",
        "none",
        {
            "submitted again": "sum(increase(deecap_resubmissions_total[$__rate_interval]))",
            "store lost": "sum(increase(deecap_store_losses_total[$__rate_interval]))",
            "client hung up": "sum(increase(deecap_disconnects_total[$__rate_interval]))",
        },
    ),
]

SPEED = 'speed=~"$speed"'
STEPS = total("deecap_exit_layer_count", SPEED, "speed")
FIRST = total("deecap_exit_layer_bucket", SPEED + ', le="1.0"', "speed")
WORDS = total("deecap_words_total", SPEED, "speed")
DEPTHS = total("deecap_exit_layer_sum", SPEED, "speed")
SAVED = total("deecap_layers_saved_total", SPEED, "speed")

EXITS = [
    heatmap(
        "Exit layers at $speed",
        "none",
        f"sum by (le) (increase(deecap_exit_layer_bucket{{{SPEED}}}[$__rate_interval]))",
        "At which layer words leave, over time. A shift upwards: harder photos.",
        repeat="speed",
    ),
    row("How deep"),
    graph("Mean exit layer", "none", {"{{speed}}": mean("deecap_exit_layer", SPEED, "speed")}),
    graph(
        "SpeedUp, achieved and promised",
        "none",
        {
            "{{speed}}": f"({SAVED} + {DEPTHS}) / {DEPTHS}",
            "{{speed}}, promised": f"deecap:speedup:promised{{{SPEED}}}",
        },
        "The paper's: layers at full depth over those that words left at. Promised: by the workers' bundle.",
    ),
    graph(
        "Off the calibration",
        "percentunit",
        {"{{speed}}": "abs(deecap:speedup:achieved5m / on (speed) deecap:speedup:promised - 1)"},
        "Achieved over promised. Beyond a third for an hour and a half an hour more, an alert fires.",
    ),
    graph("Entropy of words", "none", {"{{speed}}": mean("deecap_word_entropy_nats", SPEED, "speed")}, "Nats, mean."),
    row("What it saves"),
    graph("Layers saved", "none", {"{{speed}}": SAVED}, "Decoder layers above the exits, per second.", stacked=True),
    graph("Share of layers saved", "percentunit", {"{{speed}}": f"{SAVED} / ({SAVED} + {DEPTHS})"}, top=1),
    graph(
        "Steps that left at layer 1",
        "percentunit",
        {"{{speed}}": f"{FIRST} / {STEPS}"},
        top=1,
    ),
    row("Words"),
    graph("Words written", "none", {"{{speed}}": WORDS}, "Per second.", stacked=True),
    graph(
        "Words per caption",
        "none",
        {"{{speed}}": f"{WORDS} / {total(REQUESTS + '_count', GOOD_WITH_SPEED, 'speed')}"},
        "Written over answered: too low where several requests got one caption (Workers, The same at once).",
    ),
]

WORKER = 'job=~".*worker"'
PROCESSES = 'job=~".*(front|worker)"'
RUNNING = f"deecap_worker_jobs_running{{{WORKER}}}"
EACH = '(max(deecap_slots) / max(deecap_workers{state="alive"}))'
HITS = total("deecap_cache_hits_total", by="cache")
MISSES = total("deecap_cache_misses_total", by="cache")

WORKERS = [
    stat("Alive", "none", 'max(deecap_workers{state="alive"})'),
    stat("Ready", "none", 'max(deecap_workers{state="ready"})'),
    stat("Captions in the making", "none", "max(deecap_jobs_running)"),
    stat("Captions they can make at once", "none", "max(deecap_slots)"),
    stat("Dead letters", "none", "max(deecap_dead_letters_total)", "Photos that killed every worker that took them."),
    stat(
        "Longest without a caption",
        "s",
        "max(time() - deecap_worker_last_success_timestamp_seconds)",
        "A canary each 30 s counts.",
    ),
    row("Work"),
    graph(
        "Utilisation",
        "percentunit",
        {"{{instance}}": f"avg_over_time({RUNNING}[$__rate_interval]) / on () group_left () {EACH}"},
        "Of the captions that workers can have in the making, how many they have, those on the way included.",
    ),
    graph("Processor", "none", {"{{instance}}": rate("process_cpu_seconds_total", WORKER)}, "Cores in use."),
    graph("Jobs that left", "ops", {"{{outcome}}": total("deecap_worker_jobs_total", by="outcome")}, stacked=True),
    graph(
        "Batches, mean",
        "none",
        {
            "photos in one look": mean("deecap_look_batch_photos"),
            "captions in one step": mean("deecap_step_batch_captions"),
        },
    ),
    heatmap("Captions in one step", "none", total("deecap_step_batch_captions_bucket", by="le")),
    graph(
        "The same at once",
        "ops",
        {"coalesced": total("deecap_coalesced_total")},
        "Jobs answered with a caption in the making for another.",
    ),
    row("Cache"),
    graph(
        "Photos known",
        "percentunit",
        {"{{cache}}": f"{HITS} / ({HITS} + {MISSES})"},
        "Share of photos whose regions were cached.",
        top=1,
    ),
    graph(
        "Cache failures",
        "ops",
        {"{{cache}}": total("deecap_cache_errors_total", by="cache")},
        "Captions go on without it.",
    ),
    graph(
        "Too late",
        "ops",
        {"{{place}}": total("deecap_worker_deadline_misses_total", by="place")},
        "By what the job was at, or waited for.",
    ),
    row("Faults"),
    graph(
        "Taken over from dead workers", "none", {"jobs": "max(increase(deecap_redeliveries_total[$__rate_interval]))"}
    ),
    graph("Memory", "bytes", {"{{job}} {{instance}}": f"process_resident_memory_bytes{{{PROCESSES}}}"}),
    graph("Open files", "none", {"{{job}} {{instance}}": f"process_open_fds{{{PROCESSES}}}"}),
    table("Models served", "deecap_model_info", "More than one revision: an update is under way."),
    row("GPU (dcgm-exporter)"),
    graph("GPU busy", "percent", {"GPU {{gpu}}": "DCGM_FI_DEV_GPU_UTIL"}, top=100),
    graph("GPU memory", "decmbytes", {"GPU {{gpu}}": "DCGM_FI_DEV_FB_USED"}),
    graph("GPU power", "watt", {"GPU {{gpu}}": "DCGM_FI_DEV_POWER_USAGE"}),
]

DASHBOARDS = {
    "latency": ("Latency and traffic", LATENCY, REQUESTS + "_count"),
    "exits": ("Exit layers", EXITS, "deecap_exit_layer_count"),
    "workers": ("Workers", WORKERS, ""),
}


def dashboard(name: str) -> dict[str, Any]:
    """The whole dashboard, as Grafana reads it."""
    title, panels, with_speeds = DASHBOARDS[name]
    variables = []
    if with_speeds:
        variables.append(
            {
                "name": "speed",
                "type": "query",
                "datasource": SOURCE,
                "query": {"query": f"label_values({with_speeds}, speed)", "refId": "speed"},
                "regex": "/^(?!none)/",
                "includeAll": True,
                "multi": True,
                "current": {"text": ["All"], "value": ["$__all"]},
                "refresh": 2,
            }
        )
    return {
        "uid": f"deecap-{name}",
        "title": f"DeeCap: {title}",
        "tags": ["deecap"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": variables},
        "links": [{"type": "dashboards", "tags": ["deecap"], "title": "", "asDropdown": False, "keepTime": True}],
        "panels": list(_placed(panels)),
    }


def _placed(panels: Iterable[Panel]) -> Iterator[Panel]:
    """With ids and places: from left to right, and on to the next line where one is full."""
    x = y = height = 0
    for number, panel in enumerate(panels, start=1):
        size = panel["gridPos"]
        if x + size["w"] > WIDTH:
            x, y, height = 0, y + height, 0
        yield {**panel, "id": number, "gridPos": {"x": x, "y": y, **size}}
        x, height = x + size["w"], max(height, size["h"])


def as_text(name: str) -> str:
    return json.dumps(dashboard(name), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(as_text(each))
