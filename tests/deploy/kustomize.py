"""As much of kustomize as the kustomizations here use: so that they are checked where there is no kubectl.

A test holds that it gives what `kubectl kustomize` gives, where that is installed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "labels", "resources", "configMapGenerator", "images", "patches"}
# Lists that are merged item by item in a strategic merge, and what tells their items apart. All others are replaced.
KEYS = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath", "ports": "containerPort"}


def build(folder: Path) -> list[Object]:
    """All objects of the kustomization in the folder. Generated names get no hash."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(kustomization) <= KNOWN, set(kustomization) - KNOWN
    objects: list[Object] = []
    for name in kustomization.get("resources", []):
        place = folder / name
        objects += build(place.resolve()) if place.is_dir() else [each for each in _documents(place) if each]
    for generated in kustomization.get("configMapGenerator", []):
        data = dict(literal.split("=", 1) for literal in generated["literals"])
        metadata = {"name": generated["name"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    for each in objects:
        for labels in kustomization.get("labels", []):
            each["metadata"].setdefault("labels", {}).update(labels["pairs"])
        if "namespace" in kustomization and each["kind"] != "Namespace":
            each["metadata"]["namespace"] = kustomization["namespace"]
        for image in kustomization.get("images", []):
            _rename(each, image)
    for patch in kustomization.get("patches", []):
        for change in _documents(folder / patch["path"]):
            (target,) = [number for number, each in enumerate(objects) if _same(each, change)]
            standard = objects[target]["apiVersion"] in ("apps/v1", "v1")  # of others the schema is not known
            objects[target] = _merge(objects[target], change, by_key=standard)
    return objects


def _documents(path: Path) -> list[Object]:
    return list(yaml.safe_load_all(path.read_text()))


def _same(one: Object, other: Object) -> bool:
    return (one["kind"], one["metadata"]["name"]) == (other["kind"], other["metadata"]["name"])


def _rename(value: Any, image: dict[str, str]) -> None:
    if isinstance(value, dict):
        if isinstance(value.get("image"), str) and value["image"].rsplit(":", 1)[0] == image["name"]:
            value["image"] = f"{image['newName']}:{image['newTag']}"
        for each in value.values():
            _rename(each, image)
    elif isinstance(value, list):
        for each in value:
            _rename(each, image)


def _merge(below: Any, above: Any, by_key: bool, key: str = "") -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        merged = copy.deepcopy(below)
        for name, value in above.items():
            merged[name] = _merge(below.get(name), value, by_key, KEYS.get(name, ""))
        return merged
    if by_key and key and isinstance(below, list):
        found = {item[key]: item for item in above}
        merged = [_merge(item, found.pop(item[key], item), by_key) for item in below]
        return [*found.values(), *merged]
    return copy.deepcopy(above)
