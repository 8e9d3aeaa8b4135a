"""A broker that is lost: how long to wait between tries to reach it, and that each outage is told once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from service.broker.base import BrokerLostError

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds


class Outage:
    """Tells once that the broker was lost, and once that it is back: when the heart beats again, since what had begun
    before may still come to a good end."""

    def __init__(self) -> None:
        self.lasts = False

    def begins(self, error: BrokerLostError) -> None:
        if not self.lasts:
            self.lasts = True
            log.warning("the broker is lost, trying again: %s", error)

    def ends(self) -> None:
        if self.lasts:
            self.lasts = False
            log.info("the broker is back")


def pauses() -> Iterator[float]:
    """Seconds between tries to reach the broker, without end."""
    seconds = FIRST_PAUSE
    while True:
        yield seconds
        seconds = min(2 * seconds, LONGEST_PAUSE)
