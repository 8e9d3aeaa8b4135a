"""What the load tests take for a good answer: right ones pass, and each way to be wrong is seen."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from loadtests.answers import Expected, judge, judge_mistake

GOOD: dict[str, Any] = {
    "caption": "a dog runs",
    "confidence": 0.5,
    "words": [
        {"text": "a", "exit_layer": 1, "entropy": 0.1},
        {"text": "dog", "exit_layer": 6, "entropy": 3.0},
        {"text": "runs", "exit_layer": 1, "entropy": 0.2},
    ],
    "speed": {"requested": "fast", "tier": "fast", "tau": 2.7, "promised": 3.0},
    "speedup": 2.25,
    "request_id": "mine",
}
EXPECTED = Expected("fast", layers=6, caption="a dog runs")
PROBLEM = {"status": 503, "code": "overloaded", "detail": "64 wait", "request_id": "mine"}
HEADERS = {"content-type": "application/problem+json", "retry-after": "2"}


def outcome(said: object, status: int = 200, headers: dict[str, str] = HEADERS, expected: Expected = EXPECTED) -> str:
    return judge(status, headers, json.dumps(said).encode(), "mine", expected).outcome


def test_a_good_answer() -> None:
    assert judge(200, {}, json.dumps(GOOD).encode(), "mine", EXPECTED).same is True
    assert judge(200, {}, json.dumps(GOOD).encode(), "mine", Expected("fast", 6, "a cat")).same is False
    assert outcome(GOOD, expected=Expected("fast", 6)) == "ok"
    assert outcome({**GOOD, "speed": {**GOOD["speed"], "requested": 2.5}}, expected=Expected(2.5, 6)) == "ok"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("request_id", "another's"),
        ("caption", ""),
        ("caption", "a cat runs"),
        ("confidence", 1.5),
        ("speedup", 7.0),
        ("words.0.exit_layer", 0),
        ("words.1.exit_layer", 7),
        ("speed.requested", "turbo"),
        ("speed.tau", 0),
        ("words", None),
    ],
)
def test_a_wrong_answer(path: str, value: object) -> None:
    said: Any = copy.deepcopy(GOOD)
    *way, last = path.split(".")
    place = said
    for part in way:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    assert outcome(said) == "failed"


def test_what_is_no_answer_at_all() -> None:
    assert judge(200, {}, b"<html>", "mine", EXPECTED).outcome == "failed"
    assert judge(200, {}, b"{}", "mine", EXPECTED).outcome == "failed"


def test_to_be_refused_is_no_failure_if_it_is_told_how_long() -> None:
    assert outcome(PROBLEM, 503) == "refused"
    assert outcome(PROBLEM, 503, {"content-type": "application/problem+json"}) == "failed"
    assert outcome(PROBLEM, 503, {"content-type": "text/html", "retry-after": "2"}) == "failed"
    assert outcome({**PROBLEM, "status": 504, "code": "deadline_exceeded"}, 504) == "late"
    assert outcome({**PROBLEM, "status": 500, "code": "internal"}, 500) == "failed"
    assert outcome({**PROBLEM, "status": 422, "code": "unknown_speed"}, 422) == "failed"


def test_a_mistake_must_be_told_by_its_code() -> None:
    said = {"status": 415, "code": "not_an_image", "detail": "", "request_id": "mine"}
    body = json.dumps(said).encode()
    assert judge_mistake(415, HEADERS, body, ("not_an_image",)).outcome == "ok"
    assert judge_mistake(415, HEADERS, body, ("empty_body",)).outcome == "failed"
    assert judge_mistake(200, HEADERS, b"{}", ("not_an_image",)).outcome == "failed"
    assert judge_mistake(503, HEADERS, json.dumps(PROBLEM).encode(), ("not_an_image",)).outcome == "refused"
