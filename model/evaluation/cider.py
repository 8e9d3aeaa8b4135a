"""CIDEr-D in plain dictionaries: fast enough to be a training reward, equal to pycocoevalcap's figure."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Token = Hashable  # a word or an id; plain Python values (tensors hash by identity and would match nothing)
NGram = tuple[Token, ...]
Posting = tuple[tuple[int, int], ...]  # (index of a reference that has the n-gram, how many times)

ORDERS = 4  # n-grams of 1 to 4 tokens
SIGMA = 6.0  # tokens; width of the length penalty
SCALE = 10.0  # the customary factor; published tables multiply by 100 on top


@dataclass(frozen=True, slots=True)
class PreparedReferences:
    """The references of one image, weighed by one `CiderD` and readable by that one only."""

    postings: dict[NGram, Posting]
    inverse_norms: tuple[tuple[float, ...], ...]  # orders x references; 0 where the tf-idf vector is 0
    lengths: tuple[int, ...]  # of each reference, in tokens


class CiderD:
    """Scores captions by CIDEr-D (Vedantam et al., CVPR 2015, section 3 and its CIDEr-D variant).

    Tf-idf vectors of n-grams, cosine with the candidate's counts clipped to the reference's, a Gaussian penalty on
    the difference in length, mean over references and orders. Equal to pycocoevalcap's `Cider` where the corpus is
    the same; as there, an n-gram unknown to the corpus has document frequency 1.

    The corpus of document frequencies is fixed at construction: the train split when this is a reward, the
    evaluated images themselves when it is a figure to compare with others (`corpus_cider_d`).

    Tokens are any hashable values. EOS counts only if the caller puts it in: then in the corpus, the references and
    the candidates alike.
    """

    def __init__(self, document_references: Sequence[Sequence[Sequence[Token]]]) -> None:
        """`document_references`: images x references x tokens. Raises `ValueError` when there is no image."""
        if not document_references:
            raise ValueError("CIDEr-D needs a corpus of at least one image for its document frequencies")
        frequencies: dict[NGram, int] = {}
        for references in document_references:
            for ngram in {ngram for reference in references for order in _count_ngrams(reference) for ngram in order}:
                frequencies[ngram] = frequencies.get(ngram, 0) + 1
        self._unknown = math.log(len(document_references))  # idf of an n-gram that the corpus does not have
        self._idf = {ngram: self._unknown - math.log(images) for ngram, images in frequencies.items()}
        self._shared: dict[Posting, Posting] = {}

    def prepare(self, references: Sequence[Sequence[Token]]) -> PreparedReferences:
        """Weighs one image's references (references x tokens); keep the result, it serves every candidate.

        The image need not be in the corpus. Raises `ValueError` when there is no reference.
        """
        if not references:
            raise ValueError("CIDEr-D needs at least one reference for each image")
        found: dict[NGram, list[tuple[int, int]]] = {}
        inverse_norms: list[list[float]] = [[] for _ in range(ORDERS)]
        for index, reference in enumerate(references):
            for order, row in zip(_count_ngrams(reference), inverse_norms, strict=True):
                squared_norm = 0.0
                for ngram, times in order.items():
                    squared_norm += (times * self._idf.get(ngram, self._unknown)) ** 2
                    found.setdefault(ngram, []).append((index, times))
                row.append(1 / math.sqrt(squared_norm) if squared_norm else 0.0)
        postings: dict[NGram, Posting] = {}
        for ngram, pairs in found.items():
            # Most n-grams stand once in one reference: making equal postings one object more than halves the memory.
            posting = tuple(pairs)
            postings[ngram] = self._shared.setdefault(posting, posting)
        lengths = tuple(len(reference) for reference in references)
        return PreparedReferences(postings, tuple(tuple(row) for row in inverse_norms), lengths)

    def score(self, candidate: Sequence[Token], prepared: PreparedReferences) -> float:
        """CIDEr-D of one caption (tokens), 0 to 10: pycocoevalcap's scale, where 1.0 is the 100 of published tables.

        `prepared` must come from this object. An empty candidate scores 0.
        """
        length = len(candidate)
        penalties = [math.exp(-((length - other) ** 2) / (2 * SIGMA**2)) for other in prepared.lengths]
        idf_of, unknown, postings = self._idf.get, self._unknown, prepared.postings
        total = 0.0
        for order, inverse_norms in zip(_count_ngrams(candidate), prepared.inverse_norms, strict=True):
            squared_norm = product = 0.0
            for ngram, times in order.items():
                squared_idf = idf_of(ngram, unknown) ** 2
                squared_norm += times * times * squared_idf
                for index, other in postings.get(ngram, ()):
                    clipped = times if times < other else other
                    product += clipped * other * squared_idf * inverse_norms[index] * penalties[index]
            if squared_norm:
                total += product / math.sqrt(squared_norm)
        return SCALE * total / (ORDERS * len(prepared.lengths))

    def score_many(self, candidates: Sequence[Sequence[Token]], prepared: Sequence[PreparedReferences]) -> np.ndarray:
        """CIDEr-D of each candidate against the references beside it: float64 (len(candidates),), 0 to 10.

        Raises `ValueError` when the two lengths differ.
        """
        return np.array([self.score(one, refs) for one, refs in zip(candidates, prepared, strict=True)], np.float64)


def corpus_cider_d(
    candidates: Sequence[Sequence[Token]], references: Sequence[Sequence[Sequence[Token]]]
) -> np.ndarray:
    """CIDEr-D per image with document frequencies of the evaluated images themselves; its mean is the usual figure.

    `candidates`: images x tokens; `references`: images x references x tokens. Returns float64 (images,), 0 to 10;
    times 100 is the scale of published tables. Raises `ValueError` for differing numbers of images, or none.
    """
    scorer = CiderD(references)
    return scorer.score_many(candidates, [scorer.prepare(one) for one in references])


def _count_ngrams(tokens: Sequence[Token]) -> list[dict[NGram, int]]:
    """Occurrences of each n-gram, a dictionary for each order from 1 to `ORDERS`."""
    if isinstance(tokens, str):
        raise TypeError("a caption is a sequence of tokens, not a string: its letters would be the tokens")
    counts = []
    for size in range(1, ORDERS + 1):
        order: dict[NGram, int] = {}
        for ngram in zip(*(tokens[start:] for start in range(size)), strict=False):
            order[ngram] = order.get(ngram, 0) + 1
        counts.append(order)
    return counts
