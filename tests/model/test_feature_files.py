"""Feature files: what is in them, that training reads them, and that no two extractors share one."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

import model.feature_files as feature_files
from model.bottom_up.detections import Detections
from model.caption import Regions
from model.feature_files import FeatureFilesError, hdf5_id, npz_name, open_feature_files
from model.training.regions import RegionFiles

REVISION, OTHER = "0123456789ab", "ba9876543210"
PHOTOS = [Path("photos/dog.jpg"), Path("photos/COCO_val2014_000000391895.jpg")]


def regions(count: int, seed: int = 0) -> Regions:
    random = np.random.default_rng(seed)
    return Regions(random.random((count, 4), np.float32), random.random((count, 6), np.float32))


def detections(count: int, attributes: bool = True) -> Detections:
    random = np.random.default_rng(9)
    plain = regions(count)
    classes, named = random.random((count, 8), np.float32), random.random((count, 5), np.float32)
    return Detections(plain.boxes, plain.features, classes, named if attributes else None)


def test_names_are_those_that_captioning_code_asks_for() -> None:
    assert [npz_name(photo) for photo in PHOTOS] == ["dog.npz", "COCO_val2014_000000391895.npz"]
    assert [hdf5_id(photo) for photo in PHOTOS] == ["dog", "391895"]
    assert hdf5_id(Path("000123.png")) == "123"


def test_npz_files_hold_what_the_extractor_found(tmp_path: Path) -> None:
    files = open_feature_files(tmp_path / "deep" / "out", "npz", REVISION, PHOTOS)
    plain, named = regions(3), detections(5)
    assert not files.has(PHOTOS[0])
    files.write(PHOTOS[0], plain, (640, 480))
    files.write(PHOTOS[1], named, (31, 77))
    files.close()
    assert files.has(PHOTOS[0])
    folder = tmp_path / "deep" / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "COCO_val2014_000000391895.npz", "dog.npz", "features.json",
    ]  # fmt: skip
    assert json.loads((folder / "features.json").read_text()) == {"format": 1, "extractor": REVISION}
    with np.load(folder / "dog.npz", allow_pickle=False) as kept:
        assert set(kept.files) == {"features", "boxes", "size", "extractor"}
        assert np.array_equal(kept["features"], plain.features)
        assert np.array_equal(kept["boxes"], plain.boxes)
        assert kept["features"].dtype == kept["boxes"].dtype == np.float32
        assert kept["size"].tolist() == [640, 480]
        assert str(kept["extractor"]) == REVISION
    with np.load(folder / "COCO_val2014_000000391895.npz", allow_pickle=False) as kept:
        assert np.array_equal(kept["classes"], named.class_probabilities[:, 1:].argmax(1))
        assert np.array_equal(kept["scores"], named.class_probabilities[:, 1:].max(1))
        assert named.attribute_probabilities is not None
        assert np.array_equal(kept["attributes"], named.attribute_probabilities[:, 1:].argmax(1))
        assert np.array_equal(kept["attribute_scores"], named.attribute_probabilities[:, 1:].max(1))


def test_attributes_are_left_out_where_none_are_known(tmp_path: Path) -> None:
    open_feature_files(tmp_path, "npz", REVISION, PHOTOS).write(PHOTOS[0], detections(2, attributes=False), (9, 9))
    with np.load(tmp_path / "dog.npz") as kept:
        assert "classes" in kept.files
        assert "attributes" not in kept.files


def test_hdf5_files_are_laid_out_as_m2s(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "features.hdf5"
    files = open_feature_files(path, "hdf5", REVISION, PHOTOS)
    plain, named = regions(3), detections(5)
    files.write(PHOTOS[0], plain, (640, 480))
    files.write(PHOTOS[1], named, (100, 50))
    assert files.has(PHOTOS[1])
    files.close()
    with h5py.File(path, "r") as kept:
        assert dict(kept.attrs) == {"format": 1, "extractor": REVISION}
        assert set(kept) == {
            "dog_features", "dog_boxes", "dog_size",
            "391895_features", "391895_boxes", "391895_size", "391895_cls_prob",
        }  # fmt: skip
        assert np.array_equal(kept["391895_features"][()], named.features)
        assert np.array_equal(kept["391895_cls_prob"][()], named.class_probabilities)
        assert kept["391895_boxes"][()] == pytest.approx(named.boxes * [100, 50, 100, 50])
        assert kept["dog_size"][()].tolist() == [640, 480]


@pytest.mark.parametrize(("kind", "name"), [("npz", "features"), ("hdf5", "features.hdf5")])
def test_training_reads_what_was_written(tmp_path: Path, kind: str, name: str) -> None:
    files = open_feature_files(tmp_path / name, kind, REVISION, PHOTOS)
    whole = np.array([[0, 0, 1, 1]], np.float32)  # so that pixels can be made relative again without the size
    seen = [regions(4), detections(2)]
    seen = [Regions(np.concatenate((whole, each.boxes[1:])), each.features) for each in seen]
    for photo, each in zip(PHOTOS, seen, strict=True):
        files.write(photo, each, (320, 240))
    files.close()
    read = RegionFiles(tmp_path / name, [photo.name for photo in PHOTOS])
    assert read.feature_width == 6
    features, boxes, mask = read([1, 0])
    assert mask.sum(1).tolist() == [2, 4]
    for row, each in enumerate(reversed(seen)):
        assert np.array_equal(features[row][mask[row]].numpy(), each.features)
        assert boxes[row][mask[row]].numpy() == pytest.approx(each.boxes, abs=1e-6)


@pytest.mark.parametrize(("kind", "name"), [("npz", "features"), ("hdf5", "features.hdf5")])
def test_features_of_another_extractor_are_never_added(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    files = open_feature_files(path, kind, REVISION, PHOTOS)
    files.write(PHOTOS[0], regions(2), (5, 5))
    files.close()
    with pytest.raises(FeatureFilesError, match=f"{REVISION}.*{OTHER}"):
        open_feature_files(path, kind, OTHER, PHOTOS)
    again = open_feature_files(path, kind, REVISION, PHOTOS)
    assert [again.has(photo) for photo in PHOTOS] == [True, False]
    again.close()


@pytest.mark.parametrize(("kind", "name"), [("npz", "features"), ("hdf5", "features.hdf5")])
def test_features_of_another_format_are_refused(
    tmp_path: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(feature_files, "FORMAT", 0)
        open_feature_files(tmp_path / name, kind, REVISION, PHOTOS).close()
    with pytest.raises(FeatureFilesError, match="of format 0"):
        open_feature_files(tmp_path / name, kind, REVISION, PHOTOS)


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    np.savez(theirs / "dog.npz", features=np.zeros((1, 1)))
    with pytest.raises(FeatureFilesError, match="nobody can say"):
        open_feature_files(theirs, "npz", REVISION, PHOTOS)
    assert [path.name for path in theirs.iterdir()] == ["dog.npz"]
    (tmp_path / "text").write_text("not a folder, not HDF5")
    for kind in ("npz", "hdf5"):
        with pytest.raises(FeatureFilesError, match="text"):
            open_feature_files(tmp_path / "text", kind, REVISION, PHOTOS)
    assert (tmp_path / "text").read_text().startswith("not")
    with h5py.File(tmp_path / "m2.hdf5", "w") as file:
        file.create_dataset("1_features", data=np.zeros((2, 2)))
    with pytest.raises(FeatureFilesError, match="format None"):
        open_feature_files(tmp_path / "m2.hdf5", "hdf5", REVISION, PHOTOS)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "features.json").write_text("[]")
    with pytest.raises(FeatureFilesError, match=r"features\.json"):
        open_feature_files(broken, "npz", REVISION, PHOTOS)


def test_photos_that_would_share_a_name_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for kind, photos in (
        ("npz", [Path("a/dog.jpg"), Path("b/dog.png")]),
        ("hdf5", [Path("COCO_val2014_000000000007.jpg"), Path("7.jpg")]),
    ):
        with pytest.raises(FeatureFilesError, match="would both be"):
            open_feature_files(tmp_path / "out", kind, REVISION, photos)
    assert not (tmp_path / "out").exists()


def test_a_photo_that_was_half_written_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "features.h5"
    files = open_feature_files(path, "hdf5", REVISION, PHOTOS)
    make = h5py.File.create_dataset

    def stop_at_features(self: h5py.File, name: str, **how: object) -> object:
        if name.endswith("_features"):
            raise KeyboardInterrupt
        return make(self, name, **how)

    with monkeypatch.context() as patch:
        patch.setattr(h5py.File, "create_dataset", stop_at_features)
        with pytest.raises(KeyboardInterrupt):
            files.write(PHOTOS[0], regions(2), (5, 5))
    files.close()
    again = open_feature_files(path, "hdf5", REVISION, PHOTOS)
    assert not again.has(PHOTOS[0])
    again.write(PHOTOS[0], regions(3), (5, 5))
    again.close()
    with h5py.File(path) as kept:
        assert len(kept["dog_boxes"]) == len(kept["dog_features"]) == 3


def test_an_npz_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_feature_files(tmp_path, "npz", REVISION, PHOTOS)

    def stop_half_way(file: object, **arrays: object) -> None:
        file.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            files.write(PHOTOS[0], regions(2), (5, 5))
    assert not files.has(PHOTOS[0])
    files.write(PHOTOS[0], regions(2), (5, 5))
    assert len(np.load(tmp_path / "dog.npz")["boxes"]) == 2
