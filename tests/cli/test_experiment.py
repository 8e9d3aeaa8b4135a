"""`deecap experiment`: what it asks for, what it refuses, and that it writes what it was told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.experiments.page import FROM_ROWS
from service.commands.experiment import NAMES


def test_there_is_a_command_for_every_experiment(command: Any) -> None:
    assert tuple(FROM_ROWS) == NAMES
    told = command("experiment", "--help").stdout.split()
    assert {*NAMES, "measure", "all", "speedups"} <= set(told)


@pytest.mark.parametrize("name", NAMES)
def test_without_rows_it_says_how_to_make_one(command: Any, tmp_path: Path, name: str) -> None:
    told = command("experiment", name, "--rows", tmp_path)
    assert told.exit_code == 1
    assert "deecap experiment measure" in told.stderr


def test_a_row_that_is_none_is_named(command: Any, tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text("{}")
    for name in ("table1", "all"):
        told = command("experiment", name, "--rows", tmp_path, "--out", tmp_path / "out")
        assert told.exit_code == 2
        assert "row.json" in told.stderr


def test_measure_wants_one_system(command: Any, tmp_path: Path) -> None:
    for words in ([], ["--config", "tf-ee", "--bundle", tmp_path], ["--bundle", tmp_path]):
        assert command("experiment", "measure", "--data", tmp_path, *words).exit_code == 2


def test_measure_names_a_run_that_is_not_there(command: Any, tmp_path: Path) -> None:
    told = command("experiment", "measure", "--data", tmp_path, "--config", "tf-ee", "--work", tmp_path)
    assert told.exit_code == 2
    assert "exits.pt is not there" in told.stderr


def test_the_shipped_bundles_three_speedups(command: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = command("experiment", "speedups", "--out", tmp_path)
    assert told.exit_code == 0, told.output
    assert "| Clock |" in told.stdout
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png", ".svg"}


def test_the_page_of_results(command: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = command("experiment", "all", "--rows", tmp_path / "none", "--out", tmp_path)
    assert told.exit_code == 0, told.output
    assert (tmp_path / "results.md").read_text().startswith("# Results")
