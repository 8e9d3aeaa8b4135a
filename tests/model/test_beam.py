"""A beam, with no network behind it, keeps what trying every extension of every hypothesis keeps."""

from __future__ import annotations

import numpy as np
import pytest

from model.decoding.beam import LARGEST_BEAM, Beam, Candidates, Hypothesis, Step
from model.vocabulary import EOS

WORDS = 14  # of the language below, EOS among them


def chances(prefix: tuple[int, ...], seed: int) -> np.ndarray:
    """Log-probabilities of a small random language in which every prefix has its own."""
    logits = np.random.default_rng([seed, *prefix]).normal(size=WORDS) * 1.5
    logits[EOS] += 0.5
    return logits - np.log(np.exp(logits).sum())


def exit_of(prefix: tuple[int, ...]) -> tuple[int, float]:
    """A layer and an entropy that tell the prefix."""
    return 1 + sum(prefix) % 4, len(prefix) + sum(prefix) / 1000


def tokens(steps: list[Step]) -> tuple[int, ...]:
    return tuple(step.token for step in steps)


def slow_beam(width: int, longest: int, seed: int) -> list[tuple[int, ...]]:
    """Captions, best first; of all words after all live prefixes the best `width` that are not EOS go on."""
    totals: dict[tuple[int, ...], float] = {(): 0.0}
    live: list[tuple[int, ...]] = [()]
    ended: list[tuple[int, ...]] = []
    for _ in range(longest):
        extensions = []
        for prefix in live:
            for word, log_p in enumerate(chances(prefix, seed)):
                totals[(*prefix, word)] = totals[prefix] + log_p
                extensions.append((*prefix, word))
        extensions.sort(key=lambda one: -totals[one])
        ended += [one for one in extensions[:width] if one[-1] == EOS]
        live = [one for one in extensions if one[-1] != EOS][:width]
        if len(ended) >= width:
            live = []
            break
    return sorted([*ended, *live], key=lambda one: -totals[one] / len(one))


@pytest.mark.parametrize("width", range(1, LARGEST_BEAM + 1))
def test_a_beam_is_the_search_through_all_extensions(width: int) -> None:
    lengths, over_early = set(), set()
    for seed in range(12):
        beam, longest = Beam(width), 7
        prefixes: list[tuple[int, ...]] = [()]
        for _ in range(longest):
            columns = []
            for prefix in prefixes:
                log_p = chances(prefix, seed)
                best = np.argsort(-log_p)[: 2 * width]
                columns.append(Candidates(best.tolist(), log_p[best].tolist(), *exit_of(prefix)))
            parents = beam.advance(columns)
            assert len(parents) == len(beam.live)
            # What the caller keeps beside each hypothesis follows it by these numbers.
            prefixes = [
                (*prefixes[parent], hypothesis.steps[-1].token)
                for parent, hypothesis in zip(parents, beam.live, strict=True)
            ]
            assert prefixes == [tokens(hypothesis.steps) for hypothesis in beam.live]
            if not parents:
                break
        found = beam.ranked()
        assert [tokens(steps) for steps in found] == slow_beam(width, longest, seed)
        for steps in found:
            for t, step in enumerate(steps):
                before = tokens(steps[:t])
                assert (step.exit_layer, step.entropy) == exit_of(before)
                assert step.log_probability == chances(before, seed)[step.token]
        lengths |= {len(steps) for steps in found}
        over_early.add(not beam.live)
    assert len(lengths) > 1
    assert over_early == {True, False}


def column(words: list[int], log_probabilities: list[float]) -> Candidates:
    return Candidates(words, log_probabilities, 1, 0.0)


def test_eos_ends_a_hypothesis_only_from_among_the_best() -> None:
    beam = Beam(2)
    assert beam.advance([column([5, 6, EOS, 7], [-1.0, -2.0, -2.5, -3.0])]) == [0, 0]
    assert not beam.ended
    assert [tokens(one.steps) for one in beam.live] == [(5,), (6,)]
    beam.advance([column([EOS, 7, 8, 9], [-0.1, -3.0, -4.0, -5.0]), column([7, 8, 9, 10], [-2.5, -6.0, -7.0, -8.0])])
    assert [tokens(one.steps) for one in beam.ended] == [(5, EOS)]
    assert [tokens(one.steps) for one in beam.live] == [(5, 7), (6, 7)]


def test_two_survivors_may_come_from_one_and_none_from_another() -> None:
    beam = Beam(2)
    beam.advance([column([5, 6, 7, 8], [-1.0, -1.1, -9.0, -9.0])])
    columns = [column([7, 8, 9, 10], [-8.0, -8.1, -8.2, -8.3]), column([9, 8, 7, 5], [-0.5, -0.6, -9.0, -9.0])]
    assert beam.advance(columns) == [1, 1]
    assert [tokens(one.steps) for one in beam.live] == [(6, 9), (6, 8)]
    assert [one.log_probability for one in beam.live] == pytest.approx([-1.6, -1.7])


def test_a_beam_is_over_with_as_many_ended_hypotheses_as_it_is_wide() -> None:
    beam = Beam(1)
    assert beam.advance([column([5, EOS], [-0.5, -1.0])]) == [0]
    assert beam.advance([column([EOS, 6], [-0.1, -3.0])]) == []
    assert beam.live == []
    assert [tokens(steps) for steps in beam.ranked()] == [(5, EOS)]


def test_captions_without_eos_compete_by_their_mean() -> None:
    beam = Beam(2)
    beam.advance([column([EOS, 5, 6, 7], [-1.0, -1.2, -4.0, -5.0])])
    beam.advance([column([6, 7, 8, 9], [-0.2, -5.0, -6.0, -7.0]), column([6, 7, 8, 9], [-9.0] * 4)])
    assert [tokens(steps) for steps in beam.ranked()] == [(5, 6), (EOS,), (5, 7)]


def test_of_equals_the_one_of_the_earlier_hypothesis_goes_first() -> None:
    beam = Beam(2)
    beam.advance([column([5, 6, 7, 8], [-1.0, -1.0, -1.0, -1.0])])
    assert [tokens(one.steps) for one in beam.live] == [(5,), (6,)]
    columns = [column([9, 8, 7, 10], [-2.0] * 4), column([5, 8, 7, 10], [-2.0] * 4)]
    assert beam.advance(columns) == [0, 0]
    assert [tokens(one.steps) for one in beam.live] == [(5, 9), (5, 8)]


def test_extending_leaves_a_hypothesis_as_it_was() -> None:
    first = Hypothesis().extended(Step(5, 2, 0.5, -1.0))
    one, other = first.extended(Step(6, 1, 0.1, -2.0)), first.extended(Step(7, 3, 0.2, -4.0))
    assert tokens(first.steps) == (5,)
    assert (tokens(one.steps), tokens(other.steps)) == ((5, 6), (5, 7))
    assert (first.score, one.score, other.score) == (-1.0, -1.5, -2.5)


def test_each_live_hypothesis_needs_its_candidates() -> None:
    beam = Beam(2)
    whole = column([5, 6, 7, 8], [-1.0, -2.0, -3.0, -4.0])
    beam.advance([whole])
    with pytest.raises(ValueError, match="zip"):
        beam.advance([whole])


@pytest.mark.parametrize("width", [-1, 0, LARGEST_BEAM + 1, 100])
def test_a_width_outside_1_to_5_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 5, not {width}"):
        Beam(width)
