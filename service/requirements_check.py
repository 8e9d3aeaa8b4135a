"""Refuses to start on an installation that cannot work: exactly one build of ONNX Runtime must be there."""

from __future__ import annotations

from importlib import metadata

ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


class RequirementsError(RuntimeError):
    """The packages installed cannot work together. The message says what to install or remove."""


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def onnx_runtime() -> str:
    """Name and version of the one ONNX Runtime installed, such as `onnxruntime 1.20.0`; nothing is imported.

    Raises `RequirementsError` when there is none, or when there are both: they share a folder, so whichever was
    installed last wins and half of the other's files remain.
    """
    found = [f"{name} {version}" for name in ONNX_RUNTIMES if (version := installed_version(name)) is not None]
    if not found:
        raise RequirementsError("no ONNX Runtime is installed: pip install '.[cpu]', or '.[gpu]' for an NVIDIA GPU")
    if len(found) > 1:
        raise RequirementsError(
            f"{' and '.join(found)} are both installed and overwrite each other: uninstall both, "
            "then pip install '.[cpu]' or '.[gpu]'"
        )
    return found[0]
