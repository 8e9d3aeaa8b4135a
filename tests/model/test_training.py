"""Training's parts do what the paper's sections 3.3 and 3.4 say, and a run that was stopped goes on where it was."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import model.training.loop as loop
import model.training.photo_regions as photo_regions
from model.bottom_up.grid import cells
from model.bottom_up.trunk import Trunk
from model.bundle import EXTRACTOR
from model.caption import Regions
from model.captioner import Captioner
from model.config import DeeCapConfig
from model.decoding.search import emission_logits
from model.deecap import DeeCap, ExitHead
from model.training.average import WeightAverage
from model.training.data import epoch_batches, pad_captions, pick_captions, read_captions
from model.training.loop import Trainer, weights_that_fit
from model.training.losses import exit_head_loss
from model.training.objectives import Batch, exits_loss, words_that_left
from model.training.optimiser import freeze_layers, freezing_chances, is_exit_part, make_optimiser, rate_at, set_rate
from model.training.own_captions import KEPT
from model.training.regions import KeptRegions, PhotoRows, PhotoSource, RegionFiles
from model.training.release import write_bundle
from model.training.sampling import sample_captions
from model.training.self_critical import CiderReward, pad_samples, self_critical_loss
from model.training.settings import StageSettings, TrainSettings, find_settings, read_settings
from model.vocabulary import BOS, EOS, PAD, SPECIAL, UNKNOWN, Vocabulary, tokenise

MakeModel = Callable[..., DeeCap]
CONFIGS = Path(loop.__file__).parent / "configs"

# Words -------------------------------------------------------------------------------------------------------------


def test_a_vocabulary_keeps_words_seen_five_times_in_order_of_count() -> None:
    counts = {"rare": 4, "bird": 5, "ant": 5, "dog": 9, "the": 30}
    captions = [[word] for word, count in counts.items() for _ in range(count)]
    assert Vocabulary.build(captions).words == (*SPECIAL, "the", "dog", "ant", "bird")
    assert "rare" in Vocabulary.build(captions, least_count=4).words


def test_words_to_numbers_and_back() -> None:
    vocabulary = Vocabulary([*SPECIAL, "a", "dog", "runs"])
    assert len(vocabulary) == 7
    assert vocabulary.encode(["a", "dog", "flies"]) == [4, 5, UNKNOWN]
    assert vocabulary.decode([BOS, 4, UNKNOWN, 5, PAD, 6, EOS, 4]) == ["a", "dog", "runs"]
    words = ["dog", "runs", "a"]
    assert vocabulary.decode(vocabulary.encode(words)) == words


def test_a_mirrored_caption_swaps_left_and_right() -> None:
    vocabulary = Vocabulary([*SPECIAL, "left", "dog", "right", "leftmost"])
    told = vocabulary.encode(["left", "dog", "right", "leftmost"])
    # "rightmost" is not in this vocabulary: "leftmost" has nothing to become.
    assert vocabulary.decode(vocabulary.mirrored(told)) == ["right", "dog", "left", "leftmost"]
    assert vocabulary.mirrored(vocabulary.mirrored(told)) == told


@pytest.mark.parametrize("words", [[], ["a", *SPECIAL], [*SPECIAL, "a", "a"], list(SPECIAL[:3])])
def test_a_list_that_is_no_vocabulary_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        Vocabulary(words)


def test_raw_sentences_become_lower_case_words() -> None:
    words = ["a", "man's", "t-shirt", "2", "dogs", "and", "one", "ball"]
    assert tokenise('A man\'s T-shirt, 2 dogs -- and "one" ball.') == words


# Data --------------------------------------------------------------------------------------------------------------


def test_captions_begin_with_bos_and_end_with_eos_and_targets_are_the_next_inputs() -> None:
    captions = [[7, 8, 9], [5], [6, 7, 8, 9]]
    inputs, targets = pad_captions(captions, max_words=10)
    assert inputs.tolist() == [[BOS, 7, 8, 9, PAD], [BOS, 5, PAD, PAD, PAD], [BOS, 6, 7, 8, 9]]
    assert targets.tolist() == [[7, 8, 9, EOS, PAD], [5, EOS, PAD, PAD, PAD], [6, 7, 8, 9, EOS]]
    for row in range(3):
        for t in range(4):
            if targets[row, t] not in (EOS, PAD):
                assert targets[row, t] == inputs[row, t + 1]


def test_a_caption_cut_short_has_no_eos_to_learn() -> None:
    inputs, targets = pad_captions([[5, 6, 7, 8], [9, 9, 9], [4]], max_words=3)
    assert inputs.tolist() == [[BOS, 5, 6, 7], [BOS, 9, 9, 9], [BOS, 4, PAD, PAD]]
    assert targets.tolist() == [[5, 6, 7, PAD], [9, 9, 9, EOS], [4, EOS, PAD, PAD]]


def test_samples_are_padded_with_what_the_model_said_as_targets() -> None:
    inputs, targets = pad_samples([[5, EOS], [6, 7, 8]])
    assert inputs.tolist() == [[BOS, 5, PAD], [BOS, 6, 7]]
    assert targets.tolist() == [[5, EOS, PAD], [6, 7, 8]]


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in epoch_batches(10, 3, seed, epoch)]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert [len(batch) for batch in order(1, 2)] == [3, 3, 3]
    assert len({row for batch in order(1, 2) for row in batch}) == 9
    assert {row for epoch in range(30) for batch in order(1, epoch) for row in batch} == set(range(10))


def test_each_caption_is_picked_once_before_any_twice() -> None:
    vocabulary = Vocabulary([*SPECIAL, "left", "right", "a", "b", "c"])
    captions = [["left", "a"], ["b"], ["c"]]
    for seed in range(10):
        random = np.random.default_rng(seed)
        picked = [tuple(one) for one in pick_captions(captions, 5, vocabulary, False, random)]
        assert len(picked) == 5
        assert len(set(picked[:3])) == 3
        assert max(Counter(picked).values()) == 2
    mirrored = pick_captions(captions, 3, vocabulary, True, np.random.default_rng(0))
    assert sorted(map(tuple, mirrored)) == sorted(tuple(vocabulary.encode(c)) for c in [["right", "a"], ["b"], ["c"]])


def test_captions_are_read_in_karpathys_form(tmp_path: Path) -> None:
    images = [
        {"filename": "a.jpg", "split": "restval", "sentences": [{"tokens": ["a", "dog"], "raw": "ignored"}]},
        {"filename": "b.jpg", "split": "val", "sentences": [{"raw": "Two Cats."}, {"tokens": ["cats"]}]},
        {"filename": "c.jpg", "sentences": [{"raw": "One."}]},
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images}))
    photos = read_captions(path)
    assert [(photo.name, photo.split) for photo in photos] == [("a.jpg", "train"), ("b.jpg", "val"), ("c.jpg", "train")]
    assert [photo.captions for photo in photos] == [(("a", "dog"),), (("two", "cats"), ("cats",)), (("one",),)]


@pytest.mark.parametrize(
    "content",
    [
        b"not json",
        b"",
        b"[]",
        b"{}",
        b'{"images": []}',
        b'{"images": [{"filename": "a.jpg"}]}',
        b'{"images": [{"filename": "a.jpg", "sentences": [{}]}]}',
        b'{"images": 3}',
        b"\xff\xd8\xff\xe0\x00\x10JFIF",  # a photo in its place
    ],
)
def test_a_file_that_is_no_caption_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"captions\.json"):
        read_captions(path)


# The optimiser -----------------------------------------------------------------------------------------------------


class Same:
    """A random generator that always draws the same."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def exit_step(network: DeeCap, optimiser: torch.optim.Optimizer, seed: int, draw: float | None) -> list[int]:
    """One step of the exits' stage, the layers frozen as `draw` decides."""
    torch.manual_seed(seed)
    captions = torch.randint(len(SPECIAL), network.config.vocabulary_size, (4, 5)).tolist()
    features, boxes = torch.randn(2, 3, 6, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    batch = Batch(features, boxes, None, *pad_captions(captions, network.config.max_words))
    optimiser.zero_grad(set_to_none=True)
    exits_loss(network, batch, StageSettings("x", "exits", 1, 1e-2), np.random.default_rng(seed)).backward()
    frozen = [] if draw is None else freeze_layers(network, Same(draw))
    optimiser.step()
    return frozen


@pytest.mark.parametrize(("draw", "expected"), [(0.9, [1]), (0.6, [1, 2]), (0.3, [1, 2, 3]), (0.0, [1, 2, 3, 4])])
def test_a_frozen_layer_does_not_move_even_with_momentum(
    make_model: MakeModel, draw: float, expected: list[int]
) -> None:
    network = make_model("deecap", "average", decoder_layers=5)
    optimiser = make_optimiser(network, [], StageSettings("x", "exits", 1, 1e-2, weight_decay=0.1))
    for seed in range(2):
        exit_step(network, optimiser, seed, None)  # all layers gather momentum
    before = {name: value.clone() for name, value in network.named_parameters()}
    assert exit_step(network, optimiser, 2, draw) == expected
    for name, value in network.named_parameters():
        parts = name.split(".")
        stays = parts[0] == "decoder" and int(parts[1]) + 1 in expected
        assert torch.equal(value, before[name]) == stays, name


def test_layers_freeze_by_chances_from_1_to_0(make_model: MakeModel) -> None:
    assert freezing_chances(6) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert freezing_chances(1) == [0.0]
    network = make_model()  # four layers
    random = np.random.default_rng(0)
    drawn = Counter(layer for _ in range(2000) for layer in freeze_layers(network, random))
    assert [drawn[m] / 2000 for m in (1, 2, 3, 4)] == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0], abs=0.04)


