"""How far two systems are apart, by photos and by seeds, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.evaluation.intervals import Interval, mean_interval, seeds_interval
from model.experiments.result import interval


@dataclass(frozen=True)
class Difference:
    """A difference of two systems: over photos, of which each has the mean of its seeds, and over seeds."""

    photos: Interval
    each: tuple[float, ...]  # the mean over photos with each seed
    seeds: Interval | None  # None: of one seed, so that nothing is known of others

    @classmethod
    def of(cls, found: Sequence[np.ndarray]) -> Difference:
        """`found`: of each seed the difference on each photo, `(photos,)`."""
        each = tuple(float(one.mean()) for one in found)
        return cls(mean_interval(np.mean(found, axis=0)), each, seeds_interval(each) if len(each) > 1 else None)

    def told(self) -> str:
        """`+2.5 [+1.7, +3.5], over 3 seeds [-0.5, +5.6] (+1.4, +3.8, +2.4)`: the first interval is over photos."""
        if self.seeds is None:
            return f"{interval(*self.photos, signed=True)}, one seed"
        one_by_one = ", ".join(f"{one:+.1f}" for one in self.each)
        over_seeds = f"over {len(self.each)} seeds [{self.seeds.low:+.1f}, {self.seeds.high:+.1f}] ({one_by_one})"
        return f"{interval(*self.photos, signed=True)}, {over_seeds}"

    def verdict(self, above: str, below: str, neither: str = "no difference") -> str:
        """`above` or `below` where every interval that there is excludes 0; of one seed, said of its photos alone."""
        intervals = [self.photos] if self.seeds is None else [self.photos, self.seeds]
        alone = " on these photos, whatever other seeds would do" if self.seeds is None else ""
        if all(one.low > 0 for one in intervals):
            return above + alone
        if all(one.high < 0 for one in intervals):
            return below + alone
        return f"{neither} shown"
