"""What holds for every test: what may be skipped, and which tests may run side by side."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

# Tests of processes, which want their time and share what is slow to start: one after another, whatever the rest does.
PROCESSES = ("browser", "deploy", "docs", "faults", "fuzz", "loadtests")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.outcome == "skipped" and os.environ.get("CI") == "true":  # a whole module
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped, and in CI no test is: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and in CI no test is: {report.longrepr}"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        here = Path(__file__).parent
        for item in items:
            file = item.path.relative_to(here)
            item.add_marker(pytest.mark.xdist_group("processes" if file.parts[0] in PROCESSES else str(file)))
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch  # not at the top: most runs of a few tests do without

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device that torch sees"))
