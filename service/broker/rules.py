"""What both brokers hold to: the batch jobs' share, how long things are kept, what the broker itself answers."""

from __future__ import annotations

import json

from service.jobs import PRIORITIES, Priority, Refusal, Reply

BATCH_SHARE = 8  # every eighth place is offered to batch jobs first, so that interactive ones cannot starve them
TAKE_BYTES = 4_000_000  # of photos in one delivery, and the last one may go beyond: Redis has 3 s for it, also far away
REPLY_KEPT = 60.0  # seconds: a front that lost its broker has submitted again by then, or has given up
KEPT_BYTES = 64_000_000  # of the outcomes kept for longer than that, as JSON; the oldest go first
DEAD_LETTERS_KEPT = 100  # the newest
DEAD_BYTES_KEPT = 50_000_000  # of them: photos may be 20 MB each
DEAD_SECONDS_KEPT = 7 * 24 * 3600.0  # they are people's photos
AWAY_SHARE = 0.5  # of the worker timeout: where no script ran for so long, the store was away, and nobody could beat

TOO_LATE = Refusal("deadline_exceeded", "The deadline passed before a worker was free.")
POISON = Refusal("poison", "Each time a worker took the photo, the worker stopped: it was given up.")
UNREADABLE = Refusal("internal", "The worker could not read the job. Are front and worker of neighbouring versions?")
UNREADABLE_REPLY = Refusal(
    "internal", "The front could not read the worker's answer. Are front and worker of neighbouring versions?"
)


def turn(place: int) -> tuple[Priority, ...]:
    """The priorities in the order in which place `place` of all places ever filled, from 0, is offered to them."""
    return PRIORITIES[::-1] if place % BATCH_SHARE == BATCH_SHARE - 1 else PRIORITIES


def for_scripts(worker_timeout: float, tries: int) -> str:
    """All of it as JSON, for the Redis broker's scripts; `scripts/common.lua` says what they need."""
    replies = {"too_late": TOO_LATE, "poison": POISON, "unreadable": UNREADABLE}
    numbers = {
        "worker_timeout": worker_timeout,
        "away": AWAY_SHARE * worker_timeout,
        "tries": tries,
        "share": BATCH_SHARE,
        "take_bytes": TAKE_BYTES,
        "reply_kept": REPLY_KEPT,
        "kept_bytes": KEPT_BYTES,
        "dead_kept": DEAD_LETTERS_KEPT,
        "dead_bytes": DEAD_BYTES_KEPT,
        "dead_seconds": DEAD_SECONDS_KEPT,
    }
    return json.dumps(numbers | {name: json.loads(Reply("", refusal).to_wire()) for name, refusal in replies.items()})
