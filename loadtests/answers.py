"""What became of a request: whether the answer is right, not only whether there is one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["ok", "refused", "late", "failed"]
BUSY = ("overloaded", "stopping", "no_worker", "not_ready", "unavailable")  # 503: told to come again


@dataclass(frozen=True)
class Expected:
    """What the answer must say. `caption`: what this photo got at this speed when nothing else was going on."""

    speed: str | float
    layers: int
    caption: str | None = None


@dataclass(frozen=True)
class Verdict:
    """`why` says what is wrong where the outcome is `failed`. `same`: whether the caption is the expected one."""

    outcome: Outcome
    why: str = ""
    same: bool | None = None


def judge(status: int, headers: Mapping[str, str], body: bytes, request_id: str, expected: Expected) -> Verdict:
    """Of the answer to a good photo."""
    try:
        said = json.loads(body)
        if said["request_id"] != request_id:
            return Verdict("failed", "the answer to another request")
        if status == 200:
            wrong = _wrong(said, expected)
            return Verdict("failed", wrong) if wrong else Verdict("ok", same=_same(said, expected))
        return _problem(status, headers, said)
    except (ValueError, KeyError, TypeError) as error:
        return Verdict("failed", f"{status} and an answer that cannot be read: {error!r}")


def judge_mistake(status: int, headers: Mapping[str, str], body: bytes, codes: tuple[str, ...]) -> Verdict:
    """Of the answer to a mistake: it must be told, by one of these codes."""
    try:
        said = json.loads(body)
        if status < 500 and said["code"] in codes and said["status"] == status:
            return Verdict("ok")
        if status >= 500:
            return _problem(status, headers, said)
    except (ValueError, KeyError, TypeError) as error:
        return Verdict("failed", f"{status} and an answer that cannot be read: {error!r}")
    return Verdict("failed", f"{status} {said['code']} where one of {', '.join(codes)} was due")


def _problem(status: int, headers: Mapping[str, str], said: dict[str, Any]) -> Verdict:
    if said["status"] != status or not headers["content-type"].startswith("application/problem+json"):
        return Verdict("failed", f"{status} in the wrong shape")
    if status == 503 and said["code"] in BUSY:
        return Verdict("refused") if int(headers["retry-after"]) >= 1 else Verdict("failed", "503 without a time")
    if status == 504 and said["code"] == "deadline_exceeded":
        return Verdict("late")
    return Verdict("failed", f"{status} {said['code']}: {said['detail']}")


def _wrong(said: dict[str, Any], expected: Expected) -> str:
    """What contradicts itself or what was asked for; nothing for a good answer."""
    words = said["words"]
    if not said["caption"] or said["caption"].split() != [part for word in words for part in word["text"].split()]:
        return f"caption and words differ: {said['caption']!r}"
    if not all(1 <= word["exit_layer"] <= expected.layers for word in words):
        return "a word left at a layer that is none"
    asked = said["speed"]["requested"]
    if asked != expected.speed and not (isinstance(asked, float) and math.isclose(asked, float(expected.speed))):
        return f"asked for speed {expected.speed}, answered at {asked}"
    if said["speed"]["tau"] == 0 and any(word["exit_layer"] != expected.layers for word in words):
        return "a word left early at full depth"
    if not 0 <= said["confidence"] <= 1 or not 1 <= said["speedup"] <= expected.layers:
        return "confidence or speedup out of range"
    return ""


def _same(said: dict[str, Any], expected: Expected) -> bool | None:
    return None if expected.caption is None else said["caption"] == expected.caption
