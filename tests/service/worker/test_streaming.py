"""Words that are told while they are decided: all of them, in order, before the answer, and never in its way."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from model.caption import Word
from service.broker.base import BrokerLostError, Delivery
from service.jobs import Answer, Job, Progress
from service.word_teller import FINISH_SECONDS, Told, WordTeller
from tests.service.running import until
from tests.service.worker.fakes import STEPS, Stage, StepFake, text
from tests.service.worker.test_worker import take_and_die

pytestmark = pytest.mark.anyio


async def test_words_come_one_by_one_before_the_answer(stage: Stage, fake: StepFake) -> None:
    fake.step_seconds = 0.03
    await stage.add_worker(fake)
    job = await stage.submit(1, stream=True)
    assert await stage.caption(job) == text(1)
    assert stage.words(job) == text(1).split()
    assert len(stage.broker.calls) == STEPS - 1  # the last step is the end, which is no word
    answer = await stage.outcome(job)
    assert isinstance(answer, Answer)
    told = [word for each in stage.heard[job.id] if isinstance(each, Progress) for word in each.words]
    assert tuple(told) == answer.caption.words


async def test_only_jobs_that_stream_are_told_of(stage: Stage, fake: StepFake) -> None:
    fake.step_seconds = 0.01
    await stage.add_worker(fake)
    jobs = [await stage.submit(level, stream=level == 2, beam=beam) for level, beam in ((1, 1), (2, 1), (3, 1), (2, 3))]
    for job in jobs:
        await stage.outcome(job)
    assert [stage.words(job) for job in jobs] == [
        [],
        text(2).split(),
        [],
        [],
    ]  # nor is a beam, which may change its mind


async def test_captions_that_share_steps_share_the_telling(stage: Stage, fake: StepFake) -> None:
    await stage.add_worker(fake)
    fake.frozen = True
    jobs = [await stage.submit(level, stream=True) for level in range(6)]
    await until(lambda: len(fake.making) == 6)
    fake.step_seconds, fake.frozen = 0.02, False
    for level, job in enumerate(jobs):
        assert await stage.caption(job) == text(level)
        assert stage.words(job) == text(level).split()
    assert len(stage.broker.calls) <= 2 * STEPS  # of 24, one for each word


async def test_one_that_joins_a_caption_in_the_making_hears_it_from_the_beginning(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake)
    fake.step_seconds = 0.05
    jobs = [await stage.submit(1, stream=stream) for stream in (False, True)]
    await until(lambda: bool(fake.making) and next(iter(fake.making.values())).steps == 2)
    jobs += [await stage.submit(1, stream=stream) for stream in (True, False)]
    await until(lambda: worker.state().running == 4)
    for job in jobs:
        assert await stage.caption(job) == text(1)
    assert fake.looks == [[1]]
    assert [stage.words(job) for job in jobs] == [[], text(1).split(), text(1).split(), []]


async def test_the_first_to_stream_of_a_caption_in_the_making_hears_it_all(stage: Stage, fake: StepFake) -> None:
    await stage.add_worker(fake)
    fake.step_seconds = 0.05
    first = await stage.submit(1)
    await until(lambda: bool(fake.making) and next(iter(fake.making.values())).steps == 2)
    second = await stage.submit(1, stream=True)
    for job in (first, second):
        assert await stage.caption(job) == text(1)
    assert fake.looks == [[1]]
    assert stage.words(second) == text(1).split()


async def test_a_caption_that_ends_without_an_end_has_all_its_words_told(
    stage: Stage, fake: StepFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    words_of = StepFake.words_of
    monkeypatch.setattr(StepFake, "words_of", lambda self, each: words_of(self, each)[:-1])
    await stage.add_worker(fake)
    job = await stage.submit(1, stream=True)
    assert await stage.caption(job) == text(1)
    assert stage.words(job) == text(1).split()


async def test_a_caption_begun_anew_tells_no_word_twice(stage: Stage, fake: StepFake) -> None:
    """A step that failed: each is made alone, in one go."""
    await stage.add_worker(fake)
    fake.step_seconds = 0.03
    job = await stage.submit(1, stream=True)
    await until(lambda: len(stage.words(job)) == 2)
    fake.fails_step = {2}
    poison = await stage.submit(2, stream=True)
    assert await stage.refusal(poison) == "internal"
    assert await stage.caption(job) == text(1)
    assert stage.words(job) == text(1).split()


async def test_a_second_try_begins_at_the_first_word(fake: StepFake) -> None:
    stage = Stage(worker_timeout=0.3)
    worker = await stage.add_worker(fake)
    fake.step_seconds = 0.02
    worker._model._turns.healthy = False  # so that it takes nothing meanwhile
    await asyncio.sleep(0.6)
    job = await stage.submit(1, stream=True)
    dead = await take_and_die(stage, "dead")
    words = (Word("made", 1, 0.5, -0.1), Word("up", 1, 0.5, -0.1))
    await stage.broker.tell("dead", [(dead, Progress(job.id, dead.attempt, 0, words))])
    await until(lambda: stage.words(job) == ["made", "up"])
    worker._model._turns.healthy = True
    assert await stage.caption(job) == text(1)
    assert stage.words(job) == text(1).split()
    assert {each.attempt for each in stage.heard[job.id] if isinstance(each, Progress)} == {1, 2}
    await stage.close()


async def test_what_was_cancelled_is_told_no_more(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake)
    fake.step_seconds = 0.05
    gone, kept = [await stage.submit(1, stream=True) for _ in range(2)]  # the caption itself goes on
    await until(lambda: bool(stage.words(kept)))
    await stage.broker.cancel(gone.id)
    await until(lambda: worker.state().running == 1)
    calls = len(stage.broker.calls)
    assert await stage.caption(kept) == text(1)
    assert all(gone.id not in call for call in stage.broker.calls[calls + 1 :])
    assert worker._teller._open == set()


async def test_words_for_a_lost_broker_are_dropped(
    stage: Stage, fake: StepFake, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await stage.add_worker(fake)
    fake.step_seconds = 0.03

    async def lose() -> None:
        stage.broker.on_tell, stage.broker.lost = None, True

    stage.broker.on_tell = lose
    job = await stage.submit(1, stream=True)
    await until(lambda: stage.broker.lost)
    await asyncio.sleep(0.05)
    stage.broker.lost = False
    assert await stage.caption(job) == text(1)
    said = [word.text for each in stage.heard[job.id] if isinstance(each, Progress) for word in each.words]
    assert said == text(1).split()[len(text(1).split()) - len(said) :]
    assert len(said) < STEPS - 1
    assert "cannot be told" not in caplog.text
    await until(lambda: worker.ready)


@pytest.mark.parametrize("error", [BrokerLostError("gone"), RuntimeError("bug")])
async def test_telling_that_fails_fails_nothing_else(stage: Stage, fake: StepFake, error: Exception) -> None:
    await stage.add_worker(fake)

    async def fail() -> None:
        raise error

    stage.broker.on_tell = fail
    for level in (1, 2):
        assert await stage.caption(await stage.submit(level, stream=True)) == text(level)


async def test_telling_that_hangs_does_not_hold_the_answer_up(stage: Stage, fake: StepFake) -> None:
    await stage.add_worker(fake)
    go = asyncio.Event()

    async def hang() -> None:
        await go.wait()

    stage.broker.on_tell = hang
    job = await stage.submit(1, stream=True)
    begin = time.monotonic()
    assert await stage.caption(job) == text(1)
    assert time.monotonic() - begin < 1.0  # all in all; of it FINISH_SECONDS for the words
    go.set()
    later = await stage.submit(2, stream=True)
    assert await stage.caption(later) == text(2)
    assert stage.words(job) == []  # that came too late
    assert stage.words(later) == text(2).split()


async def test_all_sorts_of_jobs_at_once(fake: StepFake) -> None:
    stage = Stage()
    await stage.add_worker(fake)
    chance = random.Random(0)
    fake.step_seconds, fake.fails_step = 0.002, {5}
    jobs: list[tuple[Job, int, bool]] = []
    for _ in range(120):
        level, stream = chance.randrange(8), chance.random() < 0.6
        jobs.append((await stage.submit(level, stream=stream), level, stream))
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.02)
    for job, level, stream in jobs:
        outcome = await stage.outcome(job)
        words = stage.words(job)
        if isinstance(outcome, Answer):
            assert outcome.caption.text == text(level)
            assert words == (text(level).split() if stream else [])
        else:
            assert (level, stream or not words) == (5, True)
    await until(lambda: not stage.workers[0].state().running)
    assert stage.workers[0]._teller._open == set()
    await stage.close()


# The teller alone.


def delivery(number: int) -> Delivery:
    return Delivery(Job(f"job-{number}", b"", None, None, 1, "interactive", 0.0, stream=True), 1, 0.0, str(number))


def words(*texts: str) -> list[Word]:
    return [Word(each, 1, 0.5, -0.1) for each in texts]


async def test_what_is_decided_while_words_are_told_goes_together() -> None:
    told: list[list[tuple[str, int, list[str]]]] = []
    go = asyncio.Event()

    async def tell(batch: Told) -> None:
        told.append([(each.job_id, each.begin, [word.text for word in each.words]) for _, each in batch])
        await go.wait()

    teller = WordTeller(tell)
    one, other = teller.begin(delivery(1)), teller.begin(delivery(2))
    teller.hear(one, 0, words("a"))
    await asyncio.sleep(0)
    teller.hear(one, 1, words("b"))
    teller.hear(other, 0, words("x"))
    teller.hear(one, 0, words("a", "b", "c"))  # from the beginning: what is known is passed over
    teller.hear(other, 0, words("x"))
    assert told == [[("job-1", 0, ["a"])]]
    go.set()
    await teller.finish(one)
    assert told[1:] == [[("job-1", 1, ["b", "c"]), ("job-2", 0, ["x"])]]
    teller.hear(one, 3, words("d"))
    await teller.finish(other)
    assert len(told) == 2
    await teller.close()


async def test_finishing_waits_for_the_last_words_and_no_longer() -> None:
    told: list[int] = []

    async def tell(batch: Told) -> None:
        await asyncio.sleep(FINISH_SECONDS / 5)
        told.append(sum(len(each.words) for _, each in batch))

    teller = WordTeller(tell)
    stream, busy = teller.begin(delivery(1)), teller.begin(delivery(2))
    teller.hear(stream, 0, words("a"))
    await asyncio.sleep(0)
    teller.hear(stream, 1, words("b"))
    await teller.finish(stream)
    assert told == [1, 1]
    for place in range(5):  # another's words do not hold it up
        teller.hear(busy, place, words("x"))
    quiet = teller.begin(delivery(3))
    begin = time.monotonic()
    await teller.finish(quiet)
    assert time.monotonic() - begin < FINISH_SECONDS / 5
    await teller.close()
