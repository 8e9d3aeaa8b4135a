"""What holds for every test: in CI only what needs a GPU may be skipped; and which of them run side by side."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

ALONE = {"faults", "loadtests"}  # folders whose tests set a load or stop processes: nothing runs beside them


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


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        _take_cores(config, alone=False)
        if torch := sys.modules.get("torch"):  # a conftest has imported it, and it has counted the cores by then
            torch.set_num_threads(_cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _take_cores(config: pytest.Config, alone: bool) -> None:
    """Each process of `pytest -n` has its share of the cores, or threads of all on each would wait for one another."""
    if not hasattr(os, "sched_setaffinity"):  # macOS
        return
    cores = sorted(os.sched_getaffinity(os.getppid()))
    number, count = int(config.workerinput["workerid"].removeprefix("gw")), config.workerinput["workercount"]
    os.sched_setaffinity(0, cores if alone else cores[number::count] or cores[number % len(cores) :][:1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Under `pytest -n`, a test that is to be alone waits until the other processes' have ended, and they for it.

    Who wants to be alone comes through a gate that all pass, so that others who come later do not keep it waiting.
    """
    if not hasattr(item.config, "workerinput"):
        return (yield)
    shared = Path(item.config.getoption("basetemp")).parent
    alone = item.path.relative_to(Path(__file__).parent).parts[0] in ALONE
    with (shared / "gate.lock").open("w") as gate, (shared / "tests.lock").open("w") as tests:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(tests, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        _take_cores(item.config, alone)
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch  # not at the top: most runs of a few tests do without

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device that torch sees"))
