"""A run that goes on from a bundle: its words keep their numbers, its weights and extractor are where it begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import model.training.from_bundle as from_bundle
import model.training.loop as loop
import model.training.photo_regions as photo_regions
from model.bottom_up.extractor import Extractor, revision_of_extractor
from model.bottom_up.extractor_kinds import EMBEDDED, VISUAL_GENOME
from model.bundle import EXTRACTOR, VOCABULARY, load_bundle, write_json
from model.captioner import Captioner
from model.deecap import DeeCap
from model.exits import ExitPolicy
from model.experiments.systems import from_run
from model.random_bundle import WORDS
from model.training.check_data import check_data
from model.training.data import read_captions
from model.training.from_bundle import KEPT, with_new_words
from model.training.loop import Trainer
from model.training.release import write_bundle
from model.training.settings import TrainSettings, read_settings
from model.vocabulary import SPECIAL, Vocabulary
from tests.model.conftest import RandomBundle
from tests.model.test_training import Killed, killed_at

NEW = ("a zebra runs on the grass", "two zebras sit here")
GOES_ON = """
name = "goes-on"
seed = 0
starts_from_bundle = "{bundle}"
least_count = 1
views = 2

[data]
captions = "captions.json"
photos = "photos"

[[stage]]
name = "exits"
kind = "exits"
epochs = 1
learning_rate = 1e-3
batch_images = 2
captions_per_image = 2
"""


# For `settings`: a network of its own, seen through the bundle's extractor.
OWN_NETWORK = "[model]\nwidth = 16\nheads = 2\nfeed_forward = 24\ndecoder_layers = 2\n\n[[stage]]"
EXTRACTOR_ALONE = ("starts_from_bundle", "extractor_of_bundle", "[[stage]]", OWN_NETWORK)


@pytest.fixture(scope="module")
def bundle(random_bundle: RandomBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose exit policy is one of its own."""
    folder = tmp_path_factory.mktemp("bundles") / "before"
    shutil.copytree(random_bundle.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["exit_policy"] = ExitPolicy((1, 3), "copied").to_json()
    write_json(folder / "config.json", config)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "photos").mkdir()
    draw, images = np.random.default_rng(0), []
    for number, split in enumerate(["train"] * 4 + ["val"]):
        Image.fromarray(draw.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / "photos" / f"{number}.png")
        sentences = [{"raw": text} for text in NEW]
        images.append({"filename": f"{number}.png", "split": split, "sentences": sentences})
    (folder / "captions.json").write_text(json.dumps({"images": images}))
    return folder


@pytest.fixture
def settings(bundle: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    """`settings(old, new, ...)`: those of `GOES_ON`, with `new` in place of `old`."""

    def make(*changes: str) -> TrainSettings:
        text = GOES_ON.format(bundle=bundle)
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "goes-on.toml").write_text(text)
        return read_settings(tmp_path / "goes-on.toml")

    return make


def test_new_words_come_after_the_known_ones() -> None:
    known = Vocabulary([*SPECIAL, "a", "dog"])
    captions = [["a", "zebra"], ["a", "zebra", "dog"], ["a", "rare", "dog"]]
    assert with_new_words(known, captions, 2).words == (*known.words, "zebra")
    assert with_new_words(known, captions, 1).words == (*known.words, "zebra", "rare")
    assert with_new_words(known, [], 1).words == known.words


