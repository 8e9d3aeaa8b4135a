"""`deecap look`: a picture with the regions that the extractor finds, named where it names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from tests.cli.made_up_detector import write_detector

Command = Callable[..., Result]

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    return write_detector(tmp_path / "detector")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (200, 100), "white").save(path)
    return path


def marked(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """Where the picture is no longer white, and its width and height."""
    with Image.open(path) as picture:
        return (np.asarray(picture.convert("RGB")) < 200).any(2), picture.size


def test_regions_are_drawn_and_named(command: Command, detector: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "boxes.png"
    done = command("look", photo, "--out", out, "--bundle", detector)
    assert done.exit_code == 0, done.output
    assert done.stdout == "0.80\tdog\t50 25 150 50\n"
    assert "3 regions drawn" in done.stderr
    assert "1 of them named" in done.stderr
    lines, size = marked(out)
    assert size == (800, 400)  # small photos are enlarged
    assert lines[199, 200:599].all()  # the lower side of the dog's box
    assert lines[75:98, 201:240].mean() > 0.5  # its label, above it
    assert lines[:, 399].all()  # the right side of the other box
    assert not lines[300, 450:750].any()  # and nothing else


def test_less_sure_ones_are_named_on_request(command: Command, detector: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "boxes.png"
    done = command("look", photo, "--out", out, "--bundle", detector, "--at-least", "0.1")
    assert [line.split("\t")[1] for line in done.stdout.splitlines()] == ["dog", "cat"]


def test_names_come_from_a_vocabulary_too(command: Command, detector: Path, photo: Path, tmp_path: Path) -> None:
    names, out = tmp_path / "objects.txt", tmp_path / "boxes.png"
    names.write_text("kitten\nhound,dog\n")
    done = command("look", photo, "--out", out, "--bundle", detector, "--names", names)
    assert done.stdout.startswith("0.80\thound\t")
    names.write_text("kitten\n")
    done = command("look", photo, "--out", out, "--bundle", detector, "--names", names)
    assert done.stdout.startswith("0.80\tobject 1\t")


def test_what_cannot_be_done_is_said_before_anything_is_written(
    command: Command, detector: Path, photo: Path, tmp_path: Path
) -> None:
    content = photo.read_bytes()
    for arguments, reason in (
        ((photo, "--out", photo), "the photo itself"),
        ((photo, "--out", tmp_path / "boxes.txt"), "must end like a picture"),
        ((photo, "--out", tmp_path / "boxes.psd"), "must end like a picture"),
        ((tmp_path / "none.jpg", "--out", tmp_path / "boxes.png"), "none.jpg: No such file"),
        ((photo, "--out", tmp_path / "no" / "boxes.png"), "cannot write"),
        ((photo, "--out", tmp_path / "boxes.png", "--names", tmp_path / "none.txt"), "cannot read"),
    ):
        done = command("look", *arguments, "--bundle", detector)
        assert done.exit_code in (1, 2)
        assert reason in done.stderr
    assert photo.read_bytes() == content
    assert not (tmp_path / "boxes.png").exists()


def test_the_region_head_that_ships_sees_a_cat(command: Command, tmp_path: Path) -> None:
    done = command("look", SAMPLES / "cat.jpg", "--out", tmp_path / "boxes.png")
    assert done.exit_code == 0, done.output
    score, name, box = done.stdout.splitlines()[0].split("\t")
    assert name == "cat"
    assert float(score) > 0.3
    x0, y0, x1, y1 = (float(number) for number in box.split())
    assert x1 - x0 > 200  # of 451 pixels: it fills the photo
    assert y1 - y0 > 150
