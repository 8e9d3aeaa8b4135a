"""`deecap convert-vg`: says what was read and written, and refuses what it should."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

import model.bottom_up.visual_genome.convert as convert_module
from model.bundle import EXTRACTOR
from tests.model.visual_genome.made_up import NARROW, caffe_blobs

Command = Callable[..., Result]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command as it is, but for the width of the network."""
    convert = convert_module.convert
    monkeypatch.setattr(
        convert_module, "convert", lambda weights, out, precision: convert(weights, out, precision, NARROW)
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "caffe.pkl"
    path.write_bytes(pickle.dumps(caffe_blobs(NARROW)))
    return path


@pytest.mark.usefixtures("narrow")
def test_weights_become_an_extractor_that_extract_uses(
    command: Command, weights: Path, tmp_path: Path, photos: Callable[..., list[Path]]
) -> None:
    out = tmp_path / "vg"
    done = command("convert-vg", weights, "--out", out, "--precision", "float16")
    assert done.exit_code == 0, done.output
    assert "named as in caffe, 2 of them not needed, objects and attributes" in done.stdout
    assert "100% as PyTorch finds them" in done.stdout
    photo = photos(90)[0]
    Image.linear_gradient("L").resize((90, 70)).save(photo)
    extracted = command("extract", "--photos", photo, "--out", tmp_path / "features", "--bundle", out)
    assert extracted.exit_code == 0, extracted.output
    with np.load(tmp_path / "features" / "90.npz") as kept:
        assert kept["features"].shape[1] == NARROW.feature_width
        assert len(kept["classes"]) == len(kept["attributes"]) == len(kept["boxes"]) >= 10


def test_weights_of_other_sizes_are_refused(command: Command, weights: Path, tmp_path: Path) -> None:
    """The narrow network's, for which the real one is asked."""
    done = command("convert-vg", weights, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "conv1[0] is (4, 3, 7, 7), not (64, 3, 7, 7)" in done.stderr
    assert not (tmp_path / "out").exists()


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_a_file_that_runs_code_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"conv1": Runs(tmp_path / "made")}))
    done = command("convert-vg", tmp_path / "evil.pkl", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "evil.pkl is refused" in done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("narrow")
def test_what_cannot_be_written_is_said(command: Command, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = command("convert-vg", weights, "--out", tmp_path / "file" / "below")
    assert done.exit_code == 1
    assert "cannot write to" in done.stderr
    assert EXTRACTOR not in done.stdout
    precise = command("convert-vg", weights, "--out", tmp_path / "out", "--precision", "int4")
    assert precise.exit_code == 2
    assert "float32, float16" in precise.stderr
