"""The Redis broker beside one of another version, and beside programs that write what they like."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from service.broker import rules
from service.jobs import Job, Refusal, Reply
from tests.service.broker.making import Pair, ids, job, reply, worker_state

pytestmark = pytest.mark.anyio

OLD_FIELDS = {  # of the first version, which refuses all others
    *("id", "speed", "tau", "beam", "priority", "deadline"),
    *("request_id", "traceparent"),
}


async def put(raw: Redis, queue: str, wire: dict[str, Any], **fields: str | bytes) -> None:
    """An entry as a front of another version would write it."""
    entry = {"id": "x", "deadline": "1e12", "job": json.dumps(wire), "image": b"\xff", **fields}
    await raw.xadd(f"{{deecap:{queue}}}:interactive", entry)


def wire_of(asked: Job) -> dict[str, Any]:
    wire: dict[str, Any] = json.loads(asked.to_wire()["job"])
    return wire


async def test_a_job_of_a_later_version_is_done(pair: Pair, raw: Redis, queue: str) -> None:
    await put(raw, queue, {**wire_of(job("x")), "wishes": [1, {"of": "later"}], "beam": 3})
    delivery = await pair.take_one("w")
    assert delivery.job == replace(job("x"), image=b"\xff", beam=3, deadline=delivery.job.deadline)


async def test_a_job_of_an_earlier_version_is_done(pair: Pair, raw: Redis, queue: str) -> None:
    wire = wire_of(job("x"))
    await put(raw, queue, {name: wire[name] for name in OLD_FIELDS - {"request_id", "traceparent"}})
    delivery = await pair.take_one("w")
    assert (delivery.job.request_id, delivery.job.kept, delivery.job.stream) == ("", 0.0, False)
    assert delivery.job.regions  # that front does not say so, and may answer with them


def test_an_earlier_version_can_read_a_job_that_asks_for_nothing_new() -> None:
    assert set(wire_of(job("x"))) == OLD_FIELDS
    assert set(wire_of(replace(job("x"), stream=True))) == OLD_FIELDS | {"stream"}


async def test_a_worker_of_a_later_version_is_listed(pair: Pair, raw: Redis, queue: str) -> None:
    said = json.loads(worker_state("w").to_wire())
    said["mood"] = said["model"]["mood"] = said["model"]["speeds"]["mood"] = "fine"
    said["model"]["speeds"]["rows"][0]["watts"] = 12.5
    await raw.hset(f"{{deecap:{queue}}}:workers", "w", json.dumps(said))
    assert (await pair.front.state()).workers == (worker_state("w"),)


async def test_a_reply_of_a_later_version_is_read(pair: Pair) -> None:
    class Later(Reply):
        def to_wire(self) -> bytes:
            said = json.loads(super().to_wire())
            said["mood"] = said["answer"]["mood"] = said["answer"]["caption"]["steps"][0]["mood"] = "fine"
            return json.dumps(said).encode()

    await pair.submit("a")
    delivery = await pair.take_one("w")
    sent = reply(delivery.job, "w")
    assert await pair.worker.answer("w", delivery, Later(**vars(sent)))
    assert await pair.heard_all(1) == [sent]


# What cannot be read.


async def test_a_worker_that_cannot_be_read_is_not_listed_but_counts(
    pair: Pair, raw: Redis, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    await raw.hset(f"{{deecap:{queue}}}:workers", "w", '{"new": 1}')
    for _ in range(5):
        assert (await pair.front.state()).workers == ()
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]  # and not with every look
    assert "a worker cannot be listed" in warning.message
    assert "WorkerState.id is missing" in warning.message
    await pair.submit("a")
    assert ids(await pair.take("w")) == ["a"]


async def test_a_reply_that_cannot_be_read_does_not_keep_the_others(
    pair: Pair, raw: Redis, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    await pair.submit("a", "b")
    front, *_ = {await raw.hget(key, "front") async for key in raw.scan_iter(f"{{deecap:{queue}}}:job:*")}
    for wrong in ({"reply": "nonsense"}, {"reply": '{"id": "b"}'}, {"words": '{"job_id": "b"}'}, {"later": "kind"}):
        await raw.xadd(f"{{deecap:{queue}}}:replies:{front.decode()}", wrong)
    assert await pair.answer("w", await pair.take_one("w"))
    unreadable, answer = await pair.heard_all(2)
    assert unreadable == Reply("b", rules.UNREADABLE_REPLY)  # who waits for it need not wait until its deadline
    assert answer.job_id == "a"
    assert any("a reply cannot be read" in record.message for record in caplog.records)


WHOLE = wire_of(job("x"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"job": "not json"},
        {"job": "5"},
        {"job": '{"id": "x"}'},
        {"job": b"\xff"},
        {"deadline": "soon"},
        *(
            {"job": json.dumps({**WHOLE, name: value})}
            for name, value in (
                ("id", "another"),
                ("id", 5),
                ("beam", "1"),
                ("beam", True),
                ("beam", 1.5),
                ("speed", ["fast"]),
                ("speed", float("nan")),
                ("tau", "cold"),
                ("deadline", None),
                ("deadline", float("inf")),
                ("priority", "urgent"),
                ("priority", ["batch"]),
                ("max_speed", "turbo"),
                ("stream", 1),
                ("kept", float("inf")),
                ("tau", 10**400),
            )
        ),
    ],
)
async def test_an_entry_that_is_no_job_becomes_a_dead_letter(
    pair: Pair, raw: Redis, queue: str, wrong: dict[str, str | bytes]
) -> None:
    await put(raw, queue, WHOLE, **wrong)
    await pair.submit("good")
    assert ids(await pair.take("w")) == ["good"]
    state = await pair.front.state()
    assert (state.dead, state.waiting["interactive"]) == (1, 0)
    ((_, letter),) = await raw.xrange(f"{{deecap:{queue}}}:dead")
    assert (letter[b"why"], letter[b"image"]) == (b"unreadable", b"\xff")


@pytest.mark.parametrize(
    "fields",
    [{"hello": "world"}, {f"field{i}": "" for i in range(9000)}, {"id": "x", "deadline": "1e12", "job": "{}"}],
    ids=["foreign", "more than Lua can unpack", "no image"],
)
async def test_an_entry_with_other_fields_becomes_a_dead_letter(
    pair: Pair, raw: Redis, queue: str, fields: dict[str, str]
) -> None:
    await raw.xadd(f"{{deecap:{queue}}}:interactive", fields)
    await pair.submit("good")
    assert ids(await pair.take("w")) == ["good"]
    assert (await pair.front.state()).dead == 1


async def test_the_front_of_an_unreadable_job_is_told(pair: Pair) -> None:
    class Unreadable(Job):
        def to_wire(self) -> dict[str, bytes]:
            return {"job": b'{"new": 1}', "image": b""}

    await pair.front.submit(Unreadable(**vars(job("a"))))
    assert await pair.take("w") == []
    (said,) = await pair.heard_all(1)
    assert isinstance(said.outcome, Refusal)
    assert (said.job_id, said.outcome) == ("a", rules.UNREADABLE)
