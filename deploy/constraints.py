"""Writes `constraints.txt`: the versions that the images install, which are those that the tests here ran with.

`python deploy/constraints.py > deploy/constraints.txt` in an environment that has just passed them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
HEAD = "# What the images install, version by version: see deploy/constraints.py. torch is pinned in pyproject.toml.\n"
# Its build, and so the last part of its version, is each image's own choice.
LEFT_OUT = frozenset({"torch"})


def requirements(extras: Iterable[str]) -> list[Requirement]:
    """What pyproject.toml says that the project needs, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"]]
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    return [found for text in texts if (found := Requirement(text)).name != project["name"]]


def closure(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Name and installed version of these and of all that they need on this platform."""
    versions: dict[str, str] = {}
    ahead = [(requirement.name, tuple(sorted(requirement.extras))) for requirement in wanted]
    done = set()
    while ahead:
        name, extras = ahead.pop()
        if (name, extras) in done:
            continue
        done.add((name, extras))
        distribution = metadata.distribution(name)
        versions[re.sub(r"[-_.]+", "-", name).lower()] = distribution.version
        for need in map(Requirement, distribution.requires or []):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                ahead.append((need.name, tuple(sorted(need.extras))))
    return versions


if __name__ == "__main__":
    found = closure(requirements(["model", "cpu"]))
    print(HEAD + "\n".join(f"{name}=={found[name]}" for name in sorted(found) if name not in LEFT_OUT))
