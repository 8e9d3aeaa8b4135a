"""`deecap extract`: features of a folder of photos, gone on with after a stop, bad photos told and left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import Result

from model.bottom_up.extractor import Extractor, revision_of_extractor
from model.bundle import EXTRACTOR

Command = Callable[..., Result]
Photos = Callable[..., list[Path]]


def write_extractor(folder: Path, scale: float = 1.0) -> Path:
    """One region a photo: its mean colour times the scale, and the whole of it as a box."""
    folder.mkdir()
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["B", 224, 224, 3])
    outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", 1, 3])]
    outputs.append(helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["B", 1, 4]))
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("box", TensorProto.FLOAT, [1, 1, 4], [0, 0, 1, 1]),
        helper.make_tensor("first", TensorProto.INT64, [1], [0]),
    ]
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["scaled"]),
        helper.make_node("Unsqueeze", ["scaled", "one"], ["features"]),
        helper.make_node("Shape", ["pixels"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "one", "one"], ["shape"], axis=0),
        helper.make_node("Expand", ["box", "shape"], ["boxes"]),
    ]
    graph = helper.make_graph(nodes, "mean", [pixels], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / EXTRACTOR)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_extractor(tmp_path / "bundle")


def test_features_of_a_folder(command: Command, photos: Photos, bundle: Path, tmp_path: Path) -> None:
    folder = photos(30, 40)[0].parent
    out = tmp_path / "out"
    done = command("extract", "--photos", folder, "--out", out, "--bundle", bundle)
    assert done.exit_code == 0, done.output
    assert f"2 photos' features written to {out}" in done.stderr
    assert revision_of_extractor(bundle / EXTRACTOR) in done.stderr
    with np.load(out / "40.npz", allow_pickle=False) as kept:
        assert kept["features"].tolist() == [[0, 128, 0]]  # what "green" is
        assert kept["boxes"].tolist() == [[0, 0, 1, 1]]
        assert kept["size"].tolist() == [40, 20]


def test_it_goes_on_where_it_was_stopped(
    command: Command, photos: Photos, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(30, 40, 50)[0].parent
    look, seen = Extractor.look, []

    def stopping(self: Extractor, images: list) -> list:
        seen.append(images[0].width)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return look(self, images)

    monkeypatch.setattr(Extractor, "look", stopping)
    for name in ("out", "out.hdf5"):
        seen.clear()
        words = ("extract", "--photos", folder, "--out", tmp_path / name, "--bundle", bundle)
        stopped = command(*words)
        assert stopped.exit_code == 130
        assert "stopped with 1 more" in stopped.stderr
        seen[:] = [0, 0]
        done = command(*words)
        assert done.exit_code == 0, done.output
        assert seen == [0, 0, 40, 50]
        assert "1 were already in" in done.stderr
        assert "2 photos' features written" in done.stderr


def test_bad_photos_are_told_and_the_rest_is_there(
    command: Command, photos: Photos, bundle: Path, tmp_path: Path
) -> None:
    first, last = photos(30, 50)
    (first.parent / "40.png").write_bytes(first.read_bytes()[:60])
    (first.parent / "45.jpg").write_text("no picture")
    out = tmp_path / "out"
    done = command("extract", "--photos", first.parent, "--out", out, "--bundle", bundle)
    assert done.exit_code == 1
    assert "40.png: " in done.stderr
    assert "45.jpg: " in done.stderr
    assert "2 of 4 photos have none" in done.stderr
    assert sorted(path.name for path in out.glob("*.npz")) == ["30.npz", "50.npz"]
    (first.parent / "40.png").write_bytes(last.read_bytes())
    (first.parent / "45.jpg").unlink()
    assert command("extract", "--photos", first.parent, "--out", out, "--bundle", bundle).exit_code == 0
    assert (out / "40.npz").exists()


@pytest.mark.parametrize("name", ["out", "out.h5"])
def test_two_extractors_are_not_mixed(
    command: Command, photos: Photos, bundle: Path, tmp_path: Path, name: str
) -> None:
    other = write_extractor(tmp_path / "other", 2.0)
    words = ("extract", "--photos", photos(30)[0].parent, "--out", tmp_path / name, "--bundle")
    assert command(*words, bundle).exit_code == 0
    refused = command(*words, other)
    assert refused.exit_code == 2
    assert "write elsewhere" in refused.stderr


def test_the_format_is_the_names_or_the_one_asked_for(
    command: Command, photos: Photos, bundle: Path, tmp_path: Path
) -> None:
    words = ("extract", "--photos", photos(30)[0], "--bundle", bundle, "--out")
    assert command(*words, tmp_path / "a.HDF5").exit_code == 0
    assert (tmp_path / "a.HDF5").is_file()
    assert command(*words, tmp_path / "b", "--format", "hdf5").exit_code == 0
    assert (tmp_path / "b").is_file()
    wrong = command(*words, tmp_path / "c", "--format", "tsv")
    assert wrong.exit_code == 2
    assert "npz, hdf5" in wrong.stderr


def test_what_cannot_be_asked_is_said(command: Command, photos: Photos, bundle: Path, tmp_path: Path) -> None:
    folder = photos(30)[0].parent
    nowhere = command("extract", "--photos", tmp_path / "nowhere", "--out", tmp_path / "out", "--bundle", bundle)
    assert nowhere.exit_code == 2
    assert "nowhere" in nowhere.stderr
    empty = command("extract", "--photos", folder, "--out", tmp_path / "out", "--bundle", tmp_path)
    assert empty.exit_code == 2
    assert f"no {EXTRACTOR} in {tmp_path}" in empty.stderr
    (tmp_path / EXTRACTOR).write_bytes(b"no graph")
    broken = command("extract", "--photos", folder, "--out", tmp_path / "out", "--bundle", tmp_path)
    assert broken.exit_code == 2
    assert "not an extractor" in broken.stderr
    assert not (tmp_path / "out").exists()
