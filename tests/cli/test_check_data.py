"""`deecap check-data` names everything that is wrong with a data folder, and nothing where nothing is."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CONFIG = """
name = "checked"
seed = 0
least_count = 1
[data]
captions = "captions.json"
photos = "photos"
{features}
[model]
width = 16
heads = 2
[[stage]]
name = "words"
kind = "backbone"
epochs = 1
learning_rate = 1e-3
batch_images = 2
"""


def entry(name: str, split: str = "train", *captions: str) -> dict[str, Any]:
    return {"filename": name, "split": split, "sentences": [{"raw": caption} for caption in captions or ("a dog",)]}


@pytest.fixture
def check(command: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """`check(*options)` -> exit code and the problems; of the folder `data`, with photos or, if asked, features."""

    def run(*options: str, features: str = "", boxes: str = "") -> tuple[int, list[str]]:
        told = f'region_features = "{features}"' if features else ""
        told += f'\nboxes = "{boxes}"\nunlabelled_photos = "more"' if boxes else ""
        lessons = "tune_trunk_from = 0\ncell_classes = 0.5\ncell_class_photos = 1\n" if boxes else ""
        (tmp_path / "config.toml").write_text(CONFIG.format(features=told) + lessons)
        done = command("check-data", "--config", tmp_path / "config.toml", "--data", tmp_path / "data", *options)
        lines = done.stdout.splitlines()
        return done.exit_code, [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four photos, one of them in an archive, and their captions and features: nothing wrong."""
    folder = tmp_path / "data"
    (folder / "photos").mkdir(parents=True)
    (folder / "regions").mkdir()
    images = [
        entry(f"{name}.jpg", split) for name, split in zip("abcd", ["train", "train", "restval", "val"], strict=True)
    ]
    write(folder, images)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    for name in "abcd":
        Image.fromarray(pixels).save(folder / "photos" / f"{name}.jpg")
        np.savez(folder / "regions" / f"{name}.npz", features=np.ones((2, 3)), boxes=np.tile([0, 0, 1, 1], (2, 1)))
    with tarfile.open(folder / "photos" / "some.tar", "w") as archive:
        archive.add(folder / "photos" / "d.jpg", "deep/d.jpg")
    (folder / "photos" / "d.jpg").unlink()
    return folder


def write(folder: Path, images: list[Any]) -> None:
    (folder / "captions.json").write_text(json.dumps({"images": images}))


def test_nothing_is_said_of_whole_data(check: Any, data: Path) -> None:
    assert check() == (0, [])
    assert check(features="regions") == (0, [])
    assert check("--quick") == (0, [])


