"""When a word leaves the decoder: the exit policy, and the speed table that turns a speed into a threshold τ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

TIERS = {"full": 1.0, "balanced": 2.0, "fast": 3.0, "turbo": 4.0}  # SpeedUp each tier is calibrated to
DEFAULT_SPEED = "balanced"


class UnknownSpeedError(ValueError):
    """The asked speed, or threshold, is none that the bundle offers. The caller's fault."""


SKIPPED = ("computed", "copied")


@dataclass(frozen=True)
class ExitPolicy:
    """Which layers of the decoder are tested; a word leaves at the first whose entropy is below τ.

    `tested` are layer numbers from 1 to N-1 in rising order; layer N is the end and is never tested.
    One policy per bundle; only τ varies with speed. τ=0 tests nothing, since entropy is never negative.

    `skipped` says what deeper layers see of a word that left before them, once a later word goes there: `computed`,
    its states at those layers, computed then (nothing is approximated), or `copied`, the state it left with (CALM,
    Schuster et al. 2022, section 3.2), for which only keys and values are computed.

    With `margin`, in nats, a test is spared where the model's exit head guesses an entropy above τ by more than it.
    """

    tested: tuple[int, ...]
    skipped: str = "computed"
    margin: float | None = None

    @classmethod
    def every_layer(cls, layers: int) -> ExitPolicy:
        """The reference policy: a test after each layer but the last."""
        return cls(tuple(range(1, layers)))

    def validate(self, layers: int) -> None:
        """Raises `ValueError` unless the tested layers rise within 1..layers-1."""
        if list(self.tested) != sorted(set(self.tested)) or not all(1 <= m < layers for m in self.tested):
            raise ValueError(f"tested layers {self.tested} must rise from 1 to at most {layers - 1}")
        if self.skipped not in SKIPPED:
            raise ValueError(f"skipped must be one of {', '.join(SKIPPED)}, not {self.skipped!r}")
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"margin must be a finite number of nats, not {self.margin}")

    def to_json(self) -> dict[str, Any]:
        return {"tested": list(self.tested), "skipped": self.skipped, "margin": self.margin}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ExitPolicy:
        """Raises `ValueError` or `TypeError` for what is no policy."""
        unknown = set(data) - {"tested", "skipped", "margin"}
        if unknown:
            raise ValueError(f"unknown in the exit policy: {', '.join(sorted(unknown))}")
        margin, tested = data.get("margin"), tuple(data["tested"])
        if any(type(layer) is not int for layer in tested):
            raise ValueError(f"tested layers are whole numbers, not {data['tested']}")
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
            raise ValueError(f"margin must be a number of nats, not {margin!r}")
        return cls(tested, data.get("skipped", "computed"), None if margin is None else _number(margin))


def paper_speedup(exit_layers: Sequence[int], layers: int) -> float:
    """The paper's SpeedUp (section 4.1): Σ N·w^m / Σ m·w^m over emitted steps, EOS included."""
    return layers * len(exit_layers) / sum(exit_layers) if exit_layers else 1.0


@dataclass(frozen=True)
class SpeedRow:
    """One threshold as measured on validation data, greedy search."""

    tau: float  # nats
    speedup: float  # the paper's formula
    executed_speedup: float  # decoder layer-rows at full depth over those run here, catch-up included
    cider: float  # CIDEr-D x 100
    describe_ms: float  # encoder and words, mean per photo, one at a time


@dataclass(frozen=True)
class ResolvedSpeed:
    """What a request's speed came to."""

    requested: str | float | None  # None when τ was given
    tier: str | None  # the tier's name, where one was asked for
    tau: float
    promised: float  # SpeedUp that the table measured at this τ


@dataclass(frozen=True)
class SpeedTable:
    """τ against what it bought on validation data, τ rising; the tiers are points on it."""

    rows: tuple[SpeedRow, ...]
    tiers: dict[str, float]  # name -> τ
    measured: dict[str, Any] = field(default_factory=dict)  # split, command, machine: for the reader

    def __post_init__(self) -> None:
        taus = [row.tau for row in self.rows]
        if not taus or taus[0] != 0.0 or taus != sorted(set(taus)):
            raise ValueError("a speed table starts at tau 0 and rises")
        if set(self.tiers) != set(TIERS):
            raise ValueError(f"a speed table has the tiers {', '.join(TIERS)}")

    @property
    def fastest(self) -> float:
        """The largest SpeedUp that can be asked for."""
        return max(row.speedup for row in self.rows)

    def _monotone(self) -> list[tuple[float, float]]:
        """(τ, SpeedUp) with SpeedUp made non-decreasing by a running maximum."""
        points, highest = [], 0.0
        for row in self.rows:
            highest = max(highest, row.speedup)
            points.append((row.tau, highest))
        return points

    def speedup_at(self, tau: float) -> float:
        """SpeedUp promised at τ: linear between the measured rows, flat beyond the last."""
        points = self._monotone()
        for (tau0, speed0), (tau1, speed1) in pairwise(points):
            if tau <= tau1:
                return speed0 + (speed1 - speed0) * (tau - tau0) / (tau1 - tau0)
        return points[-1][1]

    def tau_for(self, speedup: float) -> float:
        """The smallest τ promised to reach `speedup`, by interpolation between measured rows."""
        points = self._monotone()
        if speedup <= points[0][1]:
            return points[0][0]
        for (tau0, speed0), (tau1, speed1) in pairwise(points):
            if speedup <= speed1:
                return tau0 + (tau1 - tau0) * (speedup - speed0) / (speed1 - speed0)
        return points[-1][0]

    def resolve(self, speed: str | float | None = None, tau: float | None = None) -> ResolvedSpeed:
        """A tier's name, a number from 1 to `fastest`, or τ itself, as the τ to use and what it promises.

        Raises `UnknownSpeedError` for any other value, or when both are given.
        """
        if speed is not None and tau is not None:
            raise UnknownSpeedError("give speed or tau, not both")
        if tau is not None:
            tau = _number(tau)
            if not (math.isfinite(tau) and tau >= 0.0):
                raise UnknownSpeedError("tau must be a finite number of nats, 0 or more")
            return ResolvedSpeed(None, None, tau, self.speedup_at(tau))
        asked = DEFAULT_SPEED if speed is None else speed
        if isinstance(asked, str) and asked in self.tiers:
            return ResolvedSpeed(asked, asked, self.tiers[asked], self.speedup_at(self.tiers[asked]))
        number = _number(asked)
        if not 1.0 <= number <= self.fastest:
            raise UnknownSpeedError(
                f"speed must be one of {', '.join(self.tiers)} or a number from 1 to {self.fastest:.2f}"
            )
        found = self.tau_for(number)
        return ResolvedSpeed(number, None, found, self.speedup_at(found))

    def to_json(self) -> dict[str, Any]:
        return {"measured": self.measured, "tiers": self.tiers, "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SpeedTable:
        """Raises `ValueError` for a table that is not one."""
        try:
            rows = tuple(SpeedRow(**row) for row in data["rows"])
            return cls(rows, dict(data["tiers"]), data.get("measured", {}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a speed table: {error}") from error


def _number(value: Any) -> float:
    """The value as a float; NaN for what is none, an integer beyond a float's range among them."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
