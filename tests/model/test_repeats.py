"""What counts as saying the same again, told word by word, caption by caption, and for many captions at once."""

from __future__ import annotations

import numpy as np
import pytest

from model.decoding.beam import Beam, Candidates
from model.decoding.repeats import first_allowed, most_ruled_out, repeating, ruled_out
from model.vocabulary import EOS


@pytest.mark.parametrize(
    ("words", "out"),
    [
        ([], set()),
        ([5], {5}),
        ([5, 6], {6}),
        ([5, 6, 7, 5], {5}),
        ([5, 6, 7, 5, 6], {6, 7}),
        ([5, 6, 7, 5, 6, 8, 5, 6], {6, 7, 8}),
        ([5, 6, 5], {5}),  # only pairs so far
        ([5, 6, 5, 6], {5, 6}),
    ],
)
def test_what_may_not_come_next(words: list[int], out: set[int]) -> None:
    assert ruled_out(words) == out


def some_caption(random: np.random.Generator, longest: int, vocabulary: int) -> list[int]:
    """Of any length up to the longest, that has been kept from repeating as far as that goes."""
    words: list[int] = []
    for _ in range(int(random.integers(0, longest))):
        allowed = sorted(set(range(4, 4 + vocabulary)) - ruled_out(words))
        if not allowed:
            break
        words.append(int(random.choice(allowed)))
    return words


def test_there_are_never_more_than_said() -> None:
    random, most = np.random.default_rng(0), 0
    for _ in range(3000):
        out = ruled_out(some_caption(random, 20, int(random.integers(2, 6))))
        assert EOS not in out
        assert len(out) <= most_ruled_out(20)
        most = max(most, len(out))
    assert most >= 4


def test_many_captions_at_once_are_as_each_alone() -> None:
    random = np.random.default_rng(1)
    flagged = 0
    for _ in range(300):
        captions = [some_caption(random, 12, 4) for _ in range(int(random.integers(1, 6)))]
        said = np.full((len(captions), 12), -1.0)
        for row, words in enumerate(captions):
            said[row, : len(words)] = words
        following = random.integers(2, 8, len(captions))
        again = repeating(said, np.array([len(words) for words in captions]), following.astype(float))
        assert again.tolist() == [
            int(word) in ruled_out(words) for word, words in zip(following, captions, strict=True)
        ]
        flagged += int(again.sum())
    assert flagged > 50


def test_the_likeliest_that_does_not_repeat_is_taken_and_the_likeliest_where_all_do() -> None:
    assert first_allowed([6, 7, 9, 8], [5, 6, 7, 5, 6]) == 2
    assert first_allowed([9, 6], [5, 6, 7, 5, 6]) == 0
    assert first_allowed([6, 7], [5, 6, 7, 5, 6]) == 0


def test_a_beam_looks_further_down_for_what_is_ruled_out_and_takes_what_there_is_where_all_is() -> None:
    def column(words: list[int]) -> Candidates:
        return Candidates(words, [-float(rank + 1) for rank in range(len(words))], 1, 0.0)

    beam = Beam(1, no_repeats=True)
    beam.advance([column([5, 6, 7])])
    beam.advance([column([5, 6, 7])])
    assert [step.token for step in beam.live[0].steps] == [5, 6]
    beam.advance([column([6])])
    assert [step.token for step in beam.live[0].steps] == [5, 6, 6]
