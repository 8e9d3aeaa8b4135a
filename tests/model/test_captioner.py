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


# Step by step, as a worker feeds it.


def plain_captioner(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> Captioner:
    """The same, served by the plain decoder, as for the fusions that the engine does not have."""
    monkeypatch.setattr("model.captioner.ENGINE_FUSIONS", ())
    plain = Captioner(captioner.bundle, captioner._extractor, "cpu", "float32")
    assert plain._engine is None
    return plain


@pytest.fixture(params=["engine", "plain"])
def stepped(request: pytest.FixtureRequest, captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> Captioner:
    return captioner if request.param == "engine" else plain_captioner(captioner, monkeypatch)


def assert_same(one: Caption | str, other: Caption) -> None:
    """But for what float32 rounds differently in another batch."""
    assert isinstance(one, Caption)
    assert one.text == other.text
    assert (one.speed, one.layers) == (other.speed, other.layers)
    assert [step.exit_layer for step in one.steps] == [step.exit_layer for step in other.steps]
    for step, its in zip(one.steps, other.steps, strict=True):
        assert step.entropy == pytest.approx(its.entropy, abs=1e-4)
        assert step.log_probability == pytest.approx(its.log_probability, abs=1e-4)


def test_captions_made_step_by_step_are_those_of_describe(stepped: Captioner, seen: list[Regions]) -> None:
    """They come one or several at a time, at any step, and more of them than there are slots."""
    random = np.random.default_rng(0)
    asked = []
    for row in range(18):
        regions = fewer(seen[row % len(seen)], int(random.integers(1, 82)))
        speed = stepped.speeds.resolve(tau=random.choice([0.0, 1.0, 2.0, 2.4]))
        asked.append((regions, speed, int(random.choice([1, 1, 2, 5]))))
    expected = [stepped.describe_batch([regions], [speed], beam)[0] for regions, speed, beam in asked]
    found: dict[int, Caption | str] = {}
    rows: dict[int, int] = {}
    left = list(range(len(asked)))
    while left or stepped.busy:
        now, left = left[: (count := int(random.integers(0, 5)))], left[count:]
        if now:
            regions, speeds, beams = zip(*(asked[row] for row in now), strict=True)
            rows |= zip(stepped.begin(regions, speeds, beams, [math.inf] * len(now)), now, strict=True)
        stepped.step()
        found |= {rows[ticket]: outcome for ticket, outcome in stepped.finished()}
    for row, caption in enumerate(expected):
        assert_same(found[row], caption)
    assert stepped.free == stepped.slots


def test_words_so_far_are_those_of_the_caption(captioner: Captioner, seen: list[Regions]) -> None:
    """Of several captions at once that begin and end at different steps; of a beam there are none."""
    random = np.random.default_rng(1)
    left = [(float(random.choice([0.0, 1.0, 2.0, 2.4])), int(random.choice([1, 1, 1, 3]))) for _ in range(24)]
    beams: dict[int, int] = {}
    heard: dict[int, list[Word]] = {}
    captions: dict[int, Caption] = {}
    partly = 0
    while left or captioner.busy:
        now, left = left[: (count := int(random.integers(0, 4)))], left[count:]
        regions = [fewer(seen[0], int(random.integers(1, 82))) for _ in now]
        speeds = [captioner.speeds.resolve(tau=tau) for tau, _ in now]
        tickets = captioner.begin(regions, speeds, [beam for _, beam in now], [math.inf] * len(now)) if now else []
        assert not any(captioner.words_so_far(ticket) for ticket in tickets)
        beams |= {ticket: beam for ticket, (_, beam) in zip(tickets, now, strict=True)}
        heard |= {ticket: [] for ticket in tickets}
        captioner.step()
        for ticket, outcome in captioner.finished():
            assert isinstance(outcome, Caption)
            captions[ticket] = outcome
        for ticket in beams.keys() - captions.keys():
            new = captioner.words_so_far(ticket, len(heard[ticket]))
            heard[ticket] += new
            assert captioner.words_so_far(ticket) == tuple(heard[ticket])
            assert len(new) == (beams[ticket] == 1)
            partly += len(new)
    assert partly > 20
    for ticket, caption in captions.items():
        # All but what the last step said: the end, or the last word that there was room for.
        last = len(caption.steps) - 1 if beams[ticket] == 1 else 0
        assert tuple(heard[ticket]) == caption.steps[:last]
        assert captioner.words_so_far(ticket) == ()
    assert captioner.words_so_far(12345) == ()


def test_the_plain_decoder_says_no_words_early(
    captioner: Captioner, seen: list[Regions], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plain_captioner(captioner, monkeypatch)
    [ticket] = plain.begin([seen[0]], [plain.speeds.resolve()], [1], [math.inf])
    assert plain.words_so_far(ticket) == ()
    plain.step()
    assert plain.words_so_far(ticket) == ()
    assert len(plain.finished()) == 1


def test_free_slots_count_the_width_of_beams(stepped: Captioner, seen: list[Regions]) -> None:
    assert stepped.slots >= 5  # the widest beam
    speed = stepped.speeds.resolve()
    stepped.begin([seen[0], seen[0]], [speed, speed], [1, 3], [math.inf, math.inf])
    assert stepped.free == stepped.slots - 4
    stepped.reset()
    assert stepped.free == stepped.slots


def test_what_is_cancelled_or_late_is_told_so(stepped: Captioner, seen: list[Regions]) -> None:
    speed = stepped.speeds.resolve("full")
    gone, late, kept, gone_later = stepped.begin(
        [seen[0]] * 4, [speed] * 4, [1, 1, 1, 2], [math.inf, 0.0, math.inf, 1e18]
    )
    stepped.cancel(gone)
    stepped.cancel(gone)
    stepped.cancel(12345)
    assert stepped.finished() == [(gone, "cancelled")]
    found: dict[int, Caption | str] = {}
    stepped.step()
    stepped.cancel(gone_later)
    while stepped.busy:
        stepped.step()
        found |= stepped.finished()
    found |= stepped.finished()
    assert found[late] == "deadline"
    assert found[gone_later] == "cancelled"
    assert_same(found[kept], stepped.describe(seen[0], "full"))
    assert len(found) == 3
    stepped.step()  # nothing to do is no error
    assert stepped.finished() == []


def test_describing_waits_for_what_is_in_the_making(stepped: Captioner, seen: list[Regions]) -> None:
    stepped.begin([seen[0]], [stepped.speeds.resolve()], [1], [math.inf])
    with pytest.raises(RuntimeError, match="1 captions are in the making"):
        stepped.describe(seen[0])
    stepped.reset()
    assert not stepped.busy
    assert stepped.finished() == []
    stepped.describe(seen[0])


@pytest.mark.parametrize(("beam", "tau"), [(0, 1.0), (6, 1.0), (1, -1.0), (1, math.nan)])
def test_what_cannot_be_begun_leaves_nothing_behind(
    stepped: Captioner, seen: list[Regions], beam: int, tau: float
) -> None:
    good, wrong = stepped.speeds.resolve(), ResolvedSpeed(None, None, tau, 1.0)
    with pytest.raises(ValueError, match=r"beam|tau"):
        stepped.begin([seen[0], seen[0]], [good, wrong], [1, beam], [math.inf, math.inf])
    assert (stepped.busy, stepped.free) == (False, stepped.slots)


def test_an_image_without_regions_is_refused_and_leaves_nothing_behind(stepped: Captioner, seen: list[Regions]) -> None:
    empty = Regions(seen[0].boxes[:0], seen[0].features[:0])
    speed = stepped.speeds.resolve()
    with pytest.raises(ValueError, match="without regions"):
        stepped.begin([seen[0], empty], [speed, speed], [1, 1], [math.inf, math.inf])
    assert (stepped.busy, stepped.free) == (False, stepped.slots)
    with pytest.raises(ValueError, match="without regions"):
        stepped.describe_batch([seen[0], empty], [speed, speed])
    assert not stepped.busy
    stepped.describe(seen[0])


@pytest.mark.parametrize("where", ["encode", "step"])
def test_after_a_failure_all_goes_on(
    captioner: Captioner, seen: list[Regions], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected = captioner.describe(seen[0])

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(captioner._engine, where, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            captioner.describe(seen[0])
        with pytest.raises(RuntimeError, match="out of memory"):  # noqa: PT012  # whichever of the two it is
            captioner.begin([seen[0]], [captioner.speeds.resolve()], [1], [math.inf])
            captioner.step()
        captioner.reset()
    assert captioner.describe(seen[0]) == expected


def test_a_prepared_photo_is_the_photo(captioner: Captioner, seen: list[Regions]) -> None:
    with Image.open(SAMPLES[0]) as image:
        pixels = captioner.prepare(image)
    [regions] = captioner.look_at_pixels(pixels[None])
    assert np.array_equal(regions.features, seen[0].features)
    assert np.array_equal(regions.boxes, seen[0].boxes)


def test_the_extractors_revision_changes_with_it_alone(random_bundle: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(random_bundle.folder, tmp_path / "other")
    speeds = folder / "speeds.json"
    speeds.write_text(speeds.read_text() + "\n")
    one, other = (Captioner.load(path, "cpu", "float32") for path in (random_bundle.folder, folder))
    assert one.extractor_revision == other.extractor_revision
    assert one.revision != other.revision
    (folder / EXTRACTOR).write_bytes((folder / EXTRACTOR).read_bytes() + b"\x00")
    assert one.extractor_revision != other.extractor_revision
