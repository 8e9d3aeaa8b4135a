"""`service.wire`: what may be read as what, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest

from model.caption import Word
from model.exits import ResolvedSpeed
from service import wire
from service.jobs import Answer, Progress, Reply, WorkerState
from tests.service.fakes import SPEEDS, answer_to, worker_state
from tests.service.test_front import job


@dataclass(frozen=True)
class Part:
    number: float
    name: str | None = None


@dataclass(frozen=True)
class Whole:
    count: int
    flag: bool
    kind: Literal["a", "b"]
    pair: tuple[int, str]
    parts: tuple[Part, ...]
    table: dict[str, float]
    anything: Any = None
    either: str | float | None = None
    many: dict[str, Any] = field(default_factory=dict)


GOOD: dict[str, Any] = {
    "count": 1,
    "flag": False,
    "kind": "b",
    "pair": [1, "x"],
    "parts": [{"number": 2}, {"number": 0.5, "name": "n", "later": 1}],
    "table": {"x": 1},
    "later": {"unknown": True},
}


def test_what_is_known_is_read_and_the_rest_passed_over() -> None:
    whole = wire.read(Whole, GOOD)
    assert whole == Whole(1, False, "b", (1, "x"), (Part(2.0), Part(0.5, "n")), {"x": 1.0})
    assert type(whole.parts[0].number) is float
    assert wire.read(Whole, {**GOOD, "either": 3, "anything": [1]}).either == 3.0


@pytest.mark.parametrize("missing", ["count", "flag", "kind", "pair", "parts", "table"])
def test_what_has_no_default_must_be_there(missing: str) -> None:
    with pytest.raises(ValueError, match=f"Whole.{missing} is missing"):
        wire.read(Whole, {name: value for name, value in GOOD.items() if name != missing})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", True),
        ("count", 1.0),
        ("count", None),
        ("flag", 0),
        ("kind", "c"),
        ("kind", ["a"]),
        ("pair", [1]),
        ("pair", ["x", 1]),
        ("pair", "1x"),
        ("parts", {"number": 1}),
        ("parts", [{"number": "1"}]),
        ("parts", [[1]]),
        ("parts", [{"number": 1, "name": 5}]),
        ("parts", [{"number": 10**400}]),
        ("table", {"x": "y"}),
        ("table", []),
        ("either", True),
        ("either", []),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name if name != "parts" else r"Part|Whole\.parts"):
        wire.read(Whole, {**GOOD, name: value})


@pytest.mark.parametrize("said", [None, 5, [], "x"])
def test_what_is_no_object_is_refused(said: object) -> None:
    with pytest.raises(ValueError, match="Whole must be an object"):
        wire.read(Whole, said)


def test_answers_words_and_states_come_back_as_they_were() -> None:
    reply = answer_to(job("1"))
    assert isinstance(reply.outcome, Answer)
    moved = Answer(**{**vars(reply.outcome), "asked": ResolvedSpeed(2.0, None, 1.0, 2.0)})
    for each in (reply, Reply("1", moved, "w")):
        assert Reply.from_wire(each.to_wire()) == each
    words = Progress("1", 2, 3, (Word("a", 1, 0.5, -0.25), Word("b", 6, 0.0, 0.0)))
    assert Progress.from_wire(words.to_wire()) == words
    state = worker_state()
    assert WorkerState.from_wire(state.to_wire()) == state
    assert state.model.speeds == SPEEDS


@pytest.mark.parametrize("change", [{"rows": []}, {"tiers": {"full": 0.0}}, {"rows": [{"tau": 1.0}]}])
def test_a_speed_table_that_is_none_is_refused(change: dict[str, Any]) -> None:
    said = json.loads(worker_state().to_wire())
    said["model"]["speeds"].update(change)
    with pytest.raises(ValueError, match=r"speed table|SpeedRow"):
        WorkerState.from_wire(json.dumps(said).encode())


@pytest.mark.parametrize(
    "data", [b"", b"5", b"{}", b'{"id": 1, "refusal": {"code": "x", "detail": "y"}}', b'{"id": "x"}']
)
def test_a_reply_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (each says something else)
        Reply.from_wire(data)


def test_a_reply_without_a_worker_is_the_brokers() -> None:
    assert Reply.from_wire(b'{"id": "x", "refusal": {"code": "x", "detail": "y"}}').worker == ""
    both = json.dumps(
        {"id": "x", "refusal": {"code": "x", "detail": "y"}, "answer": asdict(answer_to(job("1")).outcome)}
    )
    with pytest.raises(ValueError, match="an answer or a refusal"):
        Reply.from_wire(both.encode())
