"""Captions and region features in the forms that people have them come out as the same photos and regions."""

from __future__ import annotations

import base64
import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from model.evaluation.coco_results import write_coco_results
from model.exits import ExitPolicy
from model.experiments.ablations import changes, one_choice
from model.training.data import read_captions
from model.training.readers.boxes import make_regions
from model.training.readers.keys import photo_keys
from model.training.readers.open_regions import open_regions
from model.training.regions import RegionFiles
from model.training.settings import SHIPPED, find_settings, read_settings
from service.cli import app

WIDTH, HEIGHT = 640, 480
NAMES = ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000391895.jpg"]
IDS = [42, 391895]
RANDOM = np.random.default_rng(0)
FEATURES = [RANDOM.random((count, 7), np.float32) for count in (3, 5)]
RELATIVE = [np.sort(RANDOM.random((count, 2, 2), np.float32), 1).reshape(count, 4) for count in (3, 5)]
for _boxes in RELATIVE:
    _boxes[0] = (0.0, 0.0, 1.0, 1.0)  # one box as large as the photo, as bottom-up features have
PIXELS = [boxes * np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32) for boxes in RELATIVE]


def ours(folder: Path) -> Path:
    for name, features, boxes in zip(NAMES, FEATURES, RELATIVE, strict=True):
        np.savez(folder / f"{Path(name).stem}.npz", features=features, boxes=boxes)
    return folder


def bottom_up_npz(folder: Path) -> Path:
    for number, features, boxes in zip(IDS, FEATURES, PIXELS, strict=True):
        told = {"num_bbox": len(boxes), "image_w": WIDTH, "image_h": HEIGHT}
        np.savez(folder / f"{number}.npz", x=features, bbox=boxes, **told)
    return folder


def caffe_npz(folder: Path) -> Path:
    """Features on end, as the Caffe version writes them."""
    for number, features, boxes in zip(IDS, FEATURES, PIXELS, strict=True):
        np.savez(folder / f"{number}.npz", x=features.T, bbox=boxes, image_w=WIDTH, image_h=HEIGHT)
    return folder


def m2_hdf5(folder: Path) -> Path:
    with h5py.File(folder / "coco_detections.hdf5", "w") as file:
        for number, features, boxes in zip(IDS, FEATURES, PIXELS, strict=True):
            file[f"{number}_features"], file[f"{number}_boxes"] = features, boxes
    return folder / "coco_detections.hdf5"


def line(number: int, features: np.ndarray, boxes: np.ndarray) -> bytes:
    packed = [base64.b64encode(array.astype(np.float32).tobytes()) for array in (boxes, features)]
    return b"\t".join([b"%d\t%d\t%d\t%d" % (number, WIDTH, HEIGHT, len(boxes)), *packed]) + b"\r\n"


def one_tsv(folder: Path) -> Path:
    path = folder / "trainval_36.tsv"
    path.write_bytes(b"".join(line(*one) for one in zip(IDS, FEATURES, PIXELS, strict=True)))
    return path


def tsv_parts(folder: Path) -> Path:
    for part, one in enumerate(zip(IDS, FEATURES, PIXELS, strict=True)):
        (folder / f"karpathy_train.tsv.{part}").write_bytes(line(*one))
    return folder


