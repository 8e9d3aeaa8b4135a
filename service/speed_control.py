"""Which speed a job is given: the one asked for, moved towards the most that its client allows while others wait.

A worker has one `LoadLevel`, from 0 (at rest) to 1, which it works out from how long the photos that it takes have
waited in the queue. All workers of a queue see the same waits, so they need not talk to each other. A job's speed is
its own range times that level; a job without `max_speed` is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from model.exits import ResolvedSpeed, SpeedTable
from service.broker.base import Delivery
from service.jobs import Job

# Waits are measured in targets: an error of 1 is a wait of twice the target, -1 is none. The queue adds up what comes
# too fast, so an error that is answered by more than a little makes the wait swing: what a change of speed does shows
# only once the photos in hand are done. These were tried on simulated queues (tests/service/worker/test_speed_control).
SHORTEST = 0.15  # seconds: of a shorter target that is the measure, since photos in hand take as long all the same
SMOOTHING = 0.5  # seconds over which waits are averaged: some ten photos of one worker on a processor
AT_ONCE = 0.15  # of the level, for an error of 1: answers a burst
IN_TIME = 0.005  # of the level, for an error of 1 that lasts for one target: finds the level that holds the target
FALL = 0.5  # of that, downwards: it is worse to be slow than to be fast a little longer
IDLE_FALL = 0.25  # of the level, per second in which nobody waited
LARGEST_ERROR = 4.0  # a burst that no speed can help must not count for ever
LONGEST = 1.0  # seconds that one measurement stands for, at most: the process may have been stopped
ROUNDED = 1  # decimals of the level that a speed is made from, so that requests for one caption still share it
SAME = 1e-6  # SpeedUp: the table's interpolation is not exact


class LoadLevel:
    """A proportional-integral controller of the time that photos wait. Pure: the time is given."""

    def __init__(self, target: float) -> None:
        """`target`: seconds that photos may wait. Above it the level rises, below it falls."""
        self._target, self._scale = target, max(target, SHORTEST)
        self._wait = 0.0  # seconds, smoothed
        self._held = 0.0  # the integral: the level that the last seconds have shown to be needed
        self._updated: float | None = None
        self.level = 0.0

    def took(self, now: float, deliveries: Sequence[Delivery]) -> None:
        """To be called after each asking for photos, with what came of it and a steady clock in seconds.

        Batch photos may wait, and one that comes again has waited for its worker to be taken for dead: neither tells
        of the load, nor, in its turn between others, that there is none.
        """
        waited = [each.waited for each in deliveries if each.job.priority == "interactive" and each.attempt == 1]
        if waited or not deliveries or self._updated is None or now - self._updated >= LONGEST:
            self.update(now, waited)

    def update(self, now: float, waited: Sequence[float]) -> float:
        """The level after photos were taken that had `waited` so many seconds; none where nobody waited."""
        passed = 0.0 if self._updated is None else min(LONGEST, max(0.0, now - self._updated))
        self._updated = now
        wait = sum(waited) / len(waited) if waited else 0.0
        self._wait += (1.0 - math.exp(-passed / SMOOTHING)) * (wait - self._wait)
        error = min(LARGEST_ERROR, (self._wait - self._target) / self._scale)
        self._held += IN_TIME * passed / self._scale * error * (1.0 if error > 0 else FALL)
        if not waited:
            self._held -= IDLE_FALL * passed
        self._held = min(1.0, max(0.0, self._held))
        self.level = min(1.0, max(0.0, self._held + AT_ONCE * error))
        return self.level


@dataclass(frozen=True)
class Chosen:
    """A job's speed."""

    asked: ResolvedSpeed  # what it is given at rest
    used: ResolvedSpeed  # `requested` and `tier` as asked; τ and what it promises as used

    @property
    def moved(self) -> bool:
        """Whether the load moved it."""
        return self.used.tau != self.asked.tau


def choose_speed(table: SpeedTable, job: Job, level: float) -> Chosen:
    """The speed for the job at the load level, by this worker's own table.

    Raises `UnknownSpeedError` for a speed, or a lower bound, that the table does not offer.
    """
    asked = _at_rest(table, job)
    if job.max_speed is None or job.tau is not None:
        return Chosen(asked, asked)
    most = min(job.max_speed, table.fastest)
    number = asked.promised + round(level, ROUNDED) * (most - asked.promised)
    if number <= asked.promised + SAME:
        return Chosen(asked, asked)
    faster = table.resolve(number)
    if faster.tau <= asked.tau:  # a tier's own τ may lie above that which the table finds for its SpeedUp
        return Chosen(asked, asked)
    return Chosen(asked, ResolvedSpeed(asked.requested, asked.tier, faster.tau, faster.promised))


def _at_rest(table: SpeedTable, job: Job) -> ResolvedSpeed:
    """What was asked for, by default the default tier; moved into the bounds where it lies outside by this table."""
    asked = table.resolve(job.speed, job.tau)
    if job.tau is not None:
        return asked
    least = 1.0 if job.min_speed is None else job.min_speed
    most = math.inf if job.max_speed is None else job.max_speed
    if least - SAME <= asked.promised <= most + SAME:
        return asked
    return table.resolve(max(least, min(most, asked.promised)))
