"""The queries of the dashboards' panels, as Prometheus can be asked them, and asking it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx

DASHBOARDS = Path(__file__).parents[2] / "deploy/grafana/dashboards"
# What Grafana fills in: here for a scrape each second and traffic of some seconds.
FILLED_IN = {"$__rate_interval": "30s", "$speed": ".+"}

Sample = dict[str, object]


def panels() -> Iterator[tuple[str, str, str]]:
    """Dashboard, panel and query of each query there is."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield path.stem, panel["title"], target["expr"]


def filled_in(expression: str) -> str:
    for name, value in FILLED_IN.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, f"a variable that nobody fills in: {expression}"
    return expression


def ask(prometheus: str, expression: str) -> list[Sample]:
    """The series that the query has now, those without a number left out."""
    response = httpx.get(f"{prometheus}/api/v1/query", params={"query": filled_in(expression)}, timeout=10)
    assert response.status_code == 200, f"{expression}: {response.text}"
    found = response.json()["data"]["result"]
    return [sample for sample in found if not math.isnan(float(sample["value"][1]))]