def test_only_matrices_decay_and_each_part_has_its_rate() -> None:
    network = DeeCap(DeeCapConfig(20, 6, 16, 2, 24, 1, 2, exit_head=True))
    trunk = [torch.nn.Parameter(torch.zeros(3))]
    stage = StageSettings("x", "exits", 1, 0.5, trunk_learning_rate=0.1, backbone_learning_rate=0.2, weight_decay=0.03)
    optimiser = make_optimiser(network, trunk, stage)
    set_rate(optimiser, 0.25)  # half of the stage's
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimiser.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimiser.param_groups)
    for name, parameter in network.named_parameters():
        rate, decay = found.pop(id(parameter))
        assert rate == pytest.approx(0.25 if is_exit_part(name) else 0.1), name
        assert decay == (0.03 if parameter.ndim > 1 else 0.0), name
    assert list(found) == [id(trunk[0])]
    assert found[id(trunk[0])] == pytest.approx((0.05, 0.0))


def test_the_backbone_has_the_stages_rate_where_it_has_none_of_its_own() -> None:
    network = DeeCap(DeeCapConfig(20, 6, 16, 2, 24, 1, 2))
    optimiser = make_optimiser(network, [], StageSettings("x", "backbone", 1, 0.5))
    set_rate(optimiser, 0.3)
    assert {group["lr"] for group in optimiser.param_groups if group["params"]} == {0.3}


def test_the_rate_warms_up_and_falls_by_a_cosine() -> None:
    stage = StageSettings("x", "backbone", 5, 1.0, final_learning_rate=0.2, warmup_steps=10)
    rates = [rate_at(step, 10, stage) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[30] == pytest.approx(0.6)  # half way
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rate_at(50, 10, stage) == pytest.approx(0.2)
    assert rate_at(70, 10, stage) == pytest.approx(0.2)
    for step in (15, 41):
        share = (step - 10) / 40
        assert rates[step] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * share)) / 2)


def test_the_papers_rate_falls_by_a_tenth_every_five_epochs() -> None:
    stage = StageSettings("x", "exits", 25, 3e-5, decay_every=5, decay=0.9)
    for epoch, power in [(0, 0), (4, 0), (5, 1), (9, 1), (10, 2), (24, 4)]:
        for step in (epoch * 7, epoch * 7 + 6):
            assert rate_at(step, 7, stage) == pytest.approx(3e-5 * 0.9**power)


