"""Whoever follows "Your own photos" with fifty captioned photos has a service with a model of their own in the end."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from model.config import DeeCapConfig
from model.exits import ExitPolicy
from model.training.settings import DataSettings, StageSettings, TrainSettings, find_settings, read_settings
from tests.docs.blocks import ROOT, SHELL, blocks
from tests.docs.reader import HOST, furnish, run, serving

PAGE = ROOT / "docs" / "own-data.md"
BLOCKS = [
    block for block in blocks(PAGE) if block.language in SHELL and not (block.reason or "").startswith("it installs")
]
SECONDS = 300  # for one block, on a machine that does other work as well
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 200), "yellow": (230, 210, 40)}
THINGS = ("ball", "box", "cone")
PLACES = ("on the left", "in the middle", "on the right")
FRAMES = ("A {} {} {}.", "There is a {} {} {}", "one {} {}, {}")


def photo(colour: str, thing: str, place: str, chance: random.Random) -> Image.Image:
    """What its captions say of it, on a background of any colour and size."""
    width, height = chance.randint(200, 400), chance.randint(200, 400)
    image = Image.new("RGB", (width, height), tuple(chance.randint(150, 255) for _ in range(3)))
    side = chance.randint(50, 60)
    left, top = 5 + PLACES.index(place) * (width - side - 10) // 2, chance.randint(0, height - side)
    box = (left, top, left + side, top + side)
    draw = ImageDraw.Draw(image)
    if thing == "ball":
        draw.ellipse(box, fill=COLOURS[colour])
    elif thing == "box":
        draw.rectangle(box, fill=COLOURS[colour])
    else:
        draw.polygon([(left + side // 2, top), (left, top + side), (left + side, top + side)], fill=COLOURS[colour])
    return image


def write_photos(folder: Path) -> set[str]:
    """Fifty photos and their captions as the page lays them out; the words of the captions."""
    (folder / "photos").mkdir(parents=True)
    chance, images, words = random.Random(0), [], set()
    for number in range(50):
        seen = (chance.choice(list(COLOURS)), chance.choice(THINGS), chance.choice(PLACES))
        name = f"{number:04}.jpg"
        photo(*seen, chance).save(folder / "photos" / name)
        told = [frame.format(*seen) for frame in FRAMES[: chance.randint(1, 3)]]
        words |= {word for caption in told for word in re.findall(r"[a-z]+", caption.lower())}
        split = "val" if number % 5 == 4 else "train"
        images.append({"filename": name, "split": split, "sentences": [{"raw": caption} for caption in told]})
    (folder / "captions.json").write_text(json.dumps({"images": images}))
    return words


def succeeds(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = run(text, folder, SECONDS)
    assert done.returncode == 0, f"{text}{done.stdout}{done.stderr}"
    return done


def test_the_page_is_followed_to_a_caption(tmp_path: Path) -> None:
    folder = furnish(tmp_path)
    words = write_photos(folder / "my-photos")
    check, train, bundle, serve, ask = (block.text for block in BLOCKS)
    assert succeeds(check, folder).stdout.endswith("no problems\n")
    succeeds(train, folder)
    succeeds(bundle, folder)
    speeds = json.loads((folder / "my-bundle" / "speeds.json").read_text())
    assert "note" not in speeds["measured"]  # that says so where nothing was measured
    assert len(speeds["rows"]) > 1
    with serving(serve, folder) as host:
        answer = json.loads(succeeds(ask.replace(HOST, host), folder).stdout)
    assert answer["model"]["name"] == "my-bundle"
    said = answer["caption"].split()
    assert len(said) >= 2
    assert words <= set(json.loads((folder / "my-bundle" / "vocabulary.json").read_text()))
    lines = [json.loads(line) for line in (folder / "work" / "fine-tune" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "seconds" in line]
    assert losses[-1] < 0.7 * losses[0]
    ciders = [line["val_cider"] for line in lines if "val_cider" in line]
    assert max(ciders) > 2 * ciders[0]
    samples = [sample for line in lines[-1:] for sample in line["samples"]]
    assert {word for sample in samples for word in sample.split()} <= words, "it speaks as these captions do"


@pytest.mark.parametrize(
    "block", [block for block in blocks(PAGE) if block.language == "toml"], ids=lambda block: block.name
)
def test_the_configurations_on_the_page_can_be_read(block: object, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(block.text)
    settings = read_settings(path)
    assert settings.name == "mine"
    assert settings.data == find_settings(Path("own")).data == find_settings(Path("fine-tune")).data
    assert settings.starts_from_bundle or settings.exit_policy == find_settings(Path("own")).exit_policy


def test_the_page_tells_every_key_and_no_other() -> None:
    kinds = (TrainSettings, DataSettings, DeeCapConfig, ExitPolicy, StageSettings)
    known = {field.name.rstrip("_") for kind in kinds for field in dataclasses.fields(kind)}
    known |= {"base", "change"}
    # Tables of their own, and what comes from the data.
    known -= {"data", "model", "stages", "exit_policy", "vocabulary_size", "feature_width"}
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == known


def test_the_smallest_split_that_the_page_names_is_that_of_the_configuration() -> None:
    for name in ("own", "fine-tune"):
        assert {stage.batch_images for stage in find_settings(Path(name)).stages} == {8}
    assert "needs eight photos or more" in PAGE.read_text()
