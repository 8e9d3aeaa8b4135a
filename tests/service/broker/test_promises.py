"""What `service.broker.base` promises, of both brokers."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from service.broker.base import NoWorkerError, QueueFullError
from tests.service.broker.making import Meet, Pair, ids, job, reply, worker_state

pytestmark = pytest.mark.anyio

SHORT = 0.3  # seconds without a beat after which a worker is dead, where a test lets one die


async def let_die(pair: Pair, *survivors: str) -> None:
    """All workers are dead now but these. What makes them so is that they could have beaten: the store is there."""
    await pair.live(SHORT * 1.2)
    await pair.join(*survivors)


# What travels.


async def test_a_job_and_its_reply_arrive_as_they_were_sent(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    sent = job("a")
    await pair.front.submit(sent)
    delivery = await pair.take_one("w")
    assert delivery.job == sent
    assert (delivery.attempt, delivery.alone) == (1, False)
    answer = reply(sent, "w")
    assert await pair.worker.answer("w", delivery, answer)
    assert await pair.heard_all(1) == [answer]


async def test_time_is_seconds_since_1970(meet: Meet) -> None:
    pair = await meet()
    assert abs(pair.front.clock() - time.time()) < 1
    assert abs(pair.front.clock() - pair.worker.clock()) < 0.5


# Order.


async def test_the_oldest_comes_first(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit(*"abcde")
    assert ids(await pair.take("w", 2)) == ["a", "b"]
    assert ids(await pair.take("w", 100)) == ["c", "d", "e"]
    assert await pair.take("w") == []


async def test_interactive_jobs_come_before_batch_jobs(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("b1", "b2", priority="batch")
    await pair.submit("i1", "i2")
    assert ids(await pair.take("w")) == ["i1", "i2", "b1", "b2"]


@pytest.mark.parametrize("count", [1, 3, 32])
async def test_batch_jobs_get_every_eighth_place(meet: Meet, count: int) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit(*(f"b{i}" for i in range(10)), priority="batch")
    await pair.submit(*(f"i{i}" for i in range(40)))
    came: list[str] = []
    while len(came) < 32:
        came += ids(await pair.take("w", count))
    shares = [[job_id for job_id in came[i : i + 8] if job_id.startswith("b")] for i in range(0, 32, 8)]
    assert shares == [["b0"], ["b1"], ["b2"], ["b3"]]


async def test_an_idle_worker_hears_of_a_job_at_once(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    waiting = asyncio.create_task(pair.take_one("w", seconds=10))
    await asyncio.sleep(0.1)
    began = time.monotonic()
    await pair.submit("a", priority="batch")
    assert (await waiting).job.id == "a"
    assert time.monotonic() - began < 0.5  # it is a few milliseconds


async def test_an_idle_worker_hears_at_once_of_a_job_given_back(meet: Meet) -> None:
    pair = await meet()
    await pair.join("v", "w")
    await pair.submit("a")
    taken = await pair.take("v")
    waiting = asyncio.create_task(pair.take_one("w", seconds=10))
    await asyncio.sleep(0.1)
    began = time.monotonic()
    await pair.worker.give_back("v", taken)
    assert (await waiting).job.id == "a"
    assert time.monotonic() - began < 0.5


async def test_take_waits_as_long_as_it_was_told(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    began = time.monotonic()
    assert await pair.take("w", seconds=0.2) == []
    assert 0.19 <= time.monotonic() - began < 1


async def test_two_idle_workers_do_not_get_the_same_job(meet: Meet) -> None:
    pair = await meet()
    await pair.join("v", "w")
    waiting = [asyncio.create_task(pair.take(worker, seconds=0.3)) for worker in ("v", "w")]
    await asyncio.sleep(0.05)
    await pair.submit("a")
    assert sorted(map(len, await asyncio.gather(*waiting))) == [0, 1]


# Admission.


async def test_so_many_may_wait_of_each_priority(meet: Meet) -> None:
    pair = await meet(depth=2, batch_depth=1)
    await pair.join("w")
    await pair.submit("a", "b")
    with pytest.raises(QueueFullError) as full:
        await pair.submit("c")
    assert full.value.waiting == 2
    await pair.submit("d", priority="batch")
    with pytest.raises(QueueFullError):
        await pair.submit("e", priority="batch")
    assert ids(await pair.take("w", 1)) == ["a"]
    await pair.submit("c")  # what runs does not wait
    assert ids(await pair.take("w")) == ["b", "c", "d"]


async def test_what_comes_back_counts_as_waiting_and_is_never_refused(meet: Meet) -> None:
    pair = await meet(depth=2)
    await pair.join("w")
    await pair.submit("a", "b")
    taken = await pair.take("w")
    await pair.submit("c", "d")
    await pair.worker.give_back("w", taken)
    assert (await pair.front.state()).waiting["interactive"] == 4
    with pytest.raises(QueueFullError) as full:
        await pair.submit("e")
    assert full.value.waiting == 4
    assert ids(await pair.take("w")) == ["a", "b", "c", "d"]


async def test_a_job_known_is_not_enqueued_again(meet: Meet) -> None:
    pair = await meet(depth=2)
    await pair.join("w")
    await pair.submit("a", "b")
    await pair.submit("a")  # the queue is full, but this one is in it
    assert (await pair.front.state()).waiting["interactive"] == 2
    first = await pair.take("w")
    assert ids(first) == ["a", "b"]
    await pair.submit("a")
    assert await pair.take("w") == []
    for delivery in first:
        assert await pair.answer("w", delivery)
    assert await pair.heard() == ["a", "b"]


async def test_a_job_answered_is_answered_again(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a")
    assert await pair.answer("w", await pair.take_one("w"))
    (first,) = await pair.heard_all(1)
    await pair.worker.leave("w")
    await pair.submit("a")  # no worker is needed for it
    assert await pair.heard_all(1) == [first]
    assert (await pair.front.state()).answered == 1


async def test_without_a_worker_nothing_is_taken(meet: Meet) -> None:
    pair = await meet(worker_timeout=SHORT)
    with pytest.raises(NoWorkerError):
        await pair.submit("a")
    await pair.join("w")
    await pair.submit("a")
    await let_die(pair)
    with pytest.raises(NoWorkerError):
        await pair.submit("b")
    await pair.submit("a")  # it is in the queue
    await pair.join("w")
    await pair.submit("b")
    await pair.worker.leave("w")
    with pytest.raises(NoWorkerError):
        await pair.submit("c")
    await pair.join("w")
    assert ids(await pair.take("w")) == ["a", "b"]


# Deadlines and cancelled jobs.


async def test_a_job_past_its_deadline_is_answered_by_the_broker(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("late1", "late2", seconds=0.05)
    await pair.submit("a", "b", "c")
    await pair.submit("late3", priority="batch", seconds=0.05)
    await asyncio.sleep(0.1)
    assert ids(await pair.take("w", 3)) == ["a", "b", "c"]
    assert await pair.take("w") == []
    late = [f"late{i}: deadline_exceeded" for i in (1, 2, 3)]
    assert await pair.heard() == late
    await pair.submit("late2")
    assert await pair.heard() == late[1:2]


async def test_a_deadline_passes_while_the_job_comes_back(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a", seconds=0.1)
    await pair.worker.give_back("w", await pair.take("w"))
    await asyncio.sleep(0.12)
    assert await pair.take("w") == []
    assert await pair.heard() == ["a: deadline_exceeded"]


async def test_a_worker_may_answer_past_the_deadline(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a", seconds=0.05)
    delivery = await pair.take_one("w")
    await asyncio.sleep(0.1)
    assert await pair.answer("w", delivery)
    assert await pair.heard() == ["a"]


async def test_cancelled_while_it_waits(meet: Meet) -> None:
    pair = await meet(depth=2)
    await pair.join("w")
    await pair.submit("a", "b")
    await pair.front.cancel("a")
    await pair.front.cancel("a")
    await pair.front.cancel("never heard of")
    await pair.submit("c")  # its place is free
    assert ids(await pair.take("w")) == ["b", "c"]
    assert await pair.heard() == []


async def test_cancelled_after_it_came_back(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a", "b")
    await pair.worker.give_back("w", await pair.take("w"))
    await pair.front.cancel("a")
    assert (await pair.front.state()).waiting["interactive"] == 1
    assert ids(await pair.take("w")) == ["b"]


async def test_cancelled_while_it_runs(meet: Meet) -> None:
    pair = await meet()
    await pair.join("v", "w")
    await pair.submit("a", "b", "c")
    a, _ = await pair.take("w", 2)
    await pair.take("v", 1)
    await pair.front.cancel("a")
    await pair.front.cancel("c")
    assert await pair.worker.beat(worker_state("w")) == {"a"}
    assert await pair.worker.beat(worker_state("v")) == {"c"}
    assert await pair.answer("w", a)
    assert await pair.answer("w", a)  # it is this worker's, though nobody hears it
    assert await pair.worker.beat(worker_state("w")) == set()
    assert await pair.heard() == []
    await pair.submit("a")  # somebody wants it after all
    assert ids(await pair.take("w")) == ["a"]


@pytest.mark.parametrize("how", ["given back", "left", "died"])
async def test_cancelled_while_it_runs_and_never_done(meet: Meet, how: str) -> None:
    pair = await meet(worker_timeout=SHORT if how == "died" else 30, tries=1)
    await pair.join("v", "w")
    await pair.submit("a")
    taken = await pair.take("w")
    await pair.front.cancel("a")
    if how == "given back":
        await pair.worker.give_back("w", taken)
    elif how == "left":
        await pair.worker.leave("w")
    else:
        await let_die(pair, "v")
    assert await pair.take("v") == []
    state = await pair.front.state()
    assert (state.waiting["interactive"], state.redelivered, state.dead) == (0, 0, 0)
    assert await pair.heard() == []


# Jobs that change hands.


async def test_given_back_jobs_come_first_and_it_was_no_try(meet: Meet) -> None:
    pair = await meet(tries=2)
    await pair.join("v", "w")
    await pair.submit(*"abcd")
    a, b, c = await pair.take("w", 3)
    for _ in range(3):  # more often than it may be tried
        await pair.worker.give_back("w", [c, b])
        b, c = await pair.take("w", 2)
        assert (ids([b, c]), b.attempt, c.alone) == (["b", "c"], 1, False)
    await pair.worker.give_back("v", [a])  # it is not this one's to give
    assert ids(await pair.take("v")) == ["d"]
    for delivery in (a, b, c):
        assert await pair.answer("w", delivery)
    assert await pair.heard() == ["a", "b", "c"]
    assert (await pair.front.state()).redelivered == 0


async def test_what_was_given_back_is_not_this_workers_any_more(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    await pair.submit("a")
    old = await pair.take_one("w")
    await pair.worker.give_back("w", [old])
    assert not await pair.answer("w", old)
    new = await pair.take_one("w")
    assert not await pair.answer("w", old)  # the same worker, the same try, but another delivery
    await pair.worker.give_back("w", [old])
    assert await pair.answer("w", new)
    assert await pair.heard() == ["a"]


async def test_a_dead_workers_jobs_go_to_another_one_by_one(meet: Meet) -> None:
    pair = await meet(worker_timeout=SHORT)
    await pair.join("w")
    await pair.submit("a", "b")
    await pair.take("w")
    await pair.submit("c", "d")
    await let_die(pair, "v")
    came = [await pair.take("v", 8) for _ in range(3)]
    assert [ids(each) for each in came] == [["a"], ["b"], ["c", "d"]]
    assert [(each[0].attempt, each[0].alone) for each in came] == [(2, True), (2, True), (1, False)]
    state = await pair.front.state()
    assert (state.redelivered, state.dead, [worker.id for worker in state.workers]) == (2, 0, ["v"])
    for each in came:
        for delivery in each:
            assert await pair.answer("v", delivery)
    assert await pair.heard() == ["a", "b", "c", "d"]


async def test_a_suspect_does_not_come_with_others_in_front_of_it(meet: Meet) -> None:
    pair = await meet(worker_timeout=SHORT)
    await pair.join("w")
    await pair.submit("suspect", priority="batch")
    await pair.take("w")
    await pair.submit("a")
    await let_die(pair, "v")
    assert [ids(await pair.take("v", 8)) for _ in range(2)] == [["a"], ["suspect"]]


async def test_an_idle_worker_notices_that_another_died(meet: Meet) -> None:
    pair = await meet(worker_timeout=SHORT)
    await pair.join("w")
    await pair.submit("a")
    await pair.take("w")
    await asyncio.sleep(SHORT / 2)
    await pair.join("v")
    waiting = asyncio.create_task(pair.take_one("v", seconds=10))
    for _ in range(50):
        await asyncio.sleep(SHORT / 4)
        await pair.join("v")
        if waiting.done():
            break
    assert (await waiting).attempt == 2


async def test_a_worker_stopped_and_continued_cannot_answer_twice(meet: Meet) -> None:
    pair = await meet(worker_timeout=SHORT)
    await pair.join("w")
    await pair.submit("a", "b")
    old_a, old_b = await pair.take("w")
    await let_die(pair, "v")
    new_a = await pair.take_one("v")
    await pair.join("w")
    assert not await pair.answer("w", old_a)  # running elsewhere
    assert not await pair.answer("w", old_b)  # waiting
    await pair.worker.give_back("w", [old_a, old_b])
    assert await pair.answer("v", new_a)
    assert not await pair.answer("w", old_a)  # answered elsewhere
    again = await pair.take_one("w")
    assert (again.job.id, again.attempt) == ("b", 2)
    assert not await pair.answer("w", old_b)  # the same worker, but an older delivery
    assert await pair.answer("w", again)
    replies = await pair.heard_all(2)
    assert [(each.job_id, each.worker) for each in replies] == [("a", "v"), ("b", "w")]
    assert await pair.heard() == []


async def test_a_worker_taken_for_dead_whose_jobs_nobody_took_may_answer(meet: Meet) -> None:
    pair = await meet(worker_timeout=SHORT)
    await pair.join("w")
    await pair.submit("a", "b")
    a, b = await pair.take("w")
    await let_die(pair)
    assert await pair.answer("w", a)
    await pair.join("w")
    assert await pair.take("w") == []
    assert await pair.answer("w", b)
    assert await pair.heard() == ["a", "b"]
    assert (await pair.front.state()).redelivered == 0


async def test_only_a_joined_worker_is_handed_jobs(meet: Meet) -> None:
    pair = await meet(worker_timeout=SHORT)
    await pair.join("w")
    await pair.submit("a")
    assert await pair.take("stranger") == []
    await let_die(pair)
    assert await pair.take("w") == []
    await pair.join("w")
    assert ids(await pair.take("w")) == ["a"]


async def test_after_too_many_tries_a_job_is_given_up(meet: Meet) -> None:
    pair = await meet(worker_timeout=SHORT, tries=2)
    await pair.join("w1")
    await pair.submit("poison", "good")
    await pair.take("w1")
    await let_die(pair, "w2")
    assert ids(await pair.take("w2")) == ["poison"]
    await let_die(pair, "w3")
    (good,) = await pair.take("w3")
    assert (good.job.id, good.attempt) == ("good", 2)
    assert await pair.answer("w3", good)
    assert await pair.heard() == ["poison: poison", "good"]
    state = await pair.front.state()
    assert (state.dead, state.redelivered, state.answered) == (1, 2, 2)
    await pair.submit("poison")  # it is not tried again
    assert await pair.heard() == ["poison: poison"]
    assert await pair.take("w3") == []


async def test_a_worker_that_leaves_gives_back_what_it_has(meet: Meet) -> None:
    pair = await meet()
    await pair.join("v", "w")
    await pair.submit("a")
    old = await pair.take_one("w")
    await pair.worker.leave("w")
    assert [worker.id for worker in (await pair.front.state()).workers] == ["v"]
    new = await pair.take_one("v")
    assert new.attempt == 1
    assert not await pair.answer("w", old)
    assert await pair.take("w") == []
    await pair.join("w")
    await pair.submit("b")
    assert ids(await pair.take("w")) == ["b"]


async def test_answering_twice_is_told_truly_and_heard_once(meet: Meet) -> None:
    pair = await meet()
    await pair.join("v", "w")
    await pair.submit("a")
    delivery = await pair.take_one("w")
    assert not await pair.answer("v", delivery)
    assert await pair.answer("w", delivery)
    assert await pair.answer("w", delivery)
    assert not await pair.answer("v", delivery)
    assert await pair.heard() == ["a"]
    assert (await pair.front.state()).answered == 1


# What a broker tells.


async def test_state(meet: Meet) -> None:
    pair = await meet()
    empty = await pair.front.state()
    assert (dict(empty.waiting), empty.oldest, empty.workers) == ({"interactive": 0, "batch": 0}, 0.0, ())
    await pair.worker.beat(worker_state("w", running=1))
    await pair.worker.beat(worker_state("v", running=2))
    await pair.worker.beat(worker_state("w", running=3))
    await pair.submit("a")
    await asyncio.sleep(0.1)
    await pair.submit("b", priority="batch")
    await asyncio.sleep(0.1)
    state = await pair.front.state()
    assert dict(state.waiting) == {"interactive": 1, "batch": 1}
    assert 0.19 <= state.oldest < 1
    assert sorted(state.workers, key=lambda worker: worker.id) == [worker_state("v", 2), worker_state("w", 3)]
    a = await pair.take_one("w")
    assert 0.19 <= a.waited < 1
    state = await pair.front.state()
    assert dict(state.waiting) == {"interactive": 0, "batch": 1}
    assert 0.09 <= state.oldest < 0.19
    await pair.worker.give_back("w", [a])
    state = await pair.front.state()
    assert state.waiting["interactive"] == 1
    assert state.oldest >= 0.19  # since it was submitted, not since it came back
    for delivery in await pair.take("w"):
        await pair.answer("w", delivery)
    state = await pair.front.state()
    assert (sum(state.waiting.values()), state.oldest, state.answered) == (0, 0.0, 2)


# Cancelled calls.


async def test_no_reply_is_lost_by_cancelling_replies(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    rng = random.Random(1)
    names = [f"job{i}" for i in range(40)]

    async def work() -> None:
        for name in names:
            await pair.submit(name)
            await pair.answer("w", await pair.take_one("w"))
            await asyncio.sleep(rng.uniform(0, 0.002))

    working = asyncio.create_task(work())
    heard: list[str] = []
    async with asyncio.timeout(10):
        while len(heard) < len(names):
            listening = asyncio.create_task(pair.front.replies())
            await asyncio.sleep(rng.uniform(0, 0.003))
            if not listening.cancel():
                heard += [each.job_id for each in await listening]
    await working
    assert heard == names
    assert await pair.heard() == []


async def test_no_job_is_lost_by_cancelling_take(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    rng = random.Random(2)
    names = {f"job{i}" for i in range(40)}
    answered: list[str] = []
    cancelled = 0

    async def load() -> None:
        for name in names:
            await pair.submit(name)
            await asyncio.sleep(rng.uniform(0, 0.005))

    loading = asyncio.create_task(load())
    async with asyncio.timeout(10):
        while len(answered) < len(names):
            taking = asyncio.create_task(pair.take("w", rng.randint(1, 3), seconds=0.05))
            await asyncio.sleep(rng.uniform(0, 0.003))
            if taking.cancel():
                cancelled += 1
                continue
            for delivery in await taking:
                assert delivery.attempt == 1
                assert await pair.answer("w", delivery)
                answered.append(delivery.job.id)
    await loading
    assert cancelled > 0
    assert set(answered) == names
    assert sorted(await pair.heard()) == sorted(names)


async def test_a_job_cancelled_while_it_is_being_submitted_is_gone(meet: Meet) -> None:
    pair = await meet()
    await pair.join("w")
    for i in range(50):
        submitting = asyncio.create_task(pair.submit(f"job{i}"))
        for _ in range(i % 5):
            await asyncio.sleep(0)
        submitting.cancel()
        await pair.front.cancel(f"job{i}")
    assert await pair.take("w") == []