# The average -------------------------------------------------------------------------------------------------------


def test_the_average_is_the_moving_average_of_what_was_there() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    average = WeightAverage({"layer": layer}, decay=0.3)
    expected = layer.weight.detach().clone()
    for step in range(1, 8):
        with torch.no_grad():
            layer.weight.normal_()
        average.update()
        decay = min(0.3, step / (step + 10))  # rises from almost nothing
        expected = decay * expected + (1 - decay) * layer.weight.detach()
        torch.testing.assert_close(average.values["layer"]["weight"], expected)


def test_swapping_twice_puts_everything_back() -> None:
    torch.manual_seed(0)
    layers = {"a": torch.nn.Linear(3, 2), "b": torch.nn.LayerNorm(4)}
    average = WeightAverage(layers, decay=0.9)
    with torch.no_grad():
        layers["a"].weight.normal_()
    average.update()
    with torch.no_grad():
        layers["a"].weight.normal_()
    now = {key: value.clone() for key, value in layers["a"].state_dict().items()}
    kept = {key: value.clone() for key, value in average.values["a"].items()}
    average.swap()
    assert all(torch.equal(value, kept[key]) for key, value in layers["a"].state_dict().items())
    assert not torch.equal(layers["a"].weight, now["weight"])
    average.swap()
    assert all(torch.equal(value, now[key]) for key, value in layers["a"].state_dict().items())
    assert all(torch.equal(value, kept[key]) for key, value in average.values["a"].items())


def test_an_average_goes_on_from_what_was_saved() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    first, second = WeightAverage({"layer": layer}, 0.9), WeightAverage({"layer": layer}, 0.9)
    with torch.no_grad():
        layer.weight.normal_()
    first.update()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        layer.weight.normal_()
    first.update()
    second.update()
    assert torch.equal(first.values["layer"]["weight"], second.values["layer"]["weight"])


# Words that left ---------------------------------------------------------------------------------------------------


def captions_of(count: int, length: int) -> Batch:
    """All that matters here: how many captions there are, and of how many words."""
    words = torch.full((count, length), 5)
    return Batch(torch.empty(0), torch.empty(0), None, words, words)


def test_no_word_has_left_where_the_share_is_0() -> None:
    left = words_that_left(captions_of(50, 20), 0.0, np.random.default_rng(0))
    assert left.dtype == torch.bool
    assert left.shape == (50, 20)
    assert not left.any()


def test_words_have_left_at_rates_that_vary_by_caption() -> None:
    left = words_that_left(captions_of(600, 400), 1.0, np.random.default_rng(0)).double()
    rates = left.mean(1).numpy()
    # Even over 0..1: a tenth of the captions in each tenth.
    assert np.histogram(rates, bins=10, range=(0, 1))[0] / 600 == pytest.approx([0.1] * 10, abs=0.05)
    # Within a caption each word leaves for itself: two halves of it have the rate, and neighbours nothing more.
    first, second = left[:, :200].mean(1).numpy(), left[:, 200:].mean(1).numpy()
    assert np.abs(first - second).max() < 5 * math.sqrt(0.25 / 200 * 2)
    pairs = (left[:, 1:] * left[:, :-1]).mean(1).numpy()
    assert pairs == pytest.approx(rates**2, abs=0.1)


def test_only_the_share_of_captions_has_words_that_left() -> None:
    left = words_that_left(captions_of(2000, 200), 0.3, np.random.default_rng(0))
    some = left.any(1).double().mean().item()
    assert some == pytest.approx(0.3, abs=0.04)
    assert left[left.any(1)].double().mean().item() == pytest.approx(0.5, abs=0.05)  # of those, as ever


