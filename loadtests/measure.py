"""From samples to figures: goodput, percentiles, and where it saturates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loadtests.answers import Verdict

DISPATCH_LIMIT = (
    0.05  # seconds that the sender itself may be late: beyond, the step says more of it than of the service
)


@dataclass(frozen=True)
class Sample:
    """One request. Times in seconds after the beginning; `end - due` is what a client that came at `due` waits, the
    sender's own lateness included."""

    name: str
    due: float
    sent: float
    end: float
    verdict: Verdict

    @property
    def seconds(self) -> float:
        return self.end - self.due


@dataclass(frozen=True)
class Step:
    """One rate at one speed. Rates per second; times in seconds, of good answers, from when the request was due."""

    speed: str
    offered: float
    goodput: float
    refused: float  # share
    late: float  # share
    failed: int
    requests: int
    p50: float
    p95: float
    p99: float
    sender_p99: float  # how late the sender itself was
    same_caption: float  # share of captions that are those of an idle service; NaN where none was compared

    @property
    def valid(self) -> bool:
        return self.sender_p99 <= DISPATCH_LIMIT

    def as_row(self) -> dict[str, float | str | int]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def step(speed: str, offered: float, samples: Sequence[Sample]) -> Step:
    good = [sample for sample in samples if sample.verdict.outcome == "ok"]
    times = sorted(sample.seconds for sample in good)
    compared = [sample.verdict.same for sample in good if sample.verdict.same is not None]
    lateness = sorted(sample.sent - sample.due for sample in samples)
    count = len(samples)
    return Step(
        speed=speed,
        offered=offered,
        goodput=goodput(samples),
        refused=sum(sample.verdict.outcome == "refused" for sample in samples) / count,
        late=sum(sample.verdict.outcome == "late" for sample in samples) / count,
        failed=sum(sample.verdict.outcome == "failed" for sample in samples),
        requests=count,
        p50=percentile(times, 0.5),
        p95=percentile(times, 0.95),
        p99=percentile(times, 0.99),
        sender_p99=percentile(lateness, 0.99),
        same_caption=sum(compared) / len(compared) if compared else math.nan,
    )


def goodput(samples: Sequence[Sample]) -> float:
    """Good answers per second, from the first request to the last answer: what is still in the queue at the end of the
    arrivals counts with the time that it took."""
    good = [sample for sample in samples if sample.verdict.outcome == "ok"]
    return len(good) / max(sample.end for sample in samples) if samples else 0.0


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank: a value that was there. NaN of nothing."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
