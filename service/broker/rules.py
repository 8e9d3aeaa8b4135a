"""What both brokers hold to: the batch jobs' share, how long things are kept, what the broker itself answers."""

from __future__ import annotations

from service.jobs import PRIORITIES, Priority, Refusal

BATCH_SHARE = 8  # every eighth place is offered to batch jobs first, so that interactive ones cannot starve them
REPLY_KEPT = 60.0  # seconds: a front that lost its broker has submitted again by then, or has given up
DEAD_LETTERS_KEPT = 100  # the newest: with images of a megabyte this is 100 MB

TOO_LATE = Refusal("deadline_exceeded", "The deadline passed before a worker was free.")
POISON = Refusal("poison", "Each time a worker took the photo, the worker stopped: it was given up.")
UNREADABLE = Refusal("internal", "The worker could not read the job. Are front and worker of the same version?")


def turn(place: int) -> tuple[Priority, ...]:
    """The priorities in the order in which place `place` of all places ever filled, from 0, is offered to them."""
    return PRIORITIES[::-1] if place % BATCH_SHARE == BATCH_SHARE - 1 else PRIORITIES
