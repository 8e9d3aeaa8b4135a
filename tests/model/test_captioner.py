"""The two-step API over a whole bundle of random weights: look once, describe at any speed, alone or together."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.batching import stack_regions
from model.bundle import EXTRACTOR, BundleError, save_model
from model.caption import Caption, Regions, Word
from model.captioner import Captioner
from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.exits import TIERS, ExitPolicy, ResolvedSpeed, UnknownSpeedError
from model.random_bundle import WORDS
from model.vocabulary import SPECIAL, Vocabulary

SAMPLES = sorted((Path(__file__).parents[2] / "samples").glob("*.jpg"))


@pytest.fixture(scope="module")
def captioner(random_bundle: Any) -> Captioner:
    return Captioner.load(random_bundle.folder, "cpu", "float32")


@pytest.fixture(scope="module")
def seen(captioner: Captioner) -> list[Regions]:
    found = []
    for path in SAMPLES:
        with Image.open(path) as image:
            found.append(captioner.look(image))
    return found


def fewer(regions: Regions, count: int) -> Regions:
    return Regions(regions.boxes[:count], regions.features[:count])


def test_looking_gives_boxes_and_features(captioner: Captioner, seen: list[Regions]) -> None:
    assert len(seen) >= 2
    for regions in seen:
        assert regions.boxes.shape == (81, 4)
        assert regions.features.shape == (81, 1280)
        assert regions.boxes.dtype == regions.features.dtype == np.float32
        assert ((regions.boxes >= 0) & (regions.boxes <= 1)).all()
        assert np.isfinite(regions.features).all()
    assert np.abs(seen[0].features - seen[1].features).max() > 0.01


def test_looking_at_several_is_looking_at_each(captioner: Captioner, seen: list[Regions]) -> None:
    images = [Image.open(path) for path in SAMPLES]
    for one, other in zip(captioner.look_batch(images), seen, strict=True):
        scale = float(np.abs(other.features).max())
        assert one.features == pytest.approx(other.features, rel=1e-3, abs=1e-4 * scale)


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("speed", [*TIERS, 1, 1.7, 5.9])
def test_a_photo_is_described_at_any_speed(
    captioner: Captioner, seen: list[Regions], speed: str | float, beam: int
) -> None:
    caption = captioner.describe(seen[0], speed, beam=beam)
    assert caption.layers == captioner.layers == 6
    assert caption.speed == captioner.speeds.resolve(speed)
    assert 1 <= len(caption.steps) <= 20
    assert all(word.text in WORDS for word in caption.words)
    assert caption.text.split() == [word.text for word in caption.words]
    assert 0.0 < caption.confidence <= 1.0
    assert 1.0 <= caption.speedup <= 6.0
    for step in caption.steps:
        assert 1 <= step.exit_layer <= 6
        assert 0.0 <= step.entropy <= math.log(len(WORDS) + 1) + 1e-4
        assert step.log_probability <= 0.0
        assert step.exit_layer == 6 or step.entropy < caption.speed.tau
    if caption.speed.tau == 0.0:
        assert {step.exit_layer for step in caption.steps} == {6}


def test_the_default_speed_is_balanced(captioner: Captioner, seen: list[Regions]) -> None:
    assert captioner.describe(seen[0]) == captioner.describe(seen[0], "balanced")


def test_a_threshold_may_be_given_itself(captioner: Captioner, seen: list[Regions]) -> None:
    deep, early = captioner.describe(seen[0], tau=0.0), captioner.describe(seen[0], tau=100.0)
    assert {step.exit_layer for step in deep.steps} == {6}
    assert {step.exit_layer for step in early.steps} == {1}
    assert (deep.speedup, early.speedup) == (1.0, 6.0)


def test_what_is_not_offered_is_refused(captioner: Captioner, seen: list[Regions]) -> None:
    with pytest.raises(UnknownSpeedError):
        captioner.describe(seen[0], "warp")
    with pytest.raises(UnknownSpeedError):
        captioner.describe(seen[0], "full", tau=1.0)
    for beam in (0, 6):
        with pytest.raises(ValueError, match="beam"):
            captioner.describe(seen[0], beam=beam)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_batch_is_described_as_each_alone(captioner: Captioner, seen: list[Regions], beam: int) -> None:
    """Different speeds and different numbers of regions side by side."""
    batch = [fewer(regions, count) for regions, count in zip([*seen, seen[0]], [81, 10, 36, 81, 1], strict=False)]
    speeds = [captioner.speeds.resolve(tau=tau) for tau in (0.0, 1.0, 2.0, 2.4, 100.0)][: len(batch)]
    together, rows = captioner.describe_counted(batch, speeds, beam)
    assert together == captioner.describe_batch(batch, speeds, beam)
    alone = [captioner.describe_counted([one], [speed], beam) for one, speed in zip(batch, speeds, strict=True)]
    assert rows == sum(count for _, count in alone)
    for caption, ([single], _) in zip(together, alone, strict=True):
        assert caption.text == single.text
        assert caption.speed == single.speed
        assert [step.exit_layer for step in caption.steps] == [step.exit_layer for step in single.steps]
        for one, other in zip(caption.steps, single.steps, strict=True):  # float32: shapes may round differently
            assert one.entropy == pytest.approx(other.entropy, abs=1e-4)
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def test_a_bundle_knows_its_name_and_revision(captioner: Captioner, random_bundle: Any) -> None:
    assert captioner.name == "random"
    assert len(captioner.revision) == 12
    assert Captioner.load(random_bundle.folder, "cpu").revision == captioner.revision


def test_an_extractor_of_another_width_is_refused(random_bundle: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(random_bundle.folder, tmp_path / "narrow")
    vocabulary = Vocabulary([*SPECIAL, *WORDS])
    model = DeeCap(DeeCapConfig(len(vocabulary), 77, 16, 2, 32, 1, 6))
    save_model(folder, "narrow", model, vocabulary, ExitPolicy.every_layer(6))
    with pytest.raises(BundleError, match=r"1280.*77"):
        Captioner.load(folder, "cpu")
    (folder / EXTRACTOR).write_bytes(b"nonsense")
    with pytest.raises(BundleError, match=EXTRACTOR):
        Captioner.load(folder, "cpu")


def test_images_of_different_numbers_of_regions_are_stacked() -> None:
    random = np.random.default_rng(0)
    batch = [
        Regions(random.random((count, 4)).astype(np.float32), random.random((count, 5)).astype(np.float32))
        for count in (2, 4, 1)
    ]
    features, boxes, mask = stack_regions(batch)
    assert (features.shape, boxes.shape, mask.shape) == ((3, 4, 5), (3, 4, 4), (3, 4))
    assert mask.sum(1).tolist() == [2, 4, 1]
    for row, regions in enumerate(batch):
        count = len(regions.boxes)
        assert torch.equal(features[row, :count], torch.from_numpy(regions.features))
        assert torch.equal(boxes[row, :count], torch.from_numpy(regions.boxes))
        assert (features[row, count:] == 0).all()


SPEED = ResolvedSpeed("fast", "fast", 1.0, 3.0)


def test_a_caption_sums_its_steps_up() -> None:
    steps = (Word("a", 1, 0.1, math.log(0.9)), Word("dog", 3, 0.5, math.log(0.4)), Word("", 2, 0.2, math.log(0.6)))
    caption = Caption(steps, SPEED, 6)
    assert caption.text == "a dog"
    assert caption.words == steps[:2]
    assert caption.confidence == pytest.approx((0.9 * 0.4 * 0.6) ** (1 / 3))
    assert caption.speedup == pytest.approx(6 * 3 / (1 + 3 + 2))  # EOS included


def test_a_caption_that_ran_to_the_longest_has_no_end() -> None:
    caption = Caption((Word("a", 6, 0.1, 0.0), Word("dog", 6, 0.1, 0.0)), SPEED, 6)
    assert caption.text == "a dog"
    assert caption.confidence == 1.0
    assert caption.speedup == 1.0


def test_an_empty_caption_is_no_error() -> None:
    caption = Caption((Word("", 2, 0.2, -1.0),), SPEED, 6)
    assert caption.text == ""
    assert caption.words == ()
    assert caption.speedup == 3.0
    assert Caption((), SPEED, 6).confidence == 0.0
    assert Caption((), SPEED, 6).speedup == 1.0


def test_warming_up_describes_at_every_tier_and_changes_nothing(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = captioner.describe(captioner.look(Image.linear_gradient("L")), "fast")
    asked = []
    describe = captioner.describe

    def noting(regions: Regions, speed: str) -> Caption:
        asked.append(speed)
        return describe(regions, speed)

    monkeypatch.setattr(captioner, "describe", noting)
    captioner.warm_up()
    assert asked == list(TIERS)
    assert describe(captioner.look(Image.linear_gradient("L")), "fast") == before
