"""The rules: promtool's unit tests pass, each alert has one where it fires, each metric named is told by somebody."""

from __future__ import annotations

import re
import shutil
import subprocess

import httpx
import pytest
import yaml

from tests.deploy.compose import ROOT, Compose
from tests.deploy.scripts import script

RULES = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
TESTS = ROOT / "tests/deploy/rules/test.yml"
ALERTS = {
    rule["alert"]: rule
    for path in RULES
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


def promtool(*arguments: object) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool here: apt-get install prometheus")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_config_and_rules() -> None:
    promtool("check", "config", ROOT / "deploy/prometheus/prometheus.yml")
    promtool("check", "rules", *RULES)


def test_promtools_unit_tests() -> None:
    promtool("test", "rules", TESTS)


def test_each_alert_is_seen_to_fire_and_to_be_silent() -> None:
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == set(ALERTS)
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == set(ALERTS)


def test_each_alert_is_explained() -> None:
    page = (ROOT / "docs/operating.md").read_text()
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert f"`{name}`" in page, f"docs/operating.md says nothing of {name}"


def test_what_is_written_by_the_script_is_up_to_date() -> None:
    build = script("prometheus/build.py")
    assert build.PROMETHEUS_RULE.read_text() == build.prometheus_rule(), "run deploy/prometheus/build.py"


def test_each_metric_of_the_rules_is_told_by_somebody(stack: Compose) -> None:
    told = httpx.get(f"{stack.url('prometheus', 9090)}/api/v1/label/__name__/values", timeout=10).json()["data"]
    named = {name for path in RULES for name in re.findall(r"\bdeecap[\w:]+", _expressions(path.read_text()))}
    assert named <= set(told)


def _expressions(text: str) -> str:
    return "\n".join(rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"])