def test_words_that_left_depend_on_the_generator_alone() -> None:
    first, again, other = (words_that_left(captions_of(20, 9), 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_steps_with_copied_states_teach_the_words_and_the_exit_head() -> None:
    """From one batch learned by heart: the loss falls, and the head follows entropies that left its first guess."""
    torch.manual_seed(0)
    sizes = DeeCapConfig(20, 6, 16, 2, 24, 1, 3, max_words=6, dropout=0.0, imitation_width=4, exit_head=True)
    network = DeeCap(sizes)
    captions = torch.randint(len(SPECIAL), 20, (8, 5)).tolist()
    batch = Batch(torch.randn(4, 3, 6), torch.rand(4, 3, 4), None, *pad_captions(captions, 6))
    stage = StageSettings("x", "exits", 1, 1e-2, copied_states=1.0, distillation=1.0)
    optimiser, random = make_optimiser(network, [], stage), np.random.default_rng(0)
    losses = []
    for _ in range(80):
        optimiser.zero_grad()
        loss = exits_loss(network, batch, stage, random)
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.exit_head.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] / 2
    with torch.no_grad():
        logits, states, _ = network(batch.features, batch.boxes, batch.inputs)
        taught = exit_head_loss(network, states, logits, batch.targets).item()
        network.exit_head = ExitHead(16, 3)
        untaught = exit_head_loss(network, states, logits, batch.targets).item()
    assert taught < untaught / 3


# Settings ----------------------------------------------------------------------------------------------------------

TINY = """
name = "tiny"
seed = 1
least_count = 1
average_decay = 0.5
views = 2

[data]
captions = "captions.json"
photos = "photos"
region_features = "regions"

[model]
width = 16
heads = 2
feed_forward = 16
encoder_layers = 1
decoder_layers = 3
max_words = 6
dropout = 0.1
imitation_width = 4
exit_head = true

[[stage]]
name = "words"
kind = "backbone"
epochs = 1
learning_rate = 1e-2
batch_images = 4
captions_per_image = 3
shallow_exit_weight = 0.4
patience = 9

[[stage]]
name = "reward"
kind = "self_critical"
epochs = 1
learning_rate = 1e-3
batch_images = 4
captions_per_image = 3

[[stage]]
name = "leaving"
kind = "exits"
epochs = 1
learning_rate = 1e-2
batch_images = 4
captions_per_image = 3
distillation = 1.0
copied_states = 0.5
lambda = 0.25
"""


def settings_of(folder: Path, text: str) -> TrainSettings:
    path = folder / "tiny.toml"
    path.write_text(text)
    return read_settings(path)


def test_settings_are_read_as_written(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, TINY)
    assert [(stage.name, stage.kind) for stage in settings.stages] == [
        ("words", "backbone"),
        ("reward", "self_critical"),
        ("leaving", "exits"),
    ]
    assert settings.stages[2].lambda_ == 0.25
    assert settings.stages[0].lambda_ == 0.5
    assert [stage.copied_states for stage in settings.stages] == [0.0, 0.0, 0.5]
    assert settings.data.region_features == "regions"
    assert settings.model["width"] == 16
    assert settings.least_count == 1


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "tiny"', 'name = "tiny"\ncolour = 1', "colour"),
        ('photos = "photos"', 'photos = "photos"\ncolour = 1', "colour"),
        ("dropout = 0.1", "dropout = 0.1\ncolour = 1", "colour"),
        ("lambda = 0.25", "colour = 1", "colour"),
        ("lambda = 0.25", "lambda_ = 0.25", "lambda_"),
        ('kind = "exits"', 'kind = "exit"', "kind"),
        ('captions = "captions.json"', "", "captions"),
        ("epochs = 1", "", "epochs"),
        ("seed = 1", "", "seed"),
        ("seed = 1", "seed = ", "tiny.toml"),
        ("[[stage]]", "[[stages]]", "stage"),
        # One sample has no others to be better than: the mean of none is not a number.
        (
            "learning_rate = 1e-3\nbatch_images = 4\ncaptions_per_image = 3",
            "learning_rate = 1e-3\ncaptions_per_image = 1",
            "captions_per_image",
        ),
        # The second stage of a name would be taken for done.
        ('name = "reward"', 'name = "words"', "words"),
    ],
)
def test_mistakes_in_settings_are_named(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in TINY
    with pytest.raises(ValueError, match=told):
        settings_of(tmp_path, TINY.replace(old, new))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_that_ships_is_whole(path: Path) -> None:
    settings = read_settings(path)
    assert settings == find_settings(Path(path.stem))
    assert settings.name == path.stem
    config = DeeCapConfig(vocabulary_size=100, feature_width=64, **settings.model)
    assert config.decoder_layers == 6
    assert settings.stages[-1].kind == "exits"
    if path.stem.startswith("paper-"):
        sizes = (config.width, config.feed_forward, config.heads, config.encoder_layers, config.max_words)
        assert sizes == (512, 2048, 8, 6, 20)
        last = settings.stages[-1]
        assert (last.epochs, last.learning_rate, last.decay_every, last.decay) == (25, 3e-5, 5, 0.9)


def test_the_three_configurations_ship() -> None:
    assert {path.stem for path in CONFIGS.glob("*.toml")} >= {"flickr8k", "paper-coco", "paper-flickr30k"}


def test_a_configuration_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(FileNotFoundError, match=r"flickr9k.*flickr8k"):
        find_settings(Path("flickr9k"))


# Sampling and self-critical training -------------------------------------------------------------------------------


def memory_of(network: DeeCap, images: int = 1, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return network.encode(
            torch.randn(images, 3, network.config.feature_width, dtype=torch.float64),
            torch.rand(images, 3, 4, dtype=torch.float64),
        )


def test_samples_are_drawn_as_the_model_says(make_model: MakeModel) -> None:
    network = make_model(max_words=2)
    memory, count = memory_of(network), 4000
    samples = sample_captions(network, memory, count, generator=torch.Generator().manual_seed(0))

    def chances(prefix: list[int]) -> np.ndarray:
        with torch.no_grad():
            states = network.hidden_states(memory, torch.tensor([[BOS, *prefix]]))
            return emission_logits(network, states[-1][0, -1]).softmax(-1).numpy()

    def agree(words: list[int], expected: np.ndarray) -> None:
        found = np.bincount(words, minlength=len(expected)) / len(words)
        assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / len(words)) + 1e-9).all()
        assert np.abs(expected - 1 / len(expected)).max() > 0.05  # a uniform draw would be seen

    agree([sample[0] for sample in samples], chances([]))
    first, _ = Counter(sample[0] for sample in samples if sample[0] != EOS).most_common(1)[0]
    agree([sample[1] for sample in samples if sample[0] == first], chances([first]))


def test_samples_end_with_eos_or_run_to_the_longest(make_model: MakeModel) -> None:
    network = make_model(max_words=5)
    with torch.no_grad():
        network.head_bias[EOS] += 4.0
    samples = sample_captions(network, memory_of(network, images=3), 50, generator=torch.Generator().manual_seed(0))
    assert len(samples) == 150
    for sample in samples:
        assert not set(sample) & {PAD, BOS, UNKNOWN}
        assert EOS not in sample[:-1]
        assert sample[-1] == EOS or len(sample) == 5
    assert {sample[-1] == EOS for sample in samples} == {True, False}
    again = sample_captions(network, memory_of(network, images=3), 50, generator=torch.Generator().manual_seed(0))
    assert again == samples


def test_samples_of_one_image_stand_side_by_side(make_model: MakeModel) -> None:
    network = make_model(max_words=1, seed=3)
    memory = memory_of(network, images=2, seed=3)
    samples = sample_captions(network, memory, 3000, generator=torch.Generator().manual_seed(0))
    for image in range(2):
        with torch.no_grad():
            states = network.hidden_states(memory[image : image + 1], torch.tensor([[BOS]]))
            expected = emission_logits(network, states[-1][0, -1]).softmax(-1).numpy()
        words = [sample[0] for sample in samples[image * 3000 : (image + 1) * 3000]]
        assert np.bincount(words, minlength=len(expected)) / 3000 == pytest.approx(expected, abs=0.05)