def test_everything_is_named_at_once(check: Any, data: Path) -> None:
    images = [
        entry("a.jpg"), entry("a.jpg", "val"), entry("b.jpg", "train", "a cat", "!"), entry("b.png"),
        {"filename": "c.jpg", "split": "train", "sentences": []}, {"split": "train"}, entry("d.jpg", "valid"),
        {"filename": "e.jpg", "sentences": [{"tokens": "a dog"}]},
    ]  # fmt: skip
    write(data, images)
    whole = (data / "photos" / "c.jpg").read_bytes()
    (data / "photos" / "c.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "photos" / "more").mkdir()
    (data / "photos" / "more" / "a.jpg").write_bytes(whole)
    (data / "photos" / "e.jpg").write_bytes(b"no photo")
    code, problems = check()
    assert code == 1
    for told in [
        "a.jpg is there 2 times, in the splits train and val",
        "b.jpg, caption 2 is empty",
        "b.jpg and b.png differ in their endings alone",
        "c.jpg has no captions",
        "image 6 has no filename",
        "split 'valid' is none of",
        "e.jpg: caption 1 has neither tokens",
        "e.jpg has no captions",
        "b.png is not there",
        "c.jpg: cannot be read as a photo",
        "e.jpg: cannot be read as a photo",
        "a.jpg is both in",
    ]:
        assert sum(told in problem for problem in problems) == 1, told
    assert len(problems) == 12
    _, quick = check("--quick")
    assert set(quick) == {problem for problem in problems if "cannot be read" not in problem}


@pytest.mark.parametrize(
    ("splits", "told"), [(["train"] * 4, "no photos in the split val"), (["train", *["val"] * 3], "a batch has 2")]
)
def test_splits_that_cannot_be_trained_on(check: Any, data: Path, splits: list[str], told: str) -> None:
    write(data, [entry(f"{name}.jpg", split) for name, split in zip("abcd", splits, strict=True)])
    code, problems = check()
    assert code == 1
    assert len(problems) == 1
    assert told in problems[0]


def test_features_are_looked_into(check: Any, data: Path) -> None:
    boxes = np.tile([0, 0, 1, 1], (2, 1))
    np.savez(data / "regions" / "b.npz", features=np.ones((2, 4)), boxes=boxes)
    np.savez(data / "regions" / "c.npz", features=np.zeros((2, 3)), boxes=boxes[:, ::-1])
    (data / "regions" / "d.npz").write_bytes(b"cut")
    write(data, [entry(f"{name}.jpg", "val" if name == "d" else "train") for name in "abcde"])
    code, problems = check(features="regions")
    assert code == 1
    for told in (
        "b.npz: 4 numbers per region",
        "c.npz: all features are 0",
        "c.npz: a box ends before it begins",
        "d.npz does not hold",
        "no features of e.jpg",
    ):
        assert sum(told in problem for problem in problems) == 1, told
    assert len(problems) == 5


def test_boxes_are_looked_into(check: Any, data: Path) -> None:
    def problems_of(names: dict[str, Any]) -> list[str]:
        (data / "boxes.json").write_text(json.dumps({"classes": ["dog"], "boxes": names}))
        _, problems = check(boxes="boxes.json")
        return problems

    (data / "more").mkdir()
    shutil.copy(data / "photos" / "a.jpg", data / "more" / "z.jpg")
    one = [[0.1, 0.1, 0.5, 0.5, 0, 0.9]]
    assert problems_of({"photos/a.jpg": one, "more/z.jpg": one}) == []
    assert "of none of the photos in the split train" in problems_of({"photos/d.jpg": one, "more/z.jpg": one})[0]
    assert "boxes of 0 photos without captions, cell_class_photos are 1" in problems_of({"photos/a.jpg": one})[0]
    assert "ends before it begins" in problems_of({"photos/a.jpg": [[0.5, 0.1, 0.5, 0.5, 0, 0.9]]})[0]
    assert "of no class from 0 to 0" in problems_of({"photos/a.jpg": [[0.1, 0.1, 0.5, 0.5, 1, 0.9]]})[0]
    (data / "boxes.json").unlink()
    assert check(boxes="boxes.json") == (1, [f"{data / 'boxes.json'}: not there"])


def test_what_is_not_there_at_all(check: Any, data: Path, tmp_path: Path) -> None:
    assert any("nowhere" in problem for problem in check(features="nowhere")[1])
    (data / "captions.json").write_text("[]")
    (data / "photos").rename(tmp_path / "elsewhere")
    code, problems = check()
    assert code == 1
    assert "captions.json: neither Karpathy's form nor COCO's" in problems[0]
    assert any("no such folder of photos" in problem for problem in problems)
    (data / "captions.json").unlink()
    assert "not there" in check()[1][0]


def test_a_cut_archive_is_named(check: Any, data: Path) -> None:
    archive = data / "photos" / "some.tar"
    archive.write_bytes(archive.read_bytes()[:700])
    code, problems = check()
    assert code == 1
    assert any("some.tar" in problem for problem in problems)


def test_a_configuration_that_is_none(command: Any, tmp_path: Path) -> None:
    assert command("check-data", "--config", "nothing", "--data", tmp_path).exit_code == 2
