"""docker-compose.yml: valid, careful, and what it starts works together: photos posted to it arrive in Prometheus."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import httpx
import pytest
import yaml

from service.settings import Settings
from tests.deploy import queries
from tests.deploy.compose import ROOT, Compose, load, seconds_of, stage

FILES = ("docker-compose.yml", "docker-compose.gpu.yml")


@pytest.fixture(params=FILES)
def services(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(*FILES[: FILES.index(request.param) + 1])


@pytest.mark.parametrize("name", FILES)
def test_it_follows_the_compose_specification(name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_service_is_pinned_limited_and_comes_back(services: dict[str, Any]) -> None:
    for name, service in services.items():
        image, tag = service["image"].rsplit(":", 1)
        assert tag not in ("", "latest"), (name, image)
        assert service["restart"] == "unless-stopped", name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        if "build" in service:
            assert stage(service["build"]["target"]).keys() == {"CMD", "HEALTHCHECK"}
        elif name != "dcgm-exporter":
            assert service["healthcheck"]["test"], name
        assert set(service.get("depends_on", {})) <= set(services)


def test_nothing_but_what_people_look_at_is_open_to_others() -> None:
    text = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for name, service in text["services"].items():
        for port in service.get("ports", []):
            address = "${DEECAP_ADDRESS:-127.0.0.1}:" if name in ("front", "grafana") else "127.0.0.1:"
            assert port.startswith(address), (name, port)


def test_a_drain_has_time_to_end(services: dict[str, Any]) -> None:
    drain = Settings.model_fields["drain_timeout_s"].default
    for name in ("front", "worker"):
        assert seconds_of(services[name]["stop_grace_period"]) >= drain + 5


def test_the_settings_are_settings(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("front", "worker"):
        with monkeypatch.context() as patch:
            for key, value in services[name]["environment"].items():
                patch.setenv(key, str(value))
            assert Settings.load().broker.endswith("redis:6379/0")


def test_photos_arrive_in_prometheus(stack: Compose) -> None:
    prometheus = stack.url("prometheus", 9090)
    up = {sample["metric"]["job"]: sample["value"][1] for sample in queries.ask(prometheus, "up")}
    assert up == {"front": "1", "worker": "1", "prometheus": "1"}
    ok = 'deecap_request_duration_seconds_count{route="/v1/caption", outcome="ok"}'
    speeds = {sample["metric"]["speed"] for sample in queries.ask(prometheus, ok)}
    assert speeds == {"full", "balanced", "fast", "turbo", "custom", "tau"}
    (answered,) = queries.ask(prometheus, 'sum(deecap_worker_jobs_total{outcome="answered"})')
    assert float(answered["value"][1]) > 10


def test_prometheus_keeps_the_ids_of_requests_as_exemplars(stack: Compose) -> None:
    asked = {"query": "deecap_request_duration_seconds_bucket", "start": 0, "end": 1e10}
    found = httpx.get(f"{stack.url('prometheus', 9090)}/api/v1/query_exemplars", params=asked, timeout=10).json()
    assert any(exemplar["labels"]["request_id"] for series in found["data"] for exemplar in series["exemplars"])


def test_the_rules_are_loaded_and_evaluated(stack: Compose) -> None:
    groups = httpx.get(f"{stack.url('prometheus', 9090)}/api/v1/rules", timeout=10).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 15
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


def test_the_password_is_needed(stack: Compose) -> None:
    """Secrets of the environment reach the servers, and not the logs."""
    import redis

    with pytest.raises(redis.AuthenticationError):
        redis.Redis(host=stack.addresses["redis"], port=6379).ping()
    for name in stack.services:
        assert "a-password-of-the-test" not in stack.log(name)