def test_it_begins_where_the_bundle_ended_and_becomes_a_bundle(
    bundle: Path, data: Path, settings: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, work = load_bundle(bundle), tmp_path / "work" / "goes-on"
    seen: list[dict[str, torch.Tensor]] = []
    whole = loop.exits_loss

    def first_look(network: DeeCap, *others: Any) -> torch.Tensor:
        if not seen:
            seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return whole(network, *others)

    monkeypatch.setattr(loop, "exits_loss", first_look)
    trainer = Trainer(settings(), data, work, tmp_path / "features")
    trainer.run()
    count = len(started.vocabulary)
    assert trainer.vocabulary.words[:count] == started.vocabulary.words
    assert set(trainer.vocabulary.words[count:]) == {"zebra", "zebras", "sit", "here"}
    for name, value in started.model.state_dict().items():
        assert torch.equal(seen[0][name][: len(value)] if value.ndim else seen[0][name], value), name
    assert (seen[0]["head_bias"][count:] == started.model.head_bias.min()).all()

    write_bundle(settings(), work, tmp_path / "after")
    assert (tmp_path / "after" / EXTRACTOR).read_bytes() == (bundle / EXTRACTOR).read_bytes()
    ended = load_bundle(tmp_path / "after")
    assert ended.policy == started.policy
    assert ended.vocabulary.words == trainer.vocabulary.words
    assert not torch.equal(ended.model.word_embedding.weight[:count], started.model.word_embedding.weight)
    captioner = Captioner.load(tmp_path / "after", "cpu")
    with Image.open(data / "photos" / "0.png") as image:
        regions = captioner.look(image)
        assert len(captioner.describe(regions, "full").words) <= 20
    measured = from_run(settings(), work, data)
    assert measured.policy == started.policy
    assert measured.vocabulary.words == ended.vocabulary.words
    photo = read_captions(data / "captions.json")[:1]
    assert np.allclose(measured.look(photo)[0].features, regions.features, rtol=1e-2, atol=1e-2)


def test_the_extractor_alone_may_be_a_bundles(
    bundle: Path, data: Path, settings: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photo_regions, "HEAD_WIDTH", 7)  # of a trunk of its own, which it does not have
    chosen = settings(*EXTRACTOR_ALONE)
    work = tmp_path / "work" / "goes-on"
    trainer = Trainer(chosen, data, work, tmp_path / "features")
    trainer.run()
    assert set(trainer.vocabulary.words) == {*SPECIAL, *(word for text in NEW for word in text.split())}, "its own"
    assert (trainer.model.config.width, trainer.model.config.feature_width) == (16, 1280)
    assert trainer.regions.kept is not None
    write_bundle(chosen, work, tmp_path / "after")
    assert (tmp_path / "after" / EXTRACTOR).read_bytes() == (bundle / EXTRACTOR).read_bytes()
    assert load_bundle(tmp_path / "after").policy == ExitPolicy.every_layer(2), "no other is told"
    measured, photo = from_run(chosen, work, data), read_captions(data / "captions.json")[:1]
    (seen,) = measured.look(photo)
    assert np.allclose(seen.features, trainer.regions.kept([0], [0])[0][0], rtol=1e-2, atol=1e-2)
    assert measured.configuration["extractor"] == revision_of_extractor(bundle / EXTRACTOR)
    assert check_data(chosen, data).problems == []
    gone = settings(*EXTRACTOR_ALONE, str(bundle), "nowhere")
    assert check_data(gone, data).problems == ["there is no bundle nowhere, neither a folder nor one that ships"]


def test_it_does_not_go_on_from_a_run_that_saw_otherwise(
    data: Path, settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    Trainer(settings(*EXTRACTOR_ALONE), data, tmp_path / "work" / "first", tmp_path / "features").run()
    after = settings(*EXTRACTOR_ALONE, "seed = 0", 'seed = 0\nstarts_from = "first/exits"')
    Trainer(after, data, tmp_path / "work" / "second", tmp_path / "features").run()
    path = tmp_path / "work" / "first" / "exits.pt"
    torch.save({**torch.load(path, weights_only=True), "trunk": {}}, path)
    with pytest.raises(ValueError, match="another extractor"):
        Trainer(after, data, tmp_path / "work" / "third", tmp_path / "features").run()


def test_the_bundle_may_not_change_under_the_run(
    bundle: Path, data: Path, settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    chosen = settings(str(bundle), str(other))
    Trainer(chosen, data, tmp_path / "work", tmp_path)
    (tmp_path / "work" / KEPT).write_bytes(b"that of the bundle as it was")
    with pytest.raises(ValueError, match=r"extractor\.onnx is not what this run began with"):
        Trainer(chosen, data, tmp_path / "work", tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (('photos = "photos"', 'photos = "photos"\nregion_features = "r"'), "starts_from_bundle and region_features"),
        (("seed = 0", 'seed = 0\nstarts_from = "run/exits"'), "starts_from_bundle and starts_from"),
        (("seed = 0", 'seed = 0\nextractor_of_bundle = "b"'), "starts_from_bundle and extractor_of_bundle"),
        (
            ("starts_from_bundle", "extractor_of_bundle", 'photos = "photos"', 'photos = "photos"\nregion_head = "r"'),
            "extractor_of_bundle and region_head",
        ),
        (("epochs = 1", "epochs = 1\ntune_trunk_from = 0"), "a bundle's extractor stays as it is"),
        (("epochs = 1", "epochs = 1\nquantised_extractor = true"), "a bundle's extractor stays as it is"),
    ],
)
def test_what_cannot_be_with_a_bundle_is_told_at_once(
    settings: Callable[..., TrainSettings], changes: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        settings(*changes)


@pytest.mark.parametrize("told", ["feed_forward = 64", "heads = 4", 'exits = "plain"', "exit_head = true"])
def test_another_network_is_refused_and_leaves_nothing_behind(
    data: Path, settings: Callable[..., TrainSettings], tmp_path: Path, told: str
) -> None:
    with pytest.raises(ValueError, match=rf"\[model\] {told.split()[0]} is .*, and that of the bundle .*: it stays so"):
        Trainer(settings("[[stage]]", f"[model]\n{told}\n\n[[stage]]"), data, tmp_path / "work", tmp_path)
    assert not (tmp_path / "work" / KEPT).exists()


def test_what_no_weight_depends_on_may_differ(
    data: Path, settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    chosen = settings("[[stage]]", "[model]\ndropout = 0.4\nno_repeats = true\n\n[[stage]]")
    config = Trainer(chosen, data, tmp_path / "work", tmp_path).model.config
    assert (config.dropout, config.no_repeats) == (0.4, True)


def test_a_stage_of_another_configuration_is_not_shipped(
    data: Path, settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    Trainer(settings(), data, tmp_path / "work", tmp_path).run()
    other = settings("[[stage]]", "[model]\nfeed_forward = 64\n\n[[stage]]")
    told = r"not of this configuration.*feed_forward is 64"
    with pytest.raises(ValueError, match=told):
        write_bundle(other, tmp_path / "work", tmp_path / "out")
    with pytest.raises(ValueError, match=told):
        from_run(other, tmp_path / "work", data)


def test_a_stopped_run_goes_on_and_ends_as_if_nothing_had_happened(
    data: Path, settings: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, found = settings("epochs = 1", "epochs = 2"), []
    for stopped in (False, True):
        work = tmp_path / f"work-{stopped}"
        if stopped:
            with monkeypatch.context() as patch:
                killed_at(patch, "exits_loss", 4)  # two steps an epoch: in the middle of the second
                with pytest.raises(Killed):
                    Trainer(chosen, data, work, tmp_path / "features").run()
        Trainer(chosen, data, work, tmp_path / "features").run()
        found.append(torch.load(work / "exits.pt", weights_only=True)["model"])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_photos_are_seen_whole_and_mirrored_however_many_views_are_told(
    data: Path, settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    for views in (1, 4):  # with the regions kept in one folder
        chosen = settings("views = 2", f"views = {views}")
        trainer = Trainer(chosen, data, tmp_path / f"work-{views}", tmp_path / "features")
        trainer.run()
        assert trainer.regions.kept is not None
        assert (trainer.regions.kept.counts > 0).all(0).tolist() == [True, views > 1]
    whole, mirrored = (trainer.regions.kept([0], [view])[0] for view in (0, 1))
    with Image.open(data / "photos" / "0.png") as image:
        seen = Extractor(tmp_path / "work-4" / KEPT).look([image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])[0]
    assert np.abs(mirrored[0].numpy() - seen.features).max() < 0.02 * np.abs(seen.features).max()
    assert not torch.allclose(whole, mirrored, rtol=0.1)


def test_a_bundle_that_is_not_there_or_none_is_named(
    bundle: Path, data: Path, settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    gone = settings(str(bundle), "nowhere")
    with pytest.raises(FileNotFoundError, match="no bundle nowhere"):
        Trainer(gone, data, tmp_path / "work", tmp_path)
    assert check_data(gone, data).problems == ["there is no bundle nowhere, neither a folder nor one that ships"]
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    chosen = settings(str(bundle), str(broken))
    for name, content in ((EXTRACTOR, "no graph"), (VOCABULARY, "{")):
        (broken / name).write_text(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            Trainer(chosen, data, tmp_path / "work", tmp_path)
        assert name in check_data(chosen, data).problems[0]


@pytest.mark.parametrize(
    ("kind", "width", "told"), [(VISUAL_GENOME, 1280, "has a detector"), (EMBEDDED, 7, "7 numbers for a region")]
)
def test_an_extractor_of_another_kind_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, kind: str, width: int, told: str
) -> None:
    monkeypatch.setattr(from_bundle, "Extractor", lambda path: SimpleNamespace(kind=kind, feature_width=width))
    with pytest.raises(ValueError, match=told):
        from_bundle.read_start(str(bundle))


def test_checking_tells_how_many_words_are_new(data: Path, settings: Callable[..., TrainSettings]) -> None:
    report = check_data(settings(), data)
    assert report.problems == []
    assert report.facts["new_words"] == 4
    assert report.facts["vocabulary"] == len(SPECIAL) + len(WORDS) + 4
    assert report.facts["unknown_words"] == 0.0
