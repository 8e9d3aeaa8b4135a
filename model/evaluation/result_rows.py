"""Result rows: what one trained system measured, as a small JSON file that tables and figures are rebuilt from.

A row is made by `deecap experiment measure` and committed; the checkpoint it was measured on is not. Its key is a hash
of what decides the result (configuration, exit policy, photos), so that a changed configuration is another row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1
KEY_DIGITS = 12


@dataclass(frozen=True)
class Point:
    """Greedy captions of all photos at one threshold."""

    tau: float  # nats
    speedup: float  # the paper's
    executed_speedup: float  # by layer-rows that ran, catch-up included
    scores: dict[str, Any]  # of `caption_scores`; what was not run says so
    cider: list[float]  # CIDEr-D x 100 of each photo
    depth: list[float]  # mean exit layer of each photo's caption, EOS included
    exit_layers: list[int]  # w^m, steps that left at layer m = 1..N
    auroc: float | None  # of the confidence at the exit each token takes at this threshold, teacher-forced
    fcs: float | None
    captions: list[str]  # of the first few photos, to look at

    @property
    def mean_cider(self) -> float:
        return sum(self.cider) / len(self.cider)


@dataclass(frozen=True)
class ExitQuality:
    """One exit as a classifier of all reference tokens, teacher-forced (paper section 2.2)."""

    layer: int
    tokens: int
    accuracy: float
    auroc: float | None  # confidence = probability of the predicted word; None where all are easy, or all hard
    fcs: float | None
    entropy_auroc: float | None  # confidence = minus the entropy, by which words leave
    entropy_fcs: float | None
    calibration_error: float  # of the probability, 0 to 1
    reliability: list[list[float]]  # bins: tokens, mean confidence, accuracy


@dataclass(frozen=True)
class ResultRow:
    """One system on one set of photos."""

    system: str  # the configuration's, or the bundle's, name
    budget: str  # rows of one budget and the same photos may be compared
    configuration: dict[str, Any]  # all that training was told but its name; of a bundle its config and revision
    model: dict[str, Any]  # `exits`, `fusion`, `decoder_layers` and the other sizes
    policy: dict[str, Any]  # `ExitPolicy`
    data: dict[str, Any]  # captions, split, photos (how many), names (a digest of theirs), sample (names of a few)
    origin: dict[str, Any]  # command, machine, weights (a digest)
    points: list[Point]  # tau rising, the first 0
    exits: list[ExitQuality]

    @property
    def key(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 over what decides the result."""
        return configuration_key({"configuration": self.configuration, "policy": self.policy, "data": self.data})

    @property
    def layers(self) -> int:
        return int(self.model["decoder_layers"])

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "key": self.key, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ResultRow:
        """Raises `ValueError` for a row of another format, of other fields, or that contradicts itself."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"not a result row of format {FORMAT}")
        told = {name: value for name, value in data.items() if name not in ("format", "key")}
        row = _build(cls, told, "row")
        row = cls(
            **{
                **told,
                "points": [_build(Point, point, "point") for point in row.points],
                "exits": [_build(ExitQuality, one, "exit") for one in row.exits],
            }
        )
        row._check()
        if data.get("key") != row.key:
            raise ValueError(f"its key is {data.get('key')}, and its content's {row.key}: it was changed by hand")
        return row

    def _check(self) -> None:
        photos = self.data["photos"]
        taus = [point.tau for point in self.points]
        if not taus or taus[0] != 0.0 or taus != sorted(set(taus)):
            raise ValueError("points start at tau 0 and rise")
        for point in self.points:
            if len(point.cider) != photos or len(point.depth) != photos or len(point.exit_layers) != self.layers:
                raise ValueError(f"at tau {point.tau}: one CIDEr and depth per photo, one count per layer are needed")
            numbers = [point.speedup, point.executed_speedup, *point.cider, *point.depth]
            if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
                raise ValueError(f"at tau {point.tau}: numbers must be finite")
        if not all(1 <= one.layer <= self.layers for one in self.exits):
            raise ValueError(f"exits are at layers 1 to {self.layers}")


def _build(kind: type, data: Any, where: str) -> Any:
    names = {item.name for item in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        different = sorted(set(data) ^ names) if isinstance(data, dict) else [repr(data)]
        raise ValueError(f"{where}: these do not fit: {', '.join(different)}")
    for item in fields(kind):
        expected = str(item.type).split("[")[0]
        if expected in ("dict", "list", "str") and type(data[item.name]).__name__ != expected:
            raise ValueError(f"{where}: {item.name} must be of type {expected}")
    return kind(**data)


def configuration_key(configuration: Any) -> str:
    """The same for the same content, in whatever order its names are."""
    text = json.dumps(configuration, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def write_row(folder: Path, row: ResultRow) -> Path:
    """Writes `<system>-<key>.json`, in place of a former row of the same key; a list on a line of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{row.system}-{row.key}.json"
    path.write_text(_readable(row.to_json()) + "\n")
    return path


def _readable(value: Any, depth: int = 0) -> str:
    """JSON with objects broken into lines, and lists of plain values left on one."""
    inner = " " * (depth + 1)
    if isinstance(value, dict) and value:
        lines = (f"{inner}{json.dumps(name)}: {_readable(item, depth + 1)}" for name, item in value.items())
        return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = (inner + _readable(item, depth + 1) for item in value)
        return "[\n" + ",\n".join(lines) + "\n" + " " * depth + "]"
    return json.dumps(value, ensure_ascii=False)


def read_rows(folder: Path) -> list[ResultRow]:
    """All rows of a folder, by file name. Raises `ValueError` naming a file that is none; no folder, no rows."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            rows.append(ResultRow.from_json(json.loads(path.read_text())))
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a result row: {error}") from error
    return rows


def comparisons(rows: Iterable[ResultRow]) -> dict[str, list[ResultRow]]:
    """Rows that may stand in one table: of one budget, on the same photos, seen through the same bundle's extractor
    where a bundle's it was. The largest sets of photos come first."""
    groups: dict[tuple[int, str, str, str], list[ResultRow]] = {}
    for row in rows:
        extractor = row.configuration.get("extractor", "")
        groups.setdefault((-row.data["photos"], row.budget, row.data["names"], extractor), []).append(row)
    named: dict[str, list[ResultRow]] = {}
    for (photos, budget, digest, extractor), group in sorted(groups.items()):
        data = group[0].data
        seen = f", seen by extractor {extractor}" if extractor else ""
        name = f"{budget}, {data['captions']} {data['split']}, {-photos:,} photos{seen}"
        named[name if name not in named else f"{name} ({digest})"] = group
    return named
