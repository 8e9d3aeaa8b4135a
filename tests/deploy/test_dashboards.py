"""The dashboards: what build.py writes, and every query of every panel has data after real traffic."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.deploy import queries
from tests.deploy.compose import ROOT, Compose
from tests.deploy.scripts import script

GRAFANA = ROOT / "deploy/grafana"

# Queries that cannot have data on a machine like this one, each with its reason. All others must.
WITHOUT_DATA = {
    "DCGM_FI_DEV_GPU_UTIL": "needs an NVIDIA GPU and dcgm-exporter",
    "DCGM_FI_DEV_FB_USED": "needs an NVIDIA GPU and dcgm-exporter",
    "DCGM_FI_DEV_POWER_USAGE": "needs an NVIDIA GPU and dcgm-exporter",
}


def test_the_committed_dashboards_are_what_build_writes() -> None:
    build = script("grafana/build.py")
    assert {path.stem for path in queries.DASHBOARDS.glob("*.json")} == set(build.DASHBOARDS)
    for name in build.DASHBOARDS:
        assert (queries.DASHBOARDS / f"{name}.json").read_text() == build.as_text(name), "run deploy/grafana/build.py"


@pytest.mark.parametrize("path", sorted(queries.DASHBOARDS.glob("*.json")), ids=lambda path: path.stem)
def test_a_dashboard_is_laid_out_and_explained(path: Path) -> None:
    found = json.loads(path.read_text())
    boxes = [panel["gridPos"] for panel in found["panels"]]
    taken = [
        (x, y)
        for box in boxes
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(taken) == len(set(taken)), "panels overlap"
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    titles = [panel["title"] for panel in found["panels"]]
    assert len(set(titles)) == len(titles)


def test_grafana_finds_source_and_dashboards_where_compose_puts_them() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["uid"] == script("grafana/build.py").SOURCE["uid"]
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((GRAFANA / "provisioning/dashboards/deecap.yml").read_text())["providers"][0]
    assert provider["options"]["path"] == mounts["./deploy/grafana/dashboards"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (queries.DASHBOARDS / Path(home).name).exists()


def test_every_query_of_every_panel_has_data(stack: Compose) -> None:
    prometheus = stack.url("prometheus", 9090)
    empty = [
        f"{dashboard}, {panel}: {expression}"
        for dashboard, panel, expression in queries.panels()
        if expression not in WITHOUT_DATA and not queries.ask(prometheus, expression)
    ]
    assert not empty, "\n".join(empty)


def test_the_list_of_queries_without_data_holds_no_others() -> None:
    assert set(WITHOUT_DATA) <= {expression for _, _, expression in queries.panels()}


def test_a_renamed_metric_is_noticed(stack: Compose) -> None:
    """What the test above is worth: a panel that asks for a metric nobody tells has no data."""
    prometheus = stack.url("prometheus", 9090)
    expressions = [expression for _, _, expression in queries.panels() if expression not in WITHOUT_DATA]
    for expression in expressions:
        misspelt = re.sub(r"\b(deecap|process)([_:])", r"\1_x\2", expression)
        assert misspelt != expression
        assert not queries.ask(prometheus, misspelt), expression
