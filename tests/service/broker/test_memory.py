"""What only the memory broker does: its dead letters lie in this process's memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.broker import rules
from service.broker.memory import MemoryBroker
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