def test_advantages_of_one_photo_sum_to_nothing_and_favour_the_better() -> None:
    references = {3: [[5, 6, 7, 8], [5, 6, 9]], 8: [[10, 11, 12], [10, 11]]}
    reward = CiderReward(references)
    samples = [[5, 6, 7, 8, EOS], [5, 11, EOS], [12, EOS], [10, 11, 12, EOS], [10, 11, 12], [5, EOS]]
    advantages, mean = reward.advantages([3, 8], samples)
    assert advantages.shape == (6,)
    assert advantages.reshape(2, 3).sum(1) == pytest.approx([0.0, 0.0], abs=1e-9)
    assert advantages[0] == max(advantages[:3])
    assert advantages[3] > advantages[4] > advantages[5]  # ending well is rewarded too
    scores = [
        reward.scorer.score(one, reward.prepared[row]) for one, row in zip(samples, [3, 3, 3, 8, 8, 8], strict=True)
    ]
    assert mean == pytest.approx(100 * np.mean(scores))
    assert advantages[0] == pytest.approx(scores[0] - (scores[1] + scores[2]) / 2)


def test_the_gradient_makes_the_better_sample_likelier(make_model: MakeModel) -> None:
    network = make_model()
    with torch.no_grad():
        network.head_bias[UNKNOWN] += 2.0  # likely, and never drawn: the chances are those without it
    samples = [[5, 6, EOS], [7, 8, 9, 10]]
    features, boxes = torch.randn(1, 3, 6, dtype=torch.float64), torch.rand(1, 3, 4, dtype=torch.float64)
    batch = Batch(features, boxes, None, *pad_samples(samples))

    def log_p() -> list[float]:
        logits, _, _ = network(features, boxes, batch.inputs)
        drawn_by = logits[-1].index_fill(-1, torch.tensor([PAD, BOS, UNKNOWN]), -torch.inf)
        picked = drawn_by.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
        return picked.masked_fill(batch.targets == PAD, 0.0).sum(1).tolist()

    before = log_p()
    stage = StageSettings("x", "self_critical", 1, 1e-3)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = self_critical_loss(network, batch, advantages, stage, np.random.default_rng(0))
    assert loss.item() == pytest.approx(-(before[0] - before[1]) / 7, rel=1e-5)  # mean over the seven words
    loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    after = log_p()
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_self_critical_steps_raise_the_reward() -> None:
    torch.manual_seed(0)
    network = DeeCap(DeeCapConfig(12, 4, 16, 2, 24, 1, 2, max_words=5, dropout=0.0, exits="final"))
    reward = CiderReward({0: [[4, 5, 6], [4, 5, 7]], 1: [[8, 9, 10, 11], [8, 9, 11]]})
    features, boxes = torch.randn(2, 3, 4), torch.rand(2, 3, 4)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    stage, random, rewards = StageSettings("x", "self_critical", 1, 1e-2), np.random.default_rng(0), []
    for _ in range(50):
        with torch.no_grad():
            memory = network.encode(features, boxes)
        samples = sample_captions(network, memory, 10)
        advantages, mean = reward.advantages([0, 1], samples)
        rewards.append(mean)
        optimiser.zero_grad()
        batch = Batch(features, boxes, None, *pad_samples(samples))
        self_critical_loss(network, batch, torch.from_numpy(advantages).float(), stage, random).backward()
        optimiser.step()
    assert np.mean(rewards[-5:]) > 2 * np.mean(rewards[:5]) + 20


# Kept regions ------------------------------------------------------------------------------------------------------


