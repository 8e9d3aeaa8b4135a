"""`Front`: words as they come, and jobs that nobody waits for."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from model.caption import Word
from service.broker.base import Found, NoWorkerError, QueueFullError
from service.broker.memory import MemoryBroker
from service.errors import Problem
from service.front import Front
from service.jobs import Answer, Job, Progress, Refusal, Reply
from tests.service.fakes import LOST, FakeBroker, answer_to, worker_state
from tests.service.running import until
from tests.service.test_front import asked, broker, front, job, refusal, text

__all__ = ["broker", "front"]  # fixtures

pytestmark = pytest.mark.anyio


def words(begin: int, *said: str, attempt: int = 1, job_id: str = "1") -> Progress:
    return Progress(job_id, attempt, begin, tuple(Word(word, 1, 0.5, -0.1) for word in said))


async def heard(front: Front, asked_for: Job) -> list[str]:
    """All that the stream says, words as `attempt:begin:words`."""
    said = []
    async with aclosing(front.stream(asked_for)) as stream:
        async for each in stream:
            if isinstance(each, Answer):
                said.append(text(each))
            else:
                said.append(f"{each.attempt}:{each.begin}:{' '.join(word.text for word in each.words)}")
    return said


async def streamed(front: Front, broker: FakeBroker, *said: Progress) -> list[str]:
    """What a request hears when the broker says so, and then answers."""
    task = asyncio.create_task(heard(front, replace(job("1"), stream=True)))
    await until(lambda: bool(broker.submitted))
    for each in (*said, answer_to(job("1"))):
        broker.say(each)
    return await task


async def test_words_come_before_the_answer(front: Front, broker: FakeBroker) -> None:
    said = await streamed(front, broker, words(0, "two"), words(5, "a", job_id="other"), words(1, "dogs", "in"))
    assert said == ["1:0:two", "1:1:dogs in", "request-1"]
    assert broker.submitted[0].stream
    assert broker.cancelled == []


async def test_a_later_attempt_begins_again(front: Front, broker: FakeBroker) -> None:
    said = await streamed(front, broker, words(0, "two"), words(0, "two", attempt=2), words(1, "dogs", attempt=2))
    assert said == ["1:0:two", "2:0:two", "2:1:dogs", "request-1"]


async def test_attempts_never_count_down(front: Front, broker: FakeBroker) -> None:
    """After the store was lost, or a worker left in order, the count may be that of before."""
    came = (words(0, "two", attempt=2), words(0, "two"), words(1, "dogs"), words(0, "two", attempt=2), words(0, "two"))
    said = await streamed(front, broker, *came)
    assert said == ["2:0:two", "3:0:two", "3:1:dogs", "4:0:two", "5:0:two", "request-1"]


async def test_words_are_told_once_each(front: Front, broker: FakeBroker) -> None:
    came = (words(0, "two"), words(1, "dogs"), words(1, "dogs", "in"), words(2, "in"), words(5, "snow"))
    assert await streamed(front, broker, *came) == ["1:0:two", "1:1:dogs", "1:2:in", "1:5:snow", "request-1"]


async def test_a_caption_is_told_no_words(front: Front, broker: FakeBroker) -> None:
    [task] = asked(front, job("1"))
    await until(lambda: bool(broker.submitted))
    broker.say(words(0, "two"))
    broker.say(answer_to(job("1")))
    assert text(await task) == "request-1"


async def test_leaving_a_stream_gives_its_job_up(front: Front, broker: FakeBroker) -> None:
    async with aclosing(front.stream(job("1"))) as stream:
        first = asyncio.ensure_future(anext(stream))
        await until(lambda: bool(broker.submitted))
        broker.say(words(0, "two"))
        assert isinstance(await first, Progress)
    await until(lambda: broker.cancelled == ["1"])
    assert front.under_way == 0


async def test_cancelling_who_waits_for_a_stream_gives_its_job_up(front: Front, broker: FakeBroker) -> None:
    task = asyncio.create_task(heard(front, job("1")))
    await until(lambda: bool(broker.submitted))
    task.cancel()
    await until(lambda: broker.cancelled == ["1"])


async def test_a_stream_ends_with_its_problem(front: Front, broker: FakeBroker) -> None:
    task = asyncio.create_task(heard(front, job("1")))
    await until(lambda: bool(broker.submitted))
    broker.say(words(0, "two"))
    broker.say(Reply("1", Refusal("poison", "why")))
    with pytest.raises(Problem, match="why"):
        await task
    assert broker.cancelled == []


async def test_the_deadline_of_a_stream_is_one_for_all_its_words(front: Front, broker: FakeBroker) -> None:
    task = asyncio.create_task(heard(front, job("1", seconds=0.2)))
    begin = asyncio.get_running_loop().time()
    place = 0
    while not task.done():
        broker.say(words(place, "and"))
        place += 1
        await asyncio.sleep(0.02)
    with pytest.raises(Problem, match="deadline"):
        await task
    assert 0.15 < asyncio.get_running_loop().time() - begin < 1.0
    await until(lambda: broker.cancelled == ["1"])


async def test_a_client_that_does_not_read_its_stream_does_not_keep_the_front_from_stopping(
    front: Front, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.front.GOODBYE_SECONDS", 0.05)
    stream = front.stream(job("1"))
    first = asyncio.ensure_future(anext(stream))
    await until(lambda: bool(broker.submitted))
    broker.say(words(0, "two"))
    await first
    async with asyncio.timeout(2):
        await front.drain(0.0)
    with pytest.raises(Problem, match="stopping"):
        await anext(stream)


# Jobs that nobody waits for.


async def test_a_job_is_enqueued_found_and_given_up(front: Front, broker: FakeBroker) -> None:
    await front.enqueue(replace(job("1"), kept=60.0))
    assert [each.kept for each in broker.submitted] == [60.0]
    assert front.under_way == 0
    broker.found["1"] = Found("queued", 3)
    assert await front.find("1") == Found("queued", 3)
    assert await front.find("2") is None
    await front.give_up("1")
    assert broker.forgotten == ["1"]
    await asyncio.sleep(0.02)
    assert broker.cancelled == []


async def test_enqueueing_fails_as_captioning_does(front: Front, broker: FakeBroker) -> None:
    for refuses, code in (
        (QueueFullError(5), "overloaded"),
        (NoWorkerError("none"), "no_worker"),
        (LOST, "unavailable"),
    ):
        broker.refuses = refuses
        with pytest.raises(Problem) as caught:
            await front.enqueue(job("1"))
        assert caught.value.code == code
        assert caught.value.retry_after
    broker.refuses = None
    broker.slow_submit = True
    with pytest.raises(Problem, match="cannot be reached"):
        await front.enqueue(job("1"))
    broker.slow_submit = False
    assert front.store_losses == 0
    await front.drain(0.0)
    with pytest.raises(Problem, match="stopping"):
        await front.enqueue(job("1"))


async def test_a_full_store_says_so(front: Front, broker: FakeBroker) -> None:
    broker.refuses = QueueFullError(0, "the queue's memory is full")
    [task] = asked(front, job("1"))
    problem = await refusal(task)
    assert (problem.code, problem.kind.status, problem.retry_after) == ("overloaded", 503, 1)
    assert "memory" in problem.detail


async def test_while_the_store_is_lost_nothing_is_found(front: Front, broker: FakeBroker) -> None:
    broker.raises = LOST
    for _ in range(2):  # before it counts as lost, and then
        with pytest.raises(Problem) as caught:
            await front.find("1")
        assert caught.value.code == "unavailable"
        with pytest.raises(Problem) as caught:
            await front.give_up("1")
        assert caught.value.code == "unavailable"
        await until(lambda: front.state is None)


async def test_from_enqueueing_to_the_outcome() -> None:
    """Over the memory broker: the front goes on hearing of jobs that nobody waits for."""
    broker = MemoryBroker({"interactive": 5, "batch": 1}, worker_timeout=5.0, tries=3)
    await broker.beat(worker_state())
    front = Front(broker, poll_seconds=0.01)
    await front.start()
    await until(lambda: front.info is not None)
    await front.enqueue(replace(job("1"), kept=60.0))
    assert await front.find("1") == Found("queued", 0)
    (delivery,) = await broker.take("w", 1, 0)
    assert await front.find("1") == Found("running")
    assert await broker.answer("w", delivery, answer_to(delivery.job))
    await asyncio.sleep(0.02)
    seen = await front.find("1")
    assert seen == Found("done", reply=answer_to(delivery.job))
    await front.give_up("1")
    assert await front.find("1") is None
    await front.stop()
