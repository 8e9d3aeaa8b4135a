"""The captions that a model makes for itself: what its samples agree on, and files that a stop does not lose."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.decoding.search import greedy_search
from model.deecap import DeeCap
from model.evaluation.cider import CiderD
from model.exits import ExitPolicy
from model.training import own_captions
from model.training.own_captions import KEPT, TEMPERATURE, agreed_captions, beam_captions, made_once, most_agreed
from model.training.sampling import sample_captions
from model.vocabulary import EOS

MakeModel = Callable[..., DeeCap]

CORPUS = [[[4, 5, 6, EOS], [4, 5, 7, EOS]], [[8, 9, 10, EOS]], [[5, 9, 11, EOS], [6, 6, 7, EOS]], [[10, 11, EOS]]]


def memory_of(network: DeeCap, images: int) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return network.encode(
            torch.randn(images, 3, network.config.feature_width, dtype=torch.float64),
            torch.rand(images, 3, 4, dtype=torch.float64),
        )


def test_the_most_agreed_has_the_best_mean_score_with_every_sample() -> None:
    random, scorer = np.random.default_rng(0), CiderD(CORPUS)
    for _ in range(30):
        samples = [[*random.integers(4, 8, random.integers(1, 6)).tolist(), EOS] for _ in range(12)]
        ranked = most_agreed(samples, scorer)

        def mean_score(caption: list[int], samples: list[list[int]] = samples) -> float:
            return float(np.mean([scorer.score(caption, scorer.prepare([other])) for other in samples]))

        scores = [mean_score(caption) for caption in ranked]
        assert scores == sorted(scores, reverse=True)
        assert sorted(map(tuple, ranked)) == sorted({tuple(sample) for sample in samples})


def test_what_was_drawn_most_often_of_captions_with_nothing_in_common_is_first() -> None:
    samples = [[8, 9, EOS], [4, 5, EOS], [6, 7, EOS], [4, 5, EOS]]
    assert most_agreed(samples, CiderD(CORPUS))[0] == [4, 5, EOS]


def test_agreed_captions_are_the_samples_most_agreed_on(make_model: MakeModel) -> None:
    network, scorer = make_model(max_words=4), CiderD(CORPUS)
    memory = memory_of(network, images=3)
    found = agreed_captions(network, memory, None, 20, scorer, torch.Generator().manual_seed(7))
    drawn = sample_captions(network, memory, 20, None, torch.Generator().manual_seed(7), TEMPERATURE)
    for image, captions in enumerate(found):
        own = drawn[20 * image : 20 * (image + 1)]
        assert captions == [[word for word in caption if word != EOS] for caption in most_agreed(own, scorer)[:KEPT]]
        assert 1 <= len(captions) <= KEPT
    assert found == agreed_captions(network, memory, None, 20, scorer, torch.Generator().manual_seed(7))
    assert found != agreed_captions(network, memory, None, 20, scorer, torch.Generator().manual_seed(8))


@pytest.mark.parametrize("no_repeats", [False, True])
def test_where_captions_are_kept_from_repeating_agreed_ones_do_only_where_all_do(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, no_repeats: bool
) -> None:
    network = make_model(max_words=4, no_repeats=no_repeats)
    some = [[5, 5, EOS], [5, 5, EOS], [5, 6, EOS]]
    every = [[7, 7, EOS], [7, 7, EOS], [8, 8, EOS]]
    monkeypatch.setattr(own_captions, "sample_captions", lambda *_: some + every)
    found = agreed_captions(network, memory_of(network, 2), None, 3, CiderD(CORPUS), torch.Generator())
    assert found == [[[5, 6]] if no_repeats else [[5, 5], [5, 6]], [[7, 7], [8, 8]]]


def test_samples_at_a_low_temperature_are_greedy_and_at_a_high_one_many(make_model: MakeModel) -> None:
    network = make_model(max_words=5)
    memory = memory_of(network, images=2)
    greedy = greedy_search(network, memory, [0.0] * 2, ExitPolicy(())).captions
    expected = [[step.token for step in caption] for caption in greedy]
    cold = sample_captions(network, memory, 3, None, torch.Generator().manual_seed(0), 1e-4)
    assert cold == [caption for caption in expected for _ in range(3)]
    warm, hot = (
        sample_captions(network, memory, 300, None, torch.Generator().manual_seed(0), temperature)
        for temperature in (0.5, 5.0)
    )
    assert len(Counter(map(tuple, warm))) < len(Counter(map(tuple, hot)))


def test_beam_captions_are_without_eos(make_model: MakeModel) -> None:
    network = make_model(max_words=4)
    for captions in beam_captions(network, memory_of(network, images=2), None):
        assert 1 <= len(captions) <= KEPT
        assert all(EOS not in caption for caption in captions)


def captions_of(start: int, end: int) -> list[list[list[int]]]:
    return [[[number], [number, number]] for number in range(start, end)]


def test_captions_are_made_once(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(7)]
    made = made_once(tmp_path / "own.json", names, captions_of, batch=3)
    assert made == {f"{number}.jpg": [[number], [number, number]] for number in range(7)}
    assert [path.name for path in tmp_path.iterdir()] == ["own.json"]

    def never(start: int, end: int) -> list[list[list[int]]]:
        raise AssertionError("made again")

    assert made_once(tmp_path / "own.json", names, never) == made


@pytest.mark.parametrize("torn", ["", '{"6.jpg": [[6'])
def test_after_a_stop_only_the_rest_is_made(tmp_path: Path, torn: str) -> None:
    names, path = [f"{number}.jpg" for number in range(10)], tmp_path / "own.json"
    asked = []

    def stopped(start: int, end: int) -> list[list[list[int]]]:
        if start == 6:
            raise KeyboardInterrupt
        return captions_of(start, end)

    with pytest.raises(KeyboardInterrupt):
        made_once(path, names, stopped, batch=3)
    assert not path.exists()
    with path.with_suffix(".jsonl").open("a") as lines:
        lines.write(torn)

    def going_on(start: int, end: int) -> list[list[list[int]]]:
        asked.append((start, end))
        if start == 9 and len(asked) == 2:
            raise KeyboardInterrupt  # a second stop: the torn line must not have spoilt the file
        return captions_of(start, end)

    with pytest.raises(KeyboardInterrupt):
        made_once(path, names, going_on, batch=3)
    made = made_once(path, names, going_on, batch=3)
    assert asked == [(6, 9), (9, 10), (9, 10)]
    assert made == made_once(tmp_path / "other.json", names, captions_of)
    assert json.loads(path.read_text()) == made
