"""What only the memory broker does: photos that wait and dead letters lie in this process's memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.broker import rules
from service.broker.base import QueueFullError
from service.broker.memory import MemoryBroker
from service.jobs import Priority
from tests.service.broker.making import Pair, job

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("count", "size", "kept"), [(2, 10**6, ["c", "d"]), (100, 250, ["c", "d"]), (100, 99, ["d"])])
async def test_only_the_newest_dead_letters_are_kept(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int, kept: list[str]
) -> None:
    monkeypatch.setattr(rules, "DEAD_LETTERS_KEPT", count)
    monkeypatch.setattr(rules, "DEAD_BYTES_KEPT", size)
    now = 1e9
    broker = MemoryBroker({"interactive": 10, "batch": 10}, worker_timeout=5, tries=1, clock=lambda: now)
    pair = Pair(broker, broker)
    await pair.join("w")
    for name in "abcd":
        await broker.submit(replace(job(name, deadline=now + 60), image=bytes(100)))
    await pair.take("w")
    now += 6
    await pair.join("v")
    assert await pair.take("v") == []
    assert [letter.id for letter in broker.dead_letters] == kept
    assert (await broker.state()).dead == 4


async def test_the_photos_that_wait_have_a_bound() -> None:
    now = 1e9
    broker = MemoryBroker(
        {"interactive": 10, "batch": 10}, worker_timeout=5, tries=3, clock=lambda: now, waiting_bytes=300
    )
    pair = Pair(broker, broker)
    await pair.join("w")

    async def submit(*names: str, size: int = 100, priority: Priority = "batch") -> None:
        for name in names:
            await broker.submit(replace(job(name, priority, now + 2), image=bytes(size)))

    async def is_full(size: int = 1) -> None:
        with pytest.raises(QueueFullError, match="300 bytes already") as caught:
            await submit("more", size=size)
        assert caught.value.waiting == 2

    await submit("a", "b")
    await submit("c", priority="interactive")
    await is_full()
    await submit("a")  # known, and so not more
    c, a = await pair.take("w", 2)
    assert (c.job.id, a.job.id) == ("c", "a")
    await submit("d", size=200)
    await is_full()
    await broker.cancel("d")
    await broker.give_back("w", [a])
    await submit("e", priority="interactive")
    await is_full()
    now += 3  # too late for all of them: told of one by looking for it, of the others by the next take
    await pair.join("w")
    assert await broker.find("a") is not None
    assert await pair.take("w") == []
    await submit("f", size=300, priority="interactive")
    assert (await pair.take_one("w")).job.id == "f"
    await submit("g", "h", size=150)
    await is_full(size=300)
