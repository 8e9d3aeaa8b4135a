"""How well confidence tells easy words from hard ones: the paper's FCS (section 2.2), as AUROC and as printed.

Equations 1 and 2 as printed give 0 whenever they are followed to the letter: sorted by rising confidence, no pair
j < i can have c(y_i) < c(y_j), so FC is 1 for every pair. What they mean is the share of pairs in the right order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Consistency:
    """Of one classifier over L tokens. The shares are NaN where there is nothing to take a share of."""

    tokens: int  # L
    hard: int  # tokens with d = 1: the likeliest word is not the reference's
    auroc: float  # share of easy-hard pairs with the easy one more confident, ties one half
    fcs: float  # 1 - discordant / (L (L - 1) / 2): pairs alike in difficulty count as right, as in the paper


def consistency(confidence: np.ndarray, hard: np.ndarray) -> Consistency:
    """Both `(L,)`: the probability of the predicted word (any rising measure of certainty does), and whether it is
    not the reference's word. A discordant pair is an easy and a hard token with the hard one more confident; a tie
    is half of one. O(L log L).

    Raises `ValueError` for other shapes or a confidence that is not finite.
    """
    confidence, hard = np.asarray(confidence, np.float64), np.asarray(hard, bool)
    if confidence.ndim != 1 or confidence.shape != hard.shape or not np.isfinite(confidence).all():
        raise ValueError("a finite confidence and a difficulty are needed for each token")
    easy_sorted = np.sort(confidence[~hard])
    below = np.searchsorted(easy_sorted, confidence[hard], side="left")
    up_to = np.searchsorted(easy_sorted, confidence[hard], side="right")
    # In halves, so that the count is exact: 2 for a hard token above an easy one, 1 for a tie.
    halves = int(below.sum()) + int(up_to.sum())
    total, hards = len(confidence), int(hard.sum())
    mixed, pairs = (total - hards) * hards, total * (total - 1) // 2
    return Consistency(
        tokens=total,
        hard=hards,
        auroc=1.0 - halves / (2 * mixed) if mixed else float("nan"),
        fcs=1.0 - halves / (2 * pairs) if pairs else float("nan"),
    )


@dataclass(frozen=True)
class Bin:
    """Tokens of like confidence."""

    tokens: int
    confidence: float  # mean
    accuracy: float  # share whose predicted word is the reference's


def reliability(confidence: np.ndarray, hard: np.ndarray, bins: int = 10) -> tuple[Bin, ...]:
    """The reliability diagram (Guo et al. 2017): bins of equal width over 0 to 1, empty ones left out.

    Both `(L,)`, as in `consistency`, but the confidence must be a probability: `ValueError` where it is not.
    """
    confidence, hard = np.asarray(confidence, np.float64), np.asarray(hard, bool)
    if bins < 1 or confidence.shape != hard.shape or not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():
        raise ValueError("a probability and a difficulty are needed for each token, and at least one bin")
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    found = []
    for number in range(bins):
        chosen = index == number
        if chosen.any():
            found.append(Bin(int(chosen.sum()), float(confidence[chosen].mean()), float((~hard[chosen]).mean())))
    return tuple(found)


def calibration_error(bins: tuple[Bin, ...]) -> float:
    """Expected calibration error, 0 to 1: mean of |confidence - accuracy| over tokens. NaN for no tokens."""
    total = sum(one.tokens for one in bins)
    return sum(one.tokens * abs(one.confidence - one.accuracy) for one in bins) / total if total else float("nan")
