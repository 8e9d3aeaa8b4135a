"""CIDEr-D as we compute it is the CIDEr-D that pycocoevalcap computes, and refuses what it cannot score."""

from __future__ import annotations

import random

import numpy as np
import pytest

from model.evaluation.cider import CiderD, corpus_cider_d

Tokens = list[str]

REAL_LIKE: list[tuple[str, list[str]]] = [
    (
        "a dog runs through the grass",
        [
            "a brown dog runs through the tall grass",
            "a dog is running in a field",
            "the dog runs through the grass with a ball in its mouth",
            "brown dog running",
            "a dog plays outside on the green grass",
        ],
    ),
    ("a man on a bike", ["a man rides a bike down a hill", "a cyclist on a dirt path", "a man on a bike"]),
    ("a a a a a a a a a a a a a a a a a a a a", ["two children play in the water", "a child and a child in a pool"]),
    ("snowboarder", ["a snowboarder jumps over a snowy hill", "snowboarder", "a person in the air above the snow"]),
    ("two dogs play with a ball in the snow near a fence", ["two dogs play in the snow", "dogs"]),
]


def package_scores(candidates: list[Tokens], references: list[list[Tokens]]) -> np.ndarray:
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    found = {i: [" ".join(tokens)] for i, tokens in enumerate(candidates)}
    truth = {i: [" ".join(tokens) for tokens in image] for i, image in enumerate(references)}
    return np.asarray(cider.Cider().compute_score(truth, found)[1])


def random_corpus(seed: int, images: int, words: int) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Few distinct words, so that n-grams of all orders meet; some captions are copies, empty or very long."""
    draw = random.Random(seed)

    def sentence() -> Tokens:
        return [f"w{draw.randrange(words)}" for _ in range(draw.choice([0, 1, 2, 3, 5, 8, 12, 30]))]

    references = [[sentence() for _ in range(draw.randint(1, 6))] for _ in range(images)]
    candidates = [draw.choice(image) if draw.random() < 0.2 else sentence() for image in references]
    return candidates, references


def real_like() -> tuple[list[Tokens], list[list[Tokens]]]:
    return [text.split() for text, _ in REAL_LIKE], [[text.split() for text in image] for _, image in REAL_LIKE]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("images", "words"), [(1, 3), (2, 3), (7, 2), (40, 8)])
def test_random_captions_score_as_in_the_package(seed: int, images: int, words: int) -> None:
    candidates, references = random_corpus(seed, images, words)
    np.testing.assert_allclose(
        corpus_cider_d(candidates, references), package_scores(candidates, references), atol=1e-9
    )


def test_real_like_captions_score_as_in_the_package() -> None:
    candidates, references = real_like()
    ours = corpus_cider_d(candidates, references)
    np.testing.assert_allclose(ours, package_scores(candidates, references), atol=1e-9)
    assert ours[0] > ours[2] > 0, "the parity above compares more than zeros"


def test_a_given_corpus_scores_as_the_package_when_it_is_all_evaluated() -> None:
    """The reward's mode: frequencies of a large corpus, candidates for a few of its images."""
    candidates, references = random_corpus(11, 30, 6)
    expected = package_scores(candidates, references)
    scorer = CiderD(references)
    for i in (3, 17, 29):
        assert scorer.score(candidates[i], scorer.prepare(references[i])) == pytest.approx(expected[i], abs=1e-9)


def test_frequencies_come_from_the_given_corpus_and_not_from_the_scored_images() -> None:
    candidates, references = real_like()
    commoner = CiderD(references + [[["a", "dog", "runs"]]] * 50)
    usual = CiderD(references)
    dog = candidates[0]
    assert commoner.score(dog, commoner.prepare(references[0])) != pytest.approx(
        usual.score(dog, usual.prepare(references[0])), abs=1e-3
    )


def test_references_outside_the_corpus_are_weighed_as_the_rarest() -> None:
    scorer = CiderD([[["a", "dog"]], [["a", "cat"]]])
    owls = ["seven", "owls", "sit", "here"]
    assert scorer.score(owls, scorer.prepare([owls])) == pytest.approx(10.0)


def test_ids_score_as_words_do() -> None:
    candidates, references = random_corpus(5, 20, 6)
    ids = {word: i for i, word in enumerate(sorted({w for image in references for r in image for w in r}))}
    numbered = [[ids.get(w, -1) for w in tokens] for tokens in candidates]
    numbered_references = [[[ids[w] for w in tokens] for tokens in image] for image in references]
    np.testing.assert_array_equal(corpus_cider_d(numbered, numbered_references), corpus_cider_d(candidates, references))


def test_eos_as_a_token_tells_a_finished_caption_from_a_cut_one() -> None:
    """Why the trainer must append it: without EOS, captions that stop in mid-sentence are rewarded."""
    eos = 0
    images = [[[5, 6, 7, 8, eos], [5, 9, 7, 8, eos]], [[10, 11, eos]], [[12, 13, 5, eos]]]
    scorer = CiderD(images)
    prepared = scorer.prepare(images[0])
    assert scorer.score([5, 6, 7, 8, eos], prepared) > scorer.score([5, 6, 7, 8], prepared)


def test_many_are_scored_as_one_by_one() -> None:
    candidates, references = random_corpus(2, 10, 5)
    scorer = CiderD(references)
    prepared = [scorer.prepare(image) for image in references]
    many = scorer.score_many(candidates, prepared)
    assert many.dtype == np.float64
    assert many.tolist() == [scorer.score(one, refs) for one, refs in zip(candidates, prepared, strict=True)]


def test_what_cannot_be_scored_is_refused() -> None:
    scorer = CiderD([[["a"]], [["b"]]])
    with pytest.raises(ValueError, match="at least one image"):
        CiderD([])
    with pytest.raises(ValueError, match="at least one reference"):
        scorer.prepare([])
    with pytest.raises(ValueError, match="shorter"):
        scorer.score_many([["a"]], [])
    with pytest.raises(TypeError, match="not a string"):
        scorer.score("a dog", scorer.prepare([["a"]]))
    assert scorer.score([], scorer.prepare([["a"]])) == 0.0
