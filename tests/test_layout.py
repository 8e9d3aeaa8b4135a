"""The rules of the layout: who imports whom, what a file begins with, and what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("model", "service", "deploy", "loadtests", "tests")
TOP_LEVEL = (
    "Dockerfile",
    "LICENSE",
    "Makefile",
    "NOTICE",
    "README.md",
    "docker-compose.yml",
    "docs",
    "pyproject.toml",
    "samples",
    *PARTS,
)
SOURCES = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))

# Paths of one person's machine, and package indexes: a clone elsewhere has neither.
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|Users|root|work)/[\w.]|[A-Z]:\\\\?Users")
INDEX_HOST = re.compile(
    r"files\.pythonhosted\.org|download\.pytorch\.org|https?://(?:[\w-]+\.)*(?:pypi|artifactory|nexus)\b"
)
# The one exception, in the Dockerfile: which build of torch an image has is a question of the index.
ARGUMENT = re.compile(r"ARG TORCH_(CPU|GPU)_INDEX=")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(source: str) -> set[str]:
    """Top-level names of the modules that a source imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def tracked_texts() -> list[Path]:
    """The text files under version control, or about to be; none where this is no checkout."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return []
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_the_top_level_is_there(name):
    assert (ROOT / name).exists()


def test_the_model_knows_nothing_of_the_service():
    guilty = [name_of(path) for path in (ROOT / "model").rglob("*.py") if "service" in imported(path.read_text())]
    assert guilty == []


@pytest.mark.parametrize("module", ["service.app", "service.cli", "model.caption", "model.exits"])
def test_importing_it_loads_no_torch(module):
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr or f"{module} loads torch"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_begins_with_what_it_is_for(path):
    source = path.read_text()
    if path.name == "__init__.py" and not source.strip():
        return
    assert source.startswith('"""')
    assert len((ast.get_docstring(ast.parse(source)) or "").splitlines()[0]) > 20


def test_no_file_holds_a_machine_path_or_an_index_host():
    found = [
        f"{name_of(path)}:{number}: {line.strip()[:100]}"
        for path in tracked_texts()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if MACHINE_PATH.search(line) or (INDEX_HOST.search(line) and not ARGUMENT.match(line))
    ]
    assert found == []
