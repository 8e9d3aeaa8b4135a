"""`deecap train-regions` says what is missing, before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from service.cli import app
from tests.cli.made_up_detector import BOXES, write_detector


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


def test_the_recall_of_what_a_detector_finds(tmp_path: Path) -> None:
    """Twenty photos of the split val, each with a box that is found, one that is not, and one that only a
    cell finds; and one photo of another split, which does not count."""
    detector = write_detector(tmp_path / "detector")
    names = [f"{number}.png" for number in range(21)]
    images = [
        {"filename": name, "split": "val" if number else "train", "sentences": [{"tokens": ["a"]}]}
        for number, name in enumerate(names)
    ]
    photos = tmp_path / "flickr8k"
    photos.mkdir()
    (photos / "captions.json").write_text(json.dumps({"images": images}))
    for name in names:
        Image.new("RGB", (30, 20)).save(photos / name)
    given = [[*BOXES[0], 0, 0.9], [0.8, 0.8, 0.9, 0.9, 0, 0.9], [0.05, 0, 1, 1, 1, 0.9], [*BOXES[1], 1, 0.1]]
    boxes = {"classes": ["cat", "dog"], "boxes": dict.fromkeys(names, given)}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    done = CliRunner().invoke(app, ["train-regions", "--data", str(tmp_path), "--measure", str(detector)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["boxes"], found["regions_per_photo"]) == (60, 2.0)
    assert found["recall"] == found["recall_10"] == pytest.approx(1 / 3)


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
