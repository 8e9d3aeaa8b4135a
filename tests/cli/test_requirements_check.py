"""Exactly one build of ONNX Runtime: the check that start-up makes, against made-up installations."""

from __future__ import annotations

from importlib import metadata

import pytest

from service.requirements_check import RequirementsError, installed_version, onnx_runtime


@pytest.fixture
def install(monkeypatch):
    """`install("a", "b")`: as if these packages, and no others, were installed."""

    def pretend(*packages):
        def version(name):
            if name not in packages:
                raise metadata.PackageNotFoundError(name)
            return "1.20.0"

        monkeypatch.setattr(metadata, "version", version)

    return pretend


@pytest.mark.parametrize("package", ["onnxruntime", "onnxruntime-gpu"])
def test_one_is_right(install, package):
    install(package)
    assert onnx_runtime() == f"{package} 1.20.0"


def test_both_are_refused(install):
    install("onnxruntime", "onnxruntime-gpu")
    with pytest.raises(RequirementsError, match=r"onnxruntime 1\.20\.0 and onnxruntime-gpu 1\.20\.0 are both"):
        onnx_runtime()


def test_none_is_refused(install):
    install()
    with pytest.raises(RequirementsError, match=r"install '\.\[cpu\]'"):
        onnx_runtime()


def test_what_is_not_installed_has_no_version():
    assert installed_version("no-such-package-anywhere") is None
