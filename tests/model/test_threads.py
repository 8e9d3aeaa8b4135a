"""The cores that a container leaves this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.threads import available_cores

MACHINE = available_cores(Path("no such file"))


@pytest.mark.parametrize(
    ("said", "cores"),
    [
        ("max 100000", MACHINE),
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("150000 100000", min(2, MACHINE)),
        ("6400000 100000", min(64, MACHINE)),
        ("", MACHINE),
        ("0 0", MACHINE),
    ],
)
def test_a_quota_of_cpu_time_counts_as_so_many_cores(tmp_path: Path, said: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(said)
    assert available_cores(tmp_path / "cpu.max") == cores


def test_without_a_limit_it_is_what_the_scheduler_allows(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "none") == MACHINE >= 1
