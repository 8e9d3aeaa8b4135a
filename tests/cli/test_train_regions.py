"""`deecap train-regions` says what is missing, before anything is computed."""

from __future__ import annotations

from pathlib import Path

import torch
from typer.testing import CliRunner

from service.cli import app


def train_regions(tmp_path: Path, trunk: str) -> tuple[int, str]:
    options = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--trunk", trunk]
    done = CliRunner().invoke(app, ["train-regions", *options])
    return done.exit_code, done.output


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, said = train_regions(tmp_path, "flickr8k/settled")
    assert code == 2
    assert "settled.pt is not there" in said.replace("\n", "")


def test_boxes_and_a_trunk_are_needed(tmp_path: Path) -> None:
    run = tmp_path / "work" / "run"
    run.mkdir(parents=True)
    torch.save({"model": {}}, run / "last.pt")
    code, said = train_regions(tmp_path, "run/last")
    assert code == 2
    assert "boxes.json" in said.replace("\n", "")
    (tmp_path / "boxes.json").write_text('{"classes": [], "boxes": {}}')
    code, said = train_regions(tmp_path, "run/last")
    assert code == 2
    assert "it has no trunk" in said.replace("\n", "")


def test_what_has_no_region_head_is_not_measured(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "model" / "bundles" / "deecap-flickr8k"
    (tmp_path / "boxes.json").write_text('{"classes": [], "boxes": {}}')
    options = ["--data", str(tmp_path), "--measure", str(shipped)]
    done = CliRunner().invoke(app, ["train-regions", *options])
    assert done.exit_code == 2
    assert "has no region head" in done.output.replace("\n", " ")


def test_without_a_trunk_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train-regions", "--data", str(tmp_path)])
    assert done.exit_code == 2
    assert "--trunk RUN/STAGE is needed" in done.output.replace("\n", " ")
