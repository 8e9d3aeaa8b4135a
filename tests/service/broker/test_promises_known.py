"""What `service.broker.base` promises, of both brokers: words as they come, and jobs that are known for longer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from service.broker import rules
from service.broker.base import Delivery, Found
from service.jobs import Progress, Reply
from tests.service.broker.making import Meet, Pair, ids, job, progress, reply, summary, worker_state
from tests.service.broker.test_promises import SHORT, let_die

pytestmark = pytest.mark.anyio


async def found(pair: Pair, *names: str) -> list[str | int | None]:
    """The state of each; of a queued one its position."""
    all_found = [await pair.front.find(name) for name in names]
    return [None if each is None else each.state if each.position is None else each.position for each in all_found]


# Words.


async def test_words_come_before_the_reply_and_in_order(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a", "b")
    a, b = await pair.take("w")
    await pair.tell("w", a, 0, "two")
    await pair.worker.tell("w", [(a, progress(a, 1, "dogs", "in")), (b, progress(b, 0, "a"))])
    await pair.worker.tell("w", [])
    await pair.tell("w", a, 3, "snow")
    assert await pair.answer("w", a)
    assert await pair.answer("w", b)
    assert await pair.heard() == ["a+two", "a+dogs in", "b+a", "a+snow", "a", "b"]


async def test_words_arrive_as_they_were_told(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a")
    delivery = await pair.take_one("w")
    told = progress(delivery, 3, "snow", "")
    await pair.worker.tell("w", [(delivery, told)])
    async with asyncio.timeout(5):
        assert list(await pair.front.replies()) == [told]


async def answered(pair: Pair, delivery: Delivery) -> None:
    assert await pair.answer("w", delivery)
    assert await pair.heard() == ["a"]


async def given_back(pair: Pair, delivery: Delivery) -> None:
    await pair.worker.give_back("w", [delivery])


async def given_back_and_taken_again(pair: Pair, delivery: Delivery) -> None:
    await given_back(pair, delivery)
    await pair.take_one("w")


async def taken_over(pair: Pair, delivery: Delivery) -> None:
    await let_die(pair, "v")
    assert (await pair.take_one("v")).attempt == 2


async def cancelled(pair: Pair, delivery: Delivery) -> None:
    await pair.front.cancel(delivery.job.id)


@pytest.mark.parametrize("happens", [answered, given_back, given_back_and_taken_again, taken_over, cancelled])
async def test_words_of_a_job_that_is_not_the_workers_are_dropped(
    meet: Meet, happens: Callable[[Pair, Delivery], Awaitable[None]]
) -> None:
    pair = await meet(worker_timeout=SHORT if happens is taken_over else 30)
    await pair.join("w")
    await pair.submit("a")
    delivery = await pair.take_one("w")
    await pair.tell("v", delivery, 0, "wrong")
    await pair.tell("w", delivery, 0, "before")
    assert await pair.heard() == ["a+before"]
    await happens(pair, delivery)
    await pair.tell("w", delivery, 1, "after")
    assert await pair.heard() == []


async def test_words_of_the_next_try_are_told_as_such(meet: Meet) -> None:
    pair = await meet(worker_timeout=SHORT)
    await pair.join("w")
    await pair.submit("a")
    await pair.tell("w", await pair.take_one("w"), 0, "two")
    await let_die(pair, "v")
    again = await pair.take_one("v")
    await pair.tell("v", again, 0, "two")
    heard: list[Reply | Progress] = []
    async with asyncio.timeout(5):
        while len(heard) < 2:
            heard += await pair.front.replies()
    assert [each.attempt for each in heard if isinstance(each, Progress)] == [1, 2]


async def test_words_of_a_cancelled_job_are_not_heard_later(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a")
    delivery = await pair.take_one("w")
    await pair.front.cancel("a")
    await pair.tell("w", delivery, 0, "two")
    await pair.submit("a")
    await pair.tell("w", delivery, 1, "dogs")  # somebody waits for it again
    assert await pair.heard() == ["a+dogs"]


# Reminders.


async def test_a_job_that_is_known_need_not_be_submitted_again(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    assert not await pair.front.remind("a")
    await pair.submit("a", "b")
    assert await pair.front.remind("a")
    assert (await pair.front.state()).waiting["interactive"] == 2
    a, b = await pair.take("w")
    assert await pair.front.remind("a")
    assert await pair.take("w") == []
    assert await pair.answer("w", a)
    assert await pair.heard() == ["a"]
    assert await pair.front.remind("a")
    assert await pair.heard() == ["a"]  # answered again
    assert (await pair.front.state()).answered == 1
    assert await pair.answer("w", b)


async def test_a_job_that_came_back_is_known(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a")
    await pair.worker.give_back("w", await pair.take("w"))
    assert await pair.front.remind("a")
    assert ids(await pair.take("w")) == ["a"]


async def test_a_reminder_revives_a_job_that_runs_and_was_cancelled(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("runs", "waits")
    delivery = await pair.take_one("w")
    await pair.front.cancel("runs")
    await pair.front.cancel("waits")
    assert not await pair.front.remind("waits")
    assert await pair.front.remind("runs")
    assert await pair.worker.beat(worker_state("w")) == set()
    assert await pair.answer("w", delivery)
    assert await pair.heard() == ["runs"]


async def test_what_was_answered_to_nobody_must_be_submitted_again(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a")
    delivery = await pair.take_one("w")
    await pair.front.cancel("a")
    assert await pair.answer("w", delivery)
    assert not await pair.front.remind("a")


# Where a job is.


async def test_a_job_is_found_wherever_it_is(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a", "b", "c")
    await pair.submit("x", "y", priority="batch")
    assert await found(pair, *"abcxyz") == [0, 1, 2, 0, 1, None]
    a, b = await pair.take("w", 2)
    assert await found(pair, *"abcx") == ["running", "running", 0, 0]
    await pair.worker.give_back("w", [b])
    assert await found(pair, *"abc") == ["running", 0, 1]
    await pair.front.cancel("b")
    assert await found(pair, *"bc") == [None, 0]
    assert await pair.answer("w", a)
    assert await pair.front.find("a") == Found("done", reply=reply(a.job, "w"))
    (c,) = await pair.take("w", 1)
    await pair.front.cancel("c")
    assert await found(pair, "c") == [None]
    assert await pair.answer("w", c)
    assert await found(pair, "c") == [None]


async def test_places_in_the_queue_hold_for_many(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    names = [f"job{i}" for i in range(60)]
    await pair.submit(*names)
    back = await pair.take("w", 30)
    await pair.worker.give_back("w", [back[i] for i in range(29, -1, -3)])
    waits = [name for i, name in enumerate(names) if i >= 30 or i % 3 == 2]
    assert await found(pair, *waits) == list(range(len(waits)))
    assert ids(await pair.take("w", 5)) == waits[:5]
    assert await found(pair, *waits) == ["running"] * 5 + list(range(len(waits) - 5))
    assert ids(await pair.take("w", 100)) == waits[5:]


async def test_a_note_is_found_with_the_job(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.front.submit(replace(job("a"), note="first: ä"))
    await pair.front.submit(replace(job("a"), note="second"))
    notes = []

    async def look() -> None:
        seen = await pair.front.find("a")
        assert seen is not None
        notes.append(seen.note)

    await look()
    delivery = await pair.take_one("w")
    await look()
    assert await pair.answer("w", delivery)
    await look()
    assert notes == ["first: ä"] * 3


async def test_a_job_that_no_worker_came_for_is_found_to_be_late(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a", "b", seconds=0.1)
    await pair.worker.leave("w")
    await asyncio.sleep(0.12)
    seen = await pair.front.find("a")
    assert seen is not None
    assert seen.reply is not None
    assert summary(seen.reply) == "a: deadline_exceeded"
    assert await pair.heard() == ["a: deadline_exceeded"]
    assert (await pair.front.state()).waiting["interactive"] == 1


async def test_a_job_of_a_dead_worker_is_found_to_be_late(meet: Meet) -> None:
    pair = await meet(worker_timeout=SHORT)
    await pair.join("w")
    await pair.submit("late", "early", seconds=0.1)
    await pair.submit("in time")
    late, _, _ = await pair.take("w")
    await pair.live(0.12)
    await pair.join("w")
    assert await found(pair, "late", "in time") == ["running"] * 2  # its worker lives: it may be answered yet
    await pair.live(SHORT + 0.05)  # and no other worker comes
    assert await found(pair, "late", "in time") == ["done", "running"]
    seen = await pair.front.find("late")
    assert seen is not None
    assert seen.reply is not None
    assert summary(seen.reply) == "late: deadline_exceeded"
    assert not await pair.answer("w", late)
    assert await pair.heard() == ["late: deadline_exceeded"]


async def test_an_outcome_is_kept_as_long_as_was_asked(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "REPLY_KEPT", 0.4)
    pair = await meet()
    await pair.join("w")
    for name, kept in (("usual", 0.0), ("long", 1e300), ("short", 0.01), ("refused", 60.0)):
        left = 0.05 if name == "refused" else 60
        await pair.front.submit(replace(job(name, deadline=pair.front.clock() + left), kept=kept))
    await asyncio.sleep(0.06)
    for delivery in await pair.take("w"):
        assert await pair.answer("w", delivery)
    names = ("usual", "long", "short", "refused")
    assert await found(pair, *names) == ["done"] * 4
    await asyncio.sleep(0.45)
    assert await found(pair, *names) == [None, "done", None, "done"]
    assert await pair.front.remind("long")
    assert not await pair.front.remind("usual")


async def test_kept_outcomes_have_a_bound_and_the_oldest_go_first(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(reply(job("a"), "w").to_wire())
    monkeypatch.setattr(rules, "KEPT_BYTES", 3 * size)
    monkeypatch.setattr(rules, "REPLY_KEPT", 0.4)
    pair = await meet()
    await pair.join("w")

    async def answer(*names: str, kept: float = 60.0, note: str = "") -> None:
        for name in names:
            await pair.front.submit(replace(job(name), kept=kept, note=note))
            assert await pair.answer("w", await pair.take_one("w"))

    await answer("a", "b", "c")
    await answer(*"xyz", kept=0.0)  # known for resubmission only: not among them
    assert await found(pair, *"abcxyz") == ["done"] * 6
    await answer("d")
    assert await found(pair, *"abcd") == [None, "done", "done", "done"]
    await pair.front.forget("c")
    await answer("e")
    assert await found(pair, *"bcdexyz") == ["done", None] + ["done"] * 5
    await answer("a")  # again, under an id that was forgotten
    assert await found(pair, *"bdea") == [None] + ["done"] * 3
    await answer("f", note="n" * size)
    assert await found(pair, *"deaf") == [None, None, "done", "done"]
    for name in "af":
        await pair.front.forget(name)
    await answer("g", "h", "i", kept=0.5)
    await asyncio.sleep(0.55)
    await answer("j", "k", "l")  # what has gone by itself does not count
    assert await found(pair, *"ghijkl") == [None] * 3 + ["done"] * 3


# Giving up.


async def test_giving_up_says_where_the_job_was(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a", "b")
    a = await pair.take_one("w")
    assert await pair.front.cancel("a") == "running"
    assert await pair.front.cancel("a") is None
    assert await pair.front.cancel("b") == "queued"
    assert await pair.front.cancel("b") is None
    assert await pair.answer("w", a)
    assert await pair.front.cancel("a") is None


async def test_a_forgotten_job_is_nowhere(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("done", "runs", "waits")
    done, _ = await pair.take("w", 2)
    assert await pair.answer("w", done)
    assert await pair.heard() == ["done"]
    await pair.front.cancel("done")
    assert await found(pair, "done", "runs", "waits") == ["done", "running", 0]  # a front that went leaves it to others
    for name in ("done", "runs", "waits", "unknown"):
        await pair.front.forget(name)
    assert await found(pair, "done", "runs", "waits") == [None] * 3
    assert await pair.worker.beat(worker_state("w")) == {"runs"}
    assert await pair.take("w") == []
    assert not await pair.front.remind("done")


@pytest.mark.parametrize("first", [None, "cancelled", "answered before"])
async def test_the_id_of_a_forgotten_job_is_another_jobs(meet: Meet, first: str | None) -> None:
    pair = await meet()
    await pair.join("v", "w")
    await pair.submit("a")
    old = await pair.take_one("w")
    if first == "cancelled":
        await pair.front.cancel("a")
    await pair.front.forget("a")
    assert not await pair.front.remind("a")
    await pair.front.submit(replace(job("a"), image=job("a").image + b" other", note="other"))
    assert await pair.front.find("a") == Found("queued", 0, note="other")
    assert await pair.worker.beat(worker_state("w")) == {"a"}
    assert await pair.worker.beat(worker_state("v")) == set()
    await pair.tell("w", old, 0, "old")
    new = await pair.take_one("v")
    assert (new.job.image, new.attempt) == (job("a").image + b" other", 1)
    if first == "answered before":
        assert await pair.answer("v", new)
        assert await pair.answer("w", old)
    else:
        assert await pair.answer("w", old)
        assert await pair.front.find("a") == Found("running", note="other")
        assert await pair.answer("v", new)
    assert await pair.front.find("a") == Found("done", reply=reply(new.job, "v"), note="other")
    assert await pair.heard_all(1) == [reply(new.job, "v")]
    assert await pair.heard() == []
    assert await pair.worker.beat(worker_state("w")) == await pair.worker.beat(worker_state("v")) == set()
    assert await pair.take("w") == []


async def test_forgotten_twice_is_nowhere_though_both_are_answered(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    for _ in range(2):
        await pair.submit("a")
        await pair.front.forget("a")  # while it waits
        await pair.submit("a")
        delivery = await pair.take_one("w")
        await pair.front.forget("a")
        await pair.answer("w", delivery)
        assert await found(pair, "a") == [None]
    await pair.submit("a")
    assert ids(await pair.take("w")) == ["a"]
    assert await pair.heard() == []


@pytest.mark.parametrize("how", ["given back", "left", "died"])
async def test_a_forgotten_job_does_not_come_back(meet: Meet, how: str) -> None:
    pair = await meet(worker_timeout=SHORT if how == "died" else 30, tries=1)
    await pair.join("v", "w")
    await pair.submit("a")
    taken = await pair.take("w")
    await pair.front.forget("a")
    await pair.front.submit(replace(job("a"), note="other"))
    if how == "given back":
        await pair.worker.give_back("w", taken)
    elif how == "left":
        await pair.worker.leave("w")
    else:
        await let_die(pair, "v")
    (new,) = await pair.take("v")
    assert (new.job.note, new.attempt) == ("other", 1)
    assert await pair.take("v") == []
    state = await pair.front.state()
    assert (state.waiting["interactive"], state.redelivered, state.dead) == (0, 0, 0)
    assert await pair.worker.beat(worker_state("w")) == set()


# Large photos.


async def test_large_photos_come_a_few_at_a_time(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "TAKE_BYTES", 1000)
    pair = await meet()
    await pair.join("w")
    for name, size in (("a", 400), ("b", 400), ("c", 400), ("d", 5000), ("e", 10), ("f", 10)):
        await pair.front.submit(replace(job(name), image=bytes(size)))
    assert [ids(await pair.take("w")) for _ in range(4)] == [["a", "b", "c"], ["d"], ["e", "f"], []]