def test_regions_of_one_trunk_are_computed_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    bottom = np.random.default_rng(0).normal(size=(2, 2, 120, 18, 18)).astype(np.float16)
    photos, trunk = PhotoRows(("one.jpg", "two.jpg"), (bottom,)), Trunk().eval()
    first = KeptRegions.through_trunk(photos, trunk, tmp_path, batch=1)([0, 1, 1], [0, 0, 1])[0]
    with torch.no_grad():
        assert torch.allclose(first[2:], cells(trunk.top(photos.bottom([1], [1]))), rtol=1e-2, atol=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(Trunk, "top", None)  # not called
        again = KeptRegions.through_trunk(photos, trunk, tmp_path)([0, 1, 1], [0, 0, 1])[0]
    assert torch.equal(first, again)
    with torch.no_grad():
        next(iter(trunk.head.parameters())).mul_(2.0)
    assert not torch.equal(KeptRegions.through_trunk(photos, trunk, tmp_path)([0], [0])[0], first[:1])
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_regions_seen_by_an_extractor_are_padded_masked_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TwoThenThree:
        """An extractor that finds two regions in a photo and three in its mirror image."""

        most_regions, feature_width = 3, 4

        def __init__(self, *_: object) -> None: ...

        def look_at_pixels(self, pixels: np.ndarray) -> list[Regions]:
            counts = [2, 3][: len(pixels)]
            return [Regions(np.full((n, 4), n / 10, np.float32), np.full((n, 4), n, np.float32)) for n in counts]

    for name in ("one.png", "two.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    photos = PhotoRows(("one.png", "two.png"), (np.zeros((2, 2, 1), np.float16),))
    sources = [PhotoSource(tmp_path, photos.names)]
    extractor = tmp_path / "extractor.onnx"
    extractor.write_bytes(b"made up")

    def keep() -> KeptRegions:
        return KeptRegions.through_extractor(photos, sources, extractor, tmp_path, 1)

    with monkeypatch.context() as patch:
        patch.setattr("model.training.regions.Extractor", TwoThenThree)
        keep()
        patch.setattr(TwoThenThree, "look_at_pixels", None)  # not called again
        kept = keep()
    features, boxes, mask = kept([0, 1], [0, 1])
    assert features[:, :, 0].tolist() == [[2, 2, 0], [3, 3, 3]]
    assert boxes.shape == (2, 3, 4)
    assert mask is not None
    assert mask.tolist() == [[True, True, False], [True, True, True]]
    assert kept([0, 1], [0, 0])[2] is None  # as many in each: nothing to mask


def test_what_reads_more_of_a_region_starts_from_what_read_less() -> None:
    own = {"feature_in.weight": torch.ones(2, 5), "feature_norm.weight": torch.ones(5), "head_bias": torch.ones(3)}
    saved = {"feature_in.weight": torch.full((2, 3), 7.0), "feature_norm.weight": torch.full((3,), 2.0)}
    saved |= {"head_bias": torch.ones(4), "gone": torch.ones(1)}
    found = weights_that_fit(saved, own)
    assert set(found) == {"feature_in.weight", "feature_norm.weight"}
    assert found["feature_in.weight"].tolist() == [[7, 7, 7, 0, 0]] * 2
    assert found["feature_norm.weight"].tolist() == [2, 2, 2, 1, 1]


# Region files ------------------------------------------------------------------------------------------------------


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


WHOLE = npz(features=np.ones((2, 5), np.float32), boxes=np.zeros((2, 4), np.float32))


def test_region_files_are_padded_to_the_most_regions(tmp_path: Path) -> None:
    for name, count in [("a", 2), ("b", 4)]:
        boxes = np.full((count, 4), 0.5, np.float16)
        (tmp_path / f"{name}.npz").write_bytes(npz(features=np.full((count, 5), count, np.float16), boxes=boxes))
    files = RegionFiles(tmp_path, ["a.jpg", "b.jpg"])
    assert files.feature_width == 5
    features, boxes, mask = files([1, 0])
    assert features.shape == (2, 4, 5)
    assert features.dtype == torch.float32
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert (features[0] == 4).all()
    assert (features[1, :2] == 2).all()
    assert (boxes[1, :2] == 0.5).all()


def test_photos_without_a_region_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(WHOLE)
    with pytest.raises(FileNotFoundError, match=r"2 photos.*b\.npz"):
        RegionFiles(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no array at all",
        WHOLE[: len(WHOLE) // 2],
        npy(np.ones((2, 5))),
        npz(features=np.ones((2, 5))),
        npz(features=np.ones((2, 5)), boxes=np.ones((3, 4))),
        npz(features=np.ones(5), boxes=np.ones((5, 4))),
        npz(features=np.array([object()] * 2), boxes=np.ones((2, 4))),
    ],
    ids=["empty", "text", "cut", "npy", "no boxes", "other boxes", "flat", "pickled"],
)
def test_a_region_file_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz"):
        RegionFiles(tmp_path, ["a.jpg"])


# Whole runs --------------------------------------------------------------------------------------------------------

COLOURS = ("red", "green", "blue")
SHAPES = ("circle", "square")
SPLITS = ["train"] * 9 + ["val"] * 3


def write_captions(folder: Path, splits: list[str] = SPLITS) -> list[tuple[str, int, int]]:
    """`captions.json`, and (name, colour, shape) of each photo."""
    drawn = [(f"{number}.png", number % 3, number // 3 % 2) for number in range(len(splits))]
    images = []
    for (name, colour, shape), split in zip(drawn, splits, strict=True):
        told = (COLOURS[colour], SHAPES[shape])
        texts = ["a {} {}", "one {} {} here", "there is a {} {}"]
        images.append({"filename": name, "split": split, "sentences": [{"raw": text.format(*told)} for text in texts]})
    (folder / "captions.json").write_text(json.dumps({"images": images}))
    return drawn


def write_data(folder: Path, splits: list[str] = SPLITS) -> Path:
    """Captions, and region features that tell colour and shape."""
    (folder / "regions").mkdir(parents=True)
    for name, colour, shape in write_captions(folder, splits):
        features = np.random.default_rng(colour).normal(size=(2 + shape, 5)) * 0.1
        features[:, colour] += 1.0
        features[:, 3 + shape] += 1.0
        boxes = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (len(features), 1))
        (folder / "regions" / f"{Path(name).stem}.npz").write_bytes(npz(features=features, boxes=boxes))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def lines(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def epochs(work: Path, key: str = "val_cider") -> list[tuple[str, int]]:
    return [(line["stage"], line["epoch"]) for line in lines(work) if key in line]


def train(text: str, data: Path, work: Path) -> Trainer:
    trainer = Trainer(settings_of(data, text), data, work, work)
    trainer.run()
    return trainer


def test_a_run_goes_through_its_stages_and_then_has_nothing_more_to_do(data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    trainer = train(TINY, data, work)
    stages = ["words", "reward", "leaving"]
    assert epochs(work) == epochs(work, "seconds") == [(stage, 1) for stage in stages]
    for line in lines(work):
        if "seconds" in line:
            assert math.isfinite(line["loss"])
            assert line["captions_per_s"] > 0
            assert 0 < line["share_of_peak"] < 1
            assert line["reward"] >= 0 if line["stage"] == "reward" else line["reward"] == 0
        elif "signature" in line:
            assert line["stage"] == "reward"
            assert line["signature"] == "STANDARD_wInit+Cider-D[n4,s6.0]+average[nspi3]+1.0.0"
        else:
            assert line["val_cider"] >= 0
            assert all(isinstance(sample, str) for sample in line["samples"])
    for stage in stages:
        state = torch.load(work / f"{stage}.pt", weights_only=True)
        assert state["vocabulary"] == list(trainer.vocabulary.words)
        assert all(torch.isfinite(value).all() for value in state["model"].values())
    last = torch.load(work / "leaving.pt", weights_only=True)["model"]
    assert all(torch.equal(value, last[name]) for name, value in trainer.model.state_dict().items())

    log, files = (work / "log.jsonl").read_bytes(), sorted(path.name for path in work.iterdir())
    again = train(TINY, data, work)
    assert (work / "log.jsonl").read_bytes() == log
    assert sorted(path.name for path in work.iterdir()) == files
    assert all(torch.equal(value, last[name]) for name, value in again.model.state_dict().items())


def test_a_run_ends_with_the_stage_that_it_is_told_and_goes_on_from_there(data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    trainer = Trainer(settings_of(data, TINY), data, work, work)
    with pytest.raises(ValueError, match=r"no stage 'word', but words, reward, leaving"):
        trainer.run("word")
    trainer.run("words")
    assert epochs(work) == [("words", 1)]
    train(TINY, data, work)
    assert epochs(work) == [("words", 1), ("reward", 1), ("leaving", 1)]


def test_samples_are_learned_from_by_the_chances_that_they_were_drawn_by(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training: dict[str, set[bool]] = {}
    for name in ("self_critical_loss", "sample_captions", "exits_loss"):
        whole = getattr(loop, name)

        def watched(network: DeeCap, *others: Any, name: str = name, whole: Any = whole) -> Any:
            training.setdefault(name, set()).add(network.training)
            return whole(network, *others)

        monkeypatch.setattr(loop, name, watched)
    train(TINY, data, tmp_path / "work")
    assert training == {"self_critical_loss": {False}, "sample_captions": {False}, "exits_loss": {True}}


def test_each_stage_moves_what_it_is_for(data: Path, tmp_path: Path) -> None:
    frozen = TINY.replace("lambda = 0.25", "freeze_backbone = true")
    work = tmp_path / "work"
    trainer = Trainer(settings_of(data, frozen), data, work, work)
    states = [{name: value.clone() for name, value in trainer.model.state_dict().items()}]
    trainer.run()
    states += [torch.load(work / f"{stage}.pt", weights_only=True)["model"] for stage in ("words", "reward", "leaving")]
    for stage, (before, after) in zip(("words", "reward", "leaving"), pairwise(states), strict=True):
        for name in before:
            moves = is_exit_part(name) == (stage == "leaving")
            assert torch.equal(before[name], after[name]) != moves, (stage, name)


THREE_EPOCHS = TINY.replace("epochs = 1", "epochs = 3", 1)


class Killed(BaseException):
    """As a signal would be: no handler for errors catches it."""


def killed_at(patch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """The training loop's `name` raises at its `call`-th call."""
    whole, calls = getattr(loop, name), iter(range(1, 1000))

    def counted(*args: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return whole(*args, **named)

    patch.setattr(loop, name, counted)


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("uninterrupted")
    train(THREE_EPOCHS, data, work)
    return work


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("backbone_loss", 4),  # two steps an epoch: in the middle of epoch 2
        ("backbone_loss", 1),
        ("mean_cider", 2),  # trained for the epoch, not yet validated
        ("self_critical_loss", 2),
        ("exits_loss", 2),
    ],
)
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(
    data: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    work = tmp_path / "work"
    with monkeypatch.context() as patch:
        killed_at(patch, name, call)
        with pytest.raises(Killed):
            train(THREE_EPOCHS, data, work)
    train(THREE_EPOCHS, data, work)
    once = [("words", 1), ("words", 2), ("words", 3), ("reward", 1), ("leaving", 1)]
    assert epochs(work) == epochs(uninterrupted) == once
    if name != "mean_cider":  # an epoch that was trained but not yet validated is trained again, and says so
        assert epochs(work, "seconds") == once
    for stage in ("words", "reward", "leaving"):
        found = torch.load(work / f"{stage}.pt", weights_only=True)["model"]
        expected = torch.load(uninterrupted / f"{stage}.pt", weights_only=True)["model"]
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), stage


def test_a_run_may_start_from_a_stage_of_another(
    data: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a baseline does, whose exits are others on the same backbone."""
    last = TINY[: TINY.index("[[stage]]")] + TINY[TINY.index('[[stage]]\nname = "leaving"') :]
    text = last.replace("seed = 1", 'seed = 2\nstarts_from = "first/words"').replace(
        "[model]", '[model]\nexits = "plain"'
    )
    work = tmp_path / "second"
    with pytest.raises(FileNotFoundError, match="train first first, --until words is enough"):
        train(text, data, work)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "words.pt").write_bytes((uninterrupted / "words.pt").read_bytes())
    starts = torch.load(uninterrupted / "words.pt", weights_only=True)["model"]
    seen: list[bool] = []
    whole = loop.exits_loss

    def first_look(network: DeeCap, *others: Any) -> torch.Tensor:
        if not seen:
            seen.append(all(torch.equal(value, starts[name]) for name, value in network.state_dict().items()))
        return whole(network, *others)

    monkeypatch.setattr(loop, "exits_loss", first_look)
    train(text, data, work)
    assert seen == [True]
    assert epochs(work) == [("leaving", 1)]


def test_training_ends_early_without_a_better_epoch_and_keeps_the_best(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: Iterator[float] = iter([10.0, 30.0, 20.0, 29.0, 99.0, 99.0])
    monkeypatch.setattr(loop, "mean_cider", lambda *_: next(scores))
    only = TINY[: TINY.index('[[stage]]\nname = "reward"')]
    text = only.replace("epochs = 1", "epochs = 9").replace("patience = 9", "patience = 2")
    train(text, data, tmp_path)
    assert [line["val_cider"] for line in lines(tmp_path) if "val_cider" in line] == [10.0, 30.0, 20.0, 29.0]
    assert torch.load(tmp_path / "words.pt", weights_only=True)["progress"]["best_epoch"] == 1


def test_training_teaches(data: Path, tmp_path: Path) -> None:
    only = TINY[: TINY.index('[[stage]]\nname = "reward"')].replace("dropout = 0.1", "dropout = 0.0")
    train(only.replace("epochs = 1", "epochs = 25"), data, tmp_path)
    losses = [line["loss"] for line in lines(tmp_path) if "seconds" in line]
    assert losses[-1] < losses[0] / 2
    assert max(line["val_cider"] for line in lines(tmp_path) if "val_cider" in line) > 100


def test_missing_data_is_named(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    settings = settings_of(data, TINY)
    (data / "regions" / "4.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"4\.npz"):
        Trainer(settings, data, tmp_path / "work", tmp_path)
    (data / "captions.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"captions\.json"):
        Trainer(settings, data, tmp_path / "work", tmp_path)
    (data / "captions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"captions\.json"):
        Trainer(settings, data, tmp_path / "work", tmp_path)


@pytest.mark.parametrize(
    ("splits", "told"), [(["train"] * 12, "val"), (["val"] * 12, "train"), (["train"] * 3 + ["val"] * 3, "batch")]
)
def test_data_that_cannot_be_trained_on_is_refused_at_once(tmp_path: Path, splits: list[str], told: str) -> None:
    data = write_data(tmp_path / "data", splits)
    with pytest.raises(ValueError, match=told):
        Trainer(settings_of(data, TINY), data, tmp_path / "work", tmp_path)


def test_region_files_leave_no_trunk_to_tune(data: Path, tmp_path: Path) -> None:
    text = TINY.replace("shallow_exit_weight = 0.4", "tune_trunk_from = 0\ntrunk_learning_rate = 1e-3")
    with pytest.raises(ValueError, match="region_features"):
        Trainer(settings_of(data, text), data, tmp_path, tmp_path)


def write_photos(data: Path) -> str:
    """Three photos to train on and one to validate, with captions and boxes; the configuration that reads them.

    The upper trunk learns on parts of photos, also to tell what is in the boxes; then exits, on own captions and int8.
    """
    (data / "photos").mkdir(parents=True)
    drawn = write_captions(data, ["train"] * 3 + ["val"])
    for name, colour, shape in drawn:
        image = Image.new("RGB", (224, 224), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == 0 else draw.rectangle)((40, 40, 180, 180), fill=COLOURS[colour])
        image.save(data / "photos" / name)
    boxes = {f"photos/{name}": [[0.2, 0.2, 0.8, 0.8, shape, 0.9]] for name, _, shape in drawn[1:]}
    (data / "boxes.json").write_text(json.dumps({"classes": SHAPES, "boxes": boxes}))
    text = TINY.replace('region_features = "regions"', "").replace("batch_images = 4", "batch_images = 3")
    text = text.replace("[data]", '[data]\nboxes = "boxes.json"')
    tuned = "tune_trunk_from = 0\ntrunk_learning_rate = 1e-2\nsmallest_window = 0.7\ncell_classes = 0.5"
    text = text.replace("shallow_exit_weight = 0.4", f"{tuned}\nhidden_regions = 0.3")
    return text.replace("lambda = 0.25", "own_captions = 1.0\nquantised_extractor = true")


def test_a_killed_run_goes_on_with_its_trunk_and_what_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    start = Trunk().eval().state_dict()

    def same_trunk() -> Trunk:
        trunk = Trunk().eval()
        trunk.load_state_dict(start)
        return trunk

    monkeypatch.setattr(photo_regions, "imagenet_trunk", same_trunk)
    data = tmp_path / "data"
    text = write_photos(data).replace("epochs = 1", "epochs = 2", 1)

    def run(work: str) -> None:
        Trainer(settings_of(data, text), data, tmp_path / work, tmp_path / "features").run("words")

    run("whole")
    with monkeypatch.context() as patch:
        killed_at(patch, "backbone_loss", 2)  # one step an epoch
        with pytest.raises(Killed):
            run("killed")
    run("killed")
    expected, found = (torch.load(tmp_path / work / "words.pt", weights_only=True) for work in ("whole", "killed"))
    for name in ("model", "trunk", "cell_classes"):
        assert all(torch.equal(value, found[name][key]) for key, value in expected[name].items()), name
    logged = [line["cells_loss"] for line in lines(tmp_path / "whole") if "seconds" in line]
    assert len(logged) == 2
    assert all(value > 0 for value in logged)
    assert (expected["cell_classes"]["classifier.bias"] + math.log(99)).abs().max() > 1e-3  # it learned

    boxes = json.loads((data / "boxes.json").read_text())
    (data / "boxes.json").write_text(json.dumps({**boxes, "classes": list(reversed(SHAPES))}))
    with pytest.raises(ValueError, match="other classes"):
        run("killed")
    (data / "boxes.json").write_text(json.dumps({**boxes, "boxes": {}}))
    with pytest.raises(ValueError, match="none of the photos"):
        run("none")


def test_photos_become_a_bundle_that_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From photos: kept features, the upper trunk tuned, the model's own captions, int8 regions, a bundle."""
    monkeypatch.setattr(photo_regions, "imagenet_trunk", lambda: Trunk().eval())
    data, work = tmp_path / "data", tmp_path / "work"
    text = write_photos(data)
    settings = settings_of(tmp_path, text)
    with pytest.raises(FileNotFoundError, match="not finished"):
        write_bundle(settings, work, tmp_path / "bundle")
    trainer = Trainer(settings, data, work, tmp_path / "features")
    assert trainer.regions.trunk is not None
    before = {name: value.clone() for name, value in trainer.regions.trunk.state_dict().items()}
    trainer.run()
    bottom = tuple(
        name for name in before if name.startswith("stem") or ("blocks" in name and int(name.split(".")[1]) < 15)
    )
    for name, value in trainer.regions.trunk.state_dict().items():
        assert torch.equal(value, before[name]) == (name in bottom), name
    own = json.loads((work / "leaving.own.json").read_text())
    assert set(own) == {"0.png", "1.png", "2.png"}
    assert all(1 <= len(captions) <= KEPT for captions in own.values())

    write_bundle(settings, work, tmp_path / "bundle")
    assert (tmp_path / "bundle" / EXTRACTOR).read_bytes() == (work / EXTRACTOR).read_bytes()
    assert trainer.regions.kept is not None
    captioner = Captioner.load(tmp_path / "bundle", "cpu")
    with Image.open(data / "photos" / "0.png") as image:
        regions = captioner.look(image)
    learned_on = trainer.regions.kept([0], [0])[0].numpy()
    assert np.linalg.norm(regions.features - learned_on) < 0.01 * np.linalg.norm(learned_on)  # kept in float16
    caption = captioner.describe(regions, "full")
    assert {step.exit_layer for step in caption.steps} == {3}
    assert len(caption.words) <= 6
