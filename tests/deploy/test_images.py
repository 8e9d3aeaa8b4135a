"""The images, as far as they can be held without a container engine: linted, pinned, and a front without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.compose import ROOT, stage
from tests.deploy.scripts import script
from tests.service.redis_server import MISSING, RedisServer, find_binary

DOCKERFILE = ROOT / "Dockerfile"

# What the front's image has none of: a front that asked for one of them would not start.
FRONT = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {heavy}:
            raise ModuleNotFoundError(f"{{name}} is in no front's image")
sys.meta_path.insert(0, Blocked())
sys.argv = ["deecap", "serve", "--port", "0"]
from service.cli import main
main()
"""


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, DOCKERFILE], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_are_pinned_and_nobody_is_root() -> None:
    text = DOCKERFILE.read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.M)
    stages = set(re.findall(r" AS (\S+)$", text, re.M))
    assert {base for base in bases if base not in stages} == {"python:${PYTHON}"}
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-slim-\w+$", text, re.M)
    assert stages > {"front", "worker-cpu", "worker-gpu"}
    assert re.search(r"^USER 1\d{4}:1\d{4}$", text, re.M)
    assert stage("front")["CMD"] == ["deecap", "serve"]
    assert stage("worker-cpu")["CMD"] == stage("worker-gpu")["CMD"] == ["deecap", "worker"]


def test_a_change_of_code_comes_after_the_packages() -> None:
    """The stages that install packages see no code."""
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.M)[1:]
    for text in stages:
        if " AS packages" in text.splitlines()[0]:
            assert "COPY model" not in text
            assert "COPY service" not in text


def test_what_the_dockerfile_copies_reaches_the_builder() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in DOCKERFILE.read_text().splitlines() if re.match("COPY (?!--from)", line)]
    assert {name for names in copied for name in names} == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_the_constraints_are_what_the_project_asks_for() -> None:
    """Each package of the images is pinned, and to a version that pyproject.toml allows."""
    constraints = script("constraints.py")
    pins = dict(line.split("==") for line in (ROOT / "deploy/constraints.txt").read_text().splitlines() if "==" in line)
    wanted = constraints.requirements(["model", "cpu"])
    assert set(pins) == set(constraints.closure(wanted)) - constraints.LEFT_OUT, "run deploy/constraints.py"
    for requirement in wanted:
        if requirement.name not in constraints.LEFT_OUT:
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_torch_is_no_need_of_a_front() -> None:
    constraints = script("constraints.py")
    assert "torch" in constraints.closure(constraints.requirements(["model", "cpu"]))
    heavy = set(constraints.closure(constraints.requirements(["model", "cpu"]))) - set(needed_by_a_front())
    assert {"torch", "onnx", "onnxruntime", "safetensors", "tqdm", "sympy"} <= heavy


def test_a_front_starts_with_nothing_of_the_model_installed() -> None:
    """Everything that is not in the front's image is blocked; it reaches its queue all the same, and ends cleanly."""
    if not find_binary():
        pytest.skip(MISSING)
    constraints = script("constraints.py")
    heavy = set(constraints.closure(constraints.requirements(["model", "cpu"]))) - set(needed_by_a_front())
    modules = sorted({name.replace("-", "_") for name in heavy} - {"protobuf"} | {"google"})
    redis = RedisServer()
    redis.start()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", FRONT.format(heavy=set(modules))],
            cwd=ROOT, env={"DEECAP_BROKER": redis.url, "PATH": ""}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert "captions come from the workers" in process.stdout.readline()
        process.terminate()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert "in no front's image" not in errors
    finally:
        process.kill()
        redis.close()


def needed_by_a_front() -> dict[str, str]:
    constraints = script("constraints.py")
    front: list[Requirement] = constraints.requirements([])
    found: dict[str, str] = constraints.closure(front)
    return found
