"""Writes the rules beside it as a Kubernetes object: `python deploy/prometheus/build.py` after any change to them."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules"
PROMETHEUS_RULE = ROOT / "deploy/kubernetes/base/prometheusrule.yaml"
WRITTEN = "# Written by deploy/prometheus/build.py: do not change it by hand.\n"


def prometheus_rule() -> str:
    """All rules, for the Prometheus operator."""
    groups = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    kind = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "deecap"},
        "spec": {"groups": groups},
    }
    return WRITTEN + yaml.safe_dump(kind, sort_keys=False, width=200, allow_unicode=True)


if __name__ == "__main__":
    PROMETHEUS_RULE.parent.mkdir(parents=True, exist_ok=True)
    PROMETHEUS_RULE.write_text(prometheus_rule())
