"""How long a worker's model may say nothing, and the warnings where it takes longer than the settings allow for.

The heart of a worker beats only while its model gets on (`service.worker`), so a single run of the extractor that
takes longer than `DEECAP_WORKER_TIMEOUT_S` makes a good worker look dead: others get its photos, and each time that
counts as a try.
"""

from __future__ import annotations

import logging
import math

log = logging.getLogger(__name__)

SHARE = 0.5  # of the timeout that one run of the extractor may take: what else the machine does comes on top
LONG_HANG = 10.0  # times the timeout: from there on a process that hangs is kept for nothing


class Patience:
    """What the settings allow, and whether what was seen keeps to it. Warns once of each thing."""

    def __init__(self, worker_timeout: float = math.inf, hang_seconds: float = math.inf) -> None:
        """Seconds without a heartbeat after which others get its photos, and without progress after which the process
        ends."""
        self._worker_timeout, self._hang_seconds = worker_timeout, hang_seconds
        self._told = False

    def compare(self) -> None:
        """Warns where the two do not go together. For the start."""
        if self._hang_seconds > LONG_HANG * self._worker_timeout and math.isfinite(self._hang_seconds):
            log.warning(
                "a worker that hangs is taken for dead after %g s (DEECAP_WORKER_TIMEOUT_S), and its process ends only "
                "after %g s (DEECAP_HANG_TIMEOUT_S): it captions nothing in between",
                self._worker_timeout,
                self._hang_seconds,
            )

    def expect(self, one: float, photos: int) -> None:
        """Warns where a look at `photos` would take too long, one of them having taken `one` seconds."""
        self._judge(one * photos, f"a look at {photos} photos would take about {one * photos:.1f} s")

    def saw(self, seconds: float, photos: int) -> None:
        """Warns where a look at `photos`, which took `seconds`, was too long."""
        self._judge(seconds, f"a look at {photos} photos took {seconds:.1f} s")

    def _judge(self, seconds: float, what: str) -> None:
        allowed = min(self._worker_timeout, self._hang_seconds)
        if self._told or seconds <= SHARE * allowed:
            return
        self._told = True
        name = "DEECAP_WORKER_TIMEOUT_S" if allowed == self._worker_timeout else "DEECAP_HANG_TIMEOUT_S"
        log.warning(
            "%s, and a worker may be silent for %g s (%s): raise that, or lower DEECAP_LOOK_BATCH", what, allowed, name
        )
