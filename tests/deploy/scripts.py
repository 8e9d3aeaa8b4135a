"""Imports the scripts of deploy/, which is no package."""

from __future__ import annotations

from importlib import util
from types import ModuleType

from tests.deploy.compose import ROOT


def script(name: str) -> ModuleType:
    """The module of `deploy/NAME`."""
    path = ROOT / "deploy" / name
    spec = util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