@pytest.mark.parametrize("write", [ours, bottom_up_npz, caffe_npz, m2_hdf5, one_tsv, tsv_parts])
def test_every_form_gives_the_same_regions(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    files = RegionFiles(write(tmp_path), NAMES, IDS)
    assert files.feature_width == 7
    features, boxes, mask = files([1, 0])
    assert mask.sum(1).tolist() == [5, 3]
    for row, photo in enumerate((1, 0)):
        count = len(FEATURES[photo])
        np.testing.assert_array_equal(features[row, :count], FEATURES[photo])
        np.testing.assert_allclose(boxes[row, :count], RELATIVE[photo], atol=1e-6)


@pytest.mark.parametrize("write", [bottom_up_npz, m2_hdf5, tsv_parts])
def test_photos_without_features_are_named(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"1 photos.*000000000007"):
        RegionFiles(write(tmp_path), [*NAMES, "COCO_val2014_000000000007.jpg"])


def test_features_that_are_not_there_or_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_regions(tmp_path / "nowhere")
    (tmp_path / "features.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"features\.pkl"):
        open_regions(tmp_path / "features.pkl")
    (tmp_path / "features.hdf5").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"features\.hdf5"):
        open_regions(tmp_path / "features.hdf5")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    whole = line(42, FEATURES[0], PIXELS[0])
    for broken in (whole[:-30] + b"\n", whole.replace(b"\t3\t", b"\t4\t"), b"42\t1\t2\n"):
        (tmp_path / "a.tsv").write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.tsv, image_id 42"):
            open_regions(tmp_path / "a.tsv").read("42")
    (tmp_path / "a.tsv").write_bytes(b"no tabs at all\n")
    with pytest.raises(ValueError, match=r"a\.tsv, line 1"):
        open_regions(tmp_path / "a.tsv")


def test_hdf5_without_boxes_or_of_other_shapes_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["1_features"] = FEATURES[0]
        file["2_features"], file["2_boxes"] = FEATURES[0], PIXELS[1]
    store = open_regions(tmp_path / "a.hdf5")
    for key in ("1", "2"):
        with pytest.raises(ValueError, match=rf"a\.hdf5, {key}_features"):
            store.read(key)


def test_numbers_that_are_not_finite_and_no_regions_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        make_regions(np.full((1, 2), np.nan), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="no regions"):
        make_regions(np.zeros((0, 2)), np.zeros((0, 4)))


def test_photos_are_filed_by_stem_id_or_number() -> None:
    assert photo_keys("COCO_val2014_000000391895.jpg") == ("COCO_val2014_000000391895", "391895")
    assert photo_keys("COCO_train2014_000000000009.jpg", 9) == ("COCO_train2014_000000000009", "9")
    assert photo_keys("1000092795.jpg") == ("1000092795",)
    assert photo_keys("2513260012_03d33305cf.jpg") == ("2513260012_03d33305cf",)


# Captions ----------------------------------------------------------------------------------------------------------


def test_karpathys_coco_file(tmp_path: Path) -> None:
    images = [
        {
            "filepath": "val2014", "filename": NAMES[1], "cocoid": IDS[1], "split": "restval", "imgid": 0,
            "sentids": [0], "sentences": [{"tokens": ["A", "Man"], "raw": "A Man.", "imgid": 0, "sentid": 0}],
        }
    ]  # fmt: skip
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    (photo,) = read_captions(path)
    assert (photo.name, photo.split, photo.number) == (NAMES[1], "train", IDS[1])
    assert photo.captions == (("a", "man"),)  # lower case: the paper's vocabulary


def test_cocos_own_files(tmp_path: Path) -> None:
    path = tmp_path / "captions_val2014.json"
    images = [{"id": number, "file_name": name} for number, name in zip(IDS, NAMES, strict=True)]
    told = [(391895, "A man."), (42, "Two dogs"), (391895, "One rider")]
    annotations = [{"image_id": number, "id": 0, "caption": caption} for number, caption in told]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    photos = read_captions(path)
    assert [(photo.name, photo.split, photo.number) for photo in photos] == [
        (NAMES[0], "val", 42),
        (NAMES[1], "val", 391895),
    ]
    assert [photo.captions for photo in photos] == [(("two", "dogs"),), (("a", "man"), ("one", "rider"))]
    path.write_text(json.dumps({"images": [{"id": 3, "file_name": "COCO_test2014_000000000003.jpg"}]}))
    assert [(photo.split, photo.captions) for photo in read_captions(path)] == [("test", ())]


def test_results_as_the_coco_server_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "captions_test2014_deecap_results.json"
    write_coco_results(path, NAMES, IDS, [["a", "dog"], []])
    assert json.loads(path.read_text()) == [{"image_id": 42, "caption": "a dog"}, {"image_id": 391895, "caption": ""}]
    with pytest.raises(ValueError, match="no COCO id"):
        write_coco_results(path, NAMES, [42, None], [[], []])
    with pytest.raises(ValueError, match="same COCO id"):
        write_coco_results(path, NAMES, [42, 42], [[], []])


# Configurations that share -----------------------------------------------------------------------------------------

BASE = """
name = "base"
seed = 3
[data]
captions = "c.json"
photos = "p"
[model]
width = 16
heads = 2
[[stage]]
name = "words"
kind = "exits"
epochs = 1
learning_rate = 1e-3
"""


def test_a_configuration_is_its_base_but_for_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "a.toml").write_text('base = "base"\nname = "a"\n[model]\nwidth = 32\n')
    (tmp_path / "b.toml").write_text('base = "a"\nname = "b"\nseed = 4\n')
    base, a, b = (read_settings(tmp_path / f"{name}.toml") for name in ("base", "a", "b"))
    assert (a.name, a.seed, a.model, a.data, a.stages) == ("a", 3, {"width": 32, "heads": 2}, base.data, base.stages)
    assert (b.name, b.seed, b.model, len(b.stages)) == ("b", 4, a.model, 1)
    (tmp_path / "c.toml").write_text('base = "b"\nname = "c"\n[change.words]\nepochs = 2\n')
    assert read_settings(tmp_path / "c.toml").stages == (dataclasses.replace(base.stages[0], epochs=2),)


