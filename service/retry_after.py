"""When a refused request is worth another try: what waits before it, over how fast jobs are answered."""

from __future__ import annotations

import math

SHORTEST, LONGEST = 1, 60  # seconds
MEMORY = 5.0  # seconds of work that the rate is taken over: some hundred captions, and still quick to change
FIRST_GUESS = 10.0  # jobs per second; it weighs as much as a tenth of a second of watching


class DrainRate:
    """Jobs answered per second of a queue, watched only while jobs wait.

    An idle queue answers as many as arrive, which says nothing of how many it could. Both sums below fade together, so
    that the latest seconds count most.
    """

    def __init__(self) -> None:
        self._answered = FIRST_GUESS * 0.1
        self._seconds = 0.1
        self._last: tuple[float, int, bool] | None = None

    def saw(self, now: float, answered: int, waiting: int) -> None:
        """At `now`, by any steady clock in seconds, `answered` jobs had been answered in all and `waiting` waited."""
        last, self._last = self._last, (now, answered, waiting > 0)
        if last is None:
            return
        then, before, was_busy = last
        if answered < before or now <= then or not (was_busy or waiting > 0):
            return  # a queue that began anew, or that was idle
        fading = math.exp(-(now - then) / MEMORY)
        self._answered = self._answered * fading + (answered - before)
        self._seconds = self._seconds * fading + (now - then)

    @property
    def per_second(self) -> float:
        return self._answered / self._seconds

    def retry_after(self, waiting: int) -> int:
        """Whole seconds until `waiting` jobs are answered, as far as can be told; from 1 to 60."""
        return min(LONGEST, max(SHORTEST, math.ceil(min(LONGEST, waiting / max(self.per_second, 1e-9)))))
