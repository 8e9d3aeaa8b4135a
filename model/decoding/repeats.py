"""A captioner's stutter: the words that a caption must not go on with, lest it say the same again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LENGTH = 3  # words in a row that no caption has twice; of 30,000 human captions of Flickr8k 170 have


def ruled_out(words: Sequence[int]) -> set[int]:
    """Words that would come twice running, or end three words in a row that the caption has already.

    Never EOS, which no caption in the making has. At most `most_ruled_out` of them.
    """
    if not words:
        return set()
    ahead = LENGTH - 1
    ends = {words[i + ahead] for i in range(len(words) - ahead) if words[i : i + ahead] == words[-ahead:]}
    return ends | {words[-1]}


def most_ruled_out(max_words: int) -> int:
    """How many `ruled_out` there can be: each but one follows another pair of words in the caption."""
    return max_words // LENGTH + 1


def first_allowed(candidates: Sequence[int], words: Sequence[int]) -> int:
    """Which of the candidates for the next word, best first, does not repeat; 0 where all of them would."""
    out = ruled_out(words)
    return next((place for place, word in enumerate(candidates) if word not in out), 0)


def repeating(said: np.ndarray, lengths: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Which of many captions would repeat by their next word, as booleans `(G,)`.

    `said (G, W)`: each caption's words, the first `lengths (G,)` of them, below 0 behind; `words (G,)`: the next.
    """
    again: np.ndarray = np.zeros(len(words), dtype=bool)
    same = said == words[:, None]
    if not same.any():  # most words are new
        return again
    rows = np.arange(len(words))
    last, before = said[rows, lengths - 1], said[rows, lengths - 2]  # of captions too short: what is behind, below 0
    ends = same[:, 2:] & (said[:, 1:-1] == last[:, None]) & (said[:, :-2] == before[:, None])
    np.logical_or(words == last, ends.any(axis=1), out=again)
    return again