def test_a_base_that_is_not_beside_it_is_one_that_ships(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "own"\nname = "mine"\nseed = 4\n')
    mine, own = read_settings(tmp_path / "mine.toml"), find_settings(Path("own"))
    assert (mine.name, mine.seed, mine.stages, mine.data) == ("mine", 4, own.stages, own.data)
    (tmp_path / "own.toml").write_text(BASE)  # the one beside it goes first
    assert read_settings(tmp_path / "mine.toml").stages != own.stages


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('base = "c"\nname = "c"', "circle"),
        ('base = "nowhere"\nname = "c"', "nowhere"),
        ('base = "base"\nseed = 1', "name"),
        ('base = "base"\nname = "c"\n[model]\ncolour = 1', "colour"),
        ('base = "base"\nname = "c"\n[change.elsewhere]\nepochs = 1', "elsewhere"),
        ('base = "base"\nname = "c"\n[change.words]\ncolour = 1', "colour"),
        ('name = "c"\n[change.exits]\nepochs = 1', "without a base"),
        ('base = "base"\nname = "c"\n[change.words]\nepochs = 1\n[[stage]]\nname = "w"', "one of them"),
        ('base = "base"\nname = "c"\n[change.words]\nlambda = 2.0', "lambda"),
        ('base = "base"\nname = "c"\n[change]\nepochs = 1', "change.NAME"),
    ],
)
def test_a_base_that_cannot_be_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_settings(tmp_path / "c.toml")


SYSTEMS = {
    "tf-complete": ("final", 6), "tf-ee": ("plain", 6), "deecap-shallow": ("shallow", 6),
    **{f"tf-{k}l": ("final", k) for k in range(1, 6)},
    **{f"deecap-{fusion}": ("deecap", 6) for fusion in ("average", "concatenation", "attention", "sequential")},
}  # fmt: skip


def test_the_papers_systems_ship_and_share_one_budget() -> None:
    settings = {name: find_settings(Path(name)) for name in SYSTEMS}
    for name, one in settings.items():
        assert (one.name, one.model["exits"], one.model["decoder_layers"]) == (name, *SYSTEMS[name])
        assert one.stages[-1] == settings["tf-ee"].stages[-1]
        assert (one.budget, one.data) == ("systems", settings["tf-ee"].data)
    fusions = [settings[name].model["fusion"] for name in sorted(SYSTEMS) if SYSTEMS[name][0] == "deecap"]
    assert fusions == ["attention", "average", "concatenation", "sequential"]


def test_fixed_depths_of_the_small_model_hear_of_no_other_exit() -> None:
    small = find_settings(Path("small"))
    # of `small`'s two stages
    alone = [{"shallow_exit_weight": 0.0}, {"copied_states": 0.0, "freeze_layers": False}]
    names = {"small-tf-complete": 6, **{f"small-tf-{k}l": k for k in range(1, 4)}}
    for name, layers in names.items():
        one = find_settings(Path(name))
        assert one.model == {**small.model, "exits": "final", "decoder_layers": layers}
        assert one.exit_policy == ExitPolicy(())
        assert (one.name, one.budget, one.data) == (name, small.budget, small.data)
        assert list(one.stages) == [
            dataclasses.replace(stage, **told) for stage, told in zip(small.stages, alone, strict=True)
        ]


def test_each_ablation_changes_one_thing() -> None:
    paths = sorted((SHIPPED / "ablations").glob("*.toml"))
    assert paths
    for path in paths:
        base, ours = (dataclasses.asdict(read_settings(one)) for one in (base_of(path), path))
        assert ours.pop("name") == path.stem
        assert path.stem.startswith(base.pop("name")), "in tables the shorter name, the base's, is a system's own row"
        told = changes(base, ours)
        if "model.exits" in told:  # a system of the paper's; it may have another seed than the base
            told.pop("seed", None)
        assert one_choice(told), path


def base_of(path: Path) -> Path:
    return SHIPPED / f"{tomllib.loads(path.read_text())['base']}.toml"


def test_photos_without_captions_are_captioned_for_the_coco_server(random_bundle: Any, tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"COCO_test2014_{number:012}.jpg"} for number in (7, 3)]
    for image in images:
        Image.new("RGB", (40, 30), "green").save(tmp_path / str(image["file_name"]))
    (tmp_path / "image_info.json").write_text(json.dumps({"images": images}))
    words = ["evaluate", "--bundle", random_bundle.folder, "--captions", tmp_path / "image_info.json"]
    words += ["--photos", tmp_path, "--split", "test", "--device", "cpu", "--coco-results", tmp_path / "results.json"]
    told = CliRunner().invoke(app, [str(word) for word in words])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["scores"].startswith("not run")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [one["image_id"] for one in results] == [7, 3]
    assert all(isinstance(one["caption"], str) for one in results)
