"""The manifests: valid, strict about what may run, and their numbers fit the service's own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.deploy.compose import ROOT, load, seconds_of
from tests.deploy.kustomize import Object, build

FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = ("cpu", "gpu")
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests/deploy/schemas").glob("*.json")}
VERSIONS = ("1.31", kubernetes_validate.latest_version())  # from the oldest that the docs name to the newest known


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return build(FOLDER / "overlays" / request.param)


def one(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pod template of each workload."""
    for each in objects:
        if each["kind"] == "Deployment":
            yield each["metadata"]["name"], each["spec"]["template"]


def test_each_object_follows_its_schema(objects: list[Object]) -> None:
    for each in objects:
        if schema := SCHEMAS.get(each["kind"].lower()):
            jsonschema.validate(each, schema)
        else:
            for version in VERSIONS:
                kubernetes_validate.validate(each, version, strict=True)


def test_a_misspelt_field_is_found(objects: list[Object]) -> None:
    """What the test above is worth."""
    deployment = one(objects, "Deployment", "worker")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 35
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)
    scaled = one(objects, "ScaledObject", "worker")
    scaled["spec"]["triggers"][0]["metadata"]["lagCount"] = "5"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(scaled, SCHEMAS["scaledobject"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_makes_the_same_of_it(overlay: str) -> None:
    """Where there is one; where not, the other tests hold all the same."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return
    folder = FOLDER / "overlays" / overlay
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    theirs = list(yaml.safe_load_all(re.sub(r"(name: deecap)-[a-z0-9]{10}\b", r"\1", done.stdout)))
    key = lambda each: (each["kind"], each["metadata"]["name"])  # noqa: E731
    assert sorted(theirs, key=key) == sorted(build(folder), key=key)


def test_pods_may_do_nothing_that_they_need_not(objects: list[Object]) -> None:
    """The Pod Security Standard `restricted`, which the namespace enforces, and a file system that is read-only."""
    assert (
        one(objects, "Namespace", "deecap")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )
    for name, template in pods(objects):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
            assert "memory" in container["resources"]["limits"], name
            assert not container["image"].endswith(":latest")
            assert ":" in container["image"].rsplit("/", 1)[-1], name


def test_probes_ask_what_they_are_for(objects: list[Object]) -> None:
    for name, port in (("front", "http"), ("worker", "metrics")):
        (container,) = one(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]
        for probe, path in (("startupProbe", "/startupz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
            assert container[probe]["httpGet"] == {"path": path, "port": port}
        assert port in [each["name"] for each in container["ports"]]


def test_a_drain_ends_before_it_is_killed(objects: list[Object]) -> None:
    drain = float(one(objects, "ConfigMap", "deecap")["data"]["DEECAP_DRAIN_TIMEOUT_S"])
    for name in ("front", "worker"):
        spec = one(objects, "Deployment", name)["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        before = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        assert before[0] == "sleep"
        assert spec["terminationGracePeriodSeconds"] >= float(before[1]) + drain + 5, name
    # A front that goes is not ready before its connections end, and the proxies hear of it while it still answers.
    assert seconds_of("5s") <= float(before[1]) or name == "worker"


def test_the_settings_are_settings(objects: list[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    shared = one(objects, "ConfigMap", "deecap")["data"]
    for name in ("front", "worker"):
        (container,) = one(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": "deecap"}}]
        with monkeypatch.context() as patch:
            for key, value in {**shared, **{each["name"]: each.get("value") for each in container["env"]}}.items():
                secret = "" if "KEYS" in key else f"redis://:a@{key.lower()}:6379/0"  # each its own Redis
                patch.setenv(key, secret if value is None else value)
            Settings.load()


def test_keda_watches_the_streams_that_the_broker_writes(objects: list[Object]) -> None:
    from service.broker.redis import RedisBroker
    from service.jobs import PRIORITIES

    queue = one(objects, "ConfigMap", "deecap")["data"]["DEECAP_QUEUE"]
    broker = RedisBroker("redis://redis:6379/0", queue, {}, 5.0, 3)
    spec = one(objects, "ScaledObject", "worker")["spec"]
    watched = [trigger["metadata"]["stream"] for trigger in spec["triggers"]]
    assert watched == [f"{broker._queue}:{priority}" for priority in PRIORITIES]
    assert spec["minReplicaCount"] >= 1
    assert "replicas" not in one(objects, "Deployment", spec["scaleTargetRef"]["name"])["spec"]
    for trigger in spec["triggers"]:
        host, port = trigger["metadata"]["address"].split(":")
        name, namespace, _ = host.split(".")
        service = one(objects, "Service", name)
        assert service["metadata"]["namespace"] == namespace
        assert int(port) in [each["port"] for each in service["spec"]["ports"]]


def test_names_that_refer_to_each_other_are_there(objects: list[Object]) -> None:
    labels = {name: template["metadata"]["labels"].items() for name, template in pods(objects)}
    for each in objects:
        selector = each["spec"].get("selector", {}) if "spec" in each else {}
        if each["kind"] == "Service":
            assert any(selector.items() <= found for found in labels.values()), each["metadata"]["name"]
        elif each["kind"] in ("Deployment", "PodDisruptionBudget"):
            assert any(selector["matchLabels"].items() <= found for found in labels.values())
        elif each["kind"] == "ServiceMonitor":
            found = [one for one in objects if one["kind"] == "Service"]
            chosen = [
                one for one in found if selector["matchLabels"].items() <= one["metadata"].get("labels", {}).items()
            ]
            (service,) = chosen
            ports = {port["name"] for port in service["spec"]["ports"]}
            assert {endpoint["port"] for endpoint in each["spec"]["endpoints"]} <= ports
        elif each["kind"] == "NetworkPolicy" and each["spec"]["podSelector"]:
            assert any(each["spec"]["podSelector"]["matchLabels"].items() <= found for found in labels.values())
    assert one(objects, "PodDisruptionBudget", "front")["spec"]["minAvailable"] < 2


def test_compose_and_kubernetes_run_the_same_redis(objects: list[Object]) -> None:
    services = load("docker-compose.yml")
    for name in ("redis", "redis-cache"):
        (container,) = one(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]
        assert container["image"] == services[name]["image"]
        command = services[name]["command"].split()
        for option in ("--maxmemory", "--maxmemory-policy"):
            assert container["args"][container["args"].index(option) + 1] == command[command.index(option) + 1]
