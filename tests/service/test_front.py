"""`Front`: every job is answered once, whatever becomes of store, workers and clients; and nobody else's is touched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from service.broker.base import NoWorkerError, Place, QueueFullError
from service.broker.memory import MemoryBroker
from service.errors import Problem
from service.front import Front
from service.jobs import Answer, Job, Refusal, Reply
from tests.service.fakes import LOST, FakeBroker, answer_to, worker_state
from tests.service.running import until

pytestmark = pytest.mark.anyio


def job(id: str, seconds: float = 5.0) -> Job:
    return Job(id, b"photo", "fast", None, 1, "interactive", time.time() + seconds, request_id=f"request-{id}")


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
async def front(broker: FakeBroker) -> AsyncIterator[Front]:
    front = Front(broker, poll_seconds=0.01, remind_seconds=60.0, store_seconds=0.2)
    await front.start()
    await until(lambda: front.info is not None)
    yield front
    await front.stop()


def asked(front: Front, *jobs: Job) -> list[asyncio.Task[Answer]]:
    return [asyncio.create_task(front.caption(each)) for each in jobs]


async def refusal(work: asyncio.Task[Answer]) -> Problem:
    with pytest.raises(Problem) as caught:
        await work
    return caught.value


def text(answer: Answer) -> str:
    return answer.caption.text.split()[0]


def waiting(front: Front) -> int:
    return -1 if front.state is None else sum(front.state.waiting.values())


async def test_each_answer_goes_to_its_own_request_in_any_order(front: Front, broker: FakeBroker) -> None:
    tasks = asked(front, *(job(str(n)) for n in range(20)))
    await until(lambda: len(broker.submitted) == 20)
    for each in reversed(broker.submitted):
        broker.say(answer_to(each))
    assert [text(answer) for answer in await asyncio.gather(*tasks)] == [f"request-{n}" for n in range(20)]
    assert broker.cancelled == []
    assert front.under_way == 0


async def test_replies_that_nobody_waits_for_harm_nobody(front: Front, broker: FakeBroker) -> None:
    broker.say(answer_to(job("stranger")))
    [task] = asked(front, job("1"))
    await until(lambda: bool(broker.submitted))
    broker.say(answer_to(job("1")))
    broker.say(answer_to(job("1")))
    assert text(await task) == "request-1"
    [task] = asked(front, job("2"))
    await until(lambda: len(broker.submitted) == 2)
    broker.say(answer_to(job("2")))
    assert text(await task) == "request-2"


async def test_a_refusal_becomes_the_problem_that_it_names(front: Front, broker: FakeBroker) -> None:
    for code, retry_after in (("poison", None), ("undecodable_image", None), ("stopping", 3), ("internal", None)):
        [task] = asked(front, job(code))
        await until(lambda code=code: bool(broker.submitted) and broker.submitted[-1].id == code)
        broker.say(Reply(code, Refusal(code, "why", retry_after)))
        problem = await refusal(task)
        assert (problem.code, problem.detail, problem.retry_after) == (code, "why", retry_after)
    [task] = asked(front, job("new"))
    broker.say(Reply("new", Refusal("of_a_later_version", "why")))
    assert (await refusal(task)).code == "internal"


async def test_a_client_that_goes_gives_up_its_own_job_only(front: Front, broker: FakeBroker) -> None:
    tasks = asked(front, *(job(str(n)) for n in range(3)))
    await until(lambda: len(broker.submitted) == 3)
    tasks[1].cancel()
    await until(lambda: broker.cancelled == ["1"])
    for each in broker.submitted:
        broker.say(answer_to(each))
    assert [text(await tasks[n]) for n in (0, 2)] == ["request-0", "request-2"]
    assert broker.cancelled == ["1"]


async def test_two_hundred_clients_that_hang_up_take_only_their_own_jobs_along() -> None:
    """Over the memory broker, with a worker that answers what is left: each of the others gets its own answer."""
    broker = MemoryBroker({"interactive": 500, "batch": 1}, worker_timeout=5.0, tries=3)
    await broker.beat(worker_state())
    front = Front(broker, poll_seconds=0.01)
    await front.start()
    await until(lambda: front.info is not None)
    gone = asked(front, *(job(f"gone-{n}") for n in range(200)))
    stay = asked(front, *(job(f"stay-{n}") for n in range(200)))
    await until(lambda: front.under_way == 400 and waiting(front) == 400)
    in_hand = await broker.take("w", 50, 0)  # some of both hang up while they are being worked on
    assert {delivery.job.id[:4] for delivery in in_hand} == {"gone"}
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    await until(lambda: waiting(front) == 200)
    assert await broker.beat(worker_state()) == {delivery.job.id for delivery in in_hand}
    await broker.give_back("w", in_hand)
    worked = []
    while deliveries := await broker.take("w", 50, 0):
        for delivery in deliveries:
            worked.append(delivery.job.id)
            assert await broker.answer("w", delivery, answer_to(delivery.job))
    assert sorted(worked) == sorted(f"stay-{n}" for n in range(200))
    assert [text(answer) for answer in await asyncio.gather(*stay)] == [f"request-stay-{n}" for n in range(200)]
    assert front.under_way == 0
    await front.stop()


async def test_the_deadline_is_the_fronts_own_even_where_nobody_answers(front: Front, broker: FakeBroker) -> None:
    begin = time.monotonic()
    [task] = asked(front, job("1", seconds=0.05))
    assert (await refusal(task)).code == "deadline_exceeded"
    assert 0.04 < time.monotonic() - begin < 1.0
    await until(lambda: broker.cancelled == ["1"])


@pytest.mark.parametrize(("where", "place"), [("queued", "queue"), ("running", "worker"), (None, "front")])
async def test_a_deadline_missed_counts_where_the_job_was(
    front: Front, broker: FakeBroker, where: Place | None, place: str
) -> None:
    if where is not None:
        broker.places["1"] = where
    [task] = asked(front, job("1", seconds=0.05))
    assert (await refusal(task)).code == "deadline_exceeded"
    await until(lambda: front.late == {place: 1})


@pytest.mark.parametrize(("worker", "place"), [("", "queue"), ("w", "worker")])
async def test_a_deadline_that_others_saw_first_counts_there(
    front: Front, broker: FakeBroker, worker: str, place: str
) -> None:
    [task] = asked(front, job("1"))
    await until(lambda: bool(broker.submitted))
    broker.say(Reply("1", Refusal("deadline_exceeded", "too late"), worker))
    assert (await refusal(task)).code == "deadline_exceeded"
    assert front.late == {place: 1}
    assert broker.cancelled == []


async def test_the_deadline_holds_where_the_store_hangs_while_it_takes_the_job(broker: FakeBroker) -> None:
    front = Front(broker, store_seconds=60.0)
    await front.start()
    await until(lambda: front.info is not None)
    broker.hangs = True
    [task] = asked(front, job("1", seconds=0.05))
    assert (await refusal(task)).code == "deadline_exceeded"
    broker.hangs = False
    await front.stop()


async def test_without_a_worker_it_says_so_at_once(front: Front, broker: FakeBroker) -> None:
    broker.refuses = NoWorkerError("none")
    [task] = asked(front, job("1"))
    problem = await refusal(task)
    assert (problem.code, problem.kind.status) == ("no_worker", 503)
    assert problem.retry_after
    broker.workers = ()
    await until(lambda: front.state is not None and not front.state.workers)
    with pytest.raises(Problem) as caught:
        front.check_ready()
    assert caught.value.code == "no_worker"
    assert front.info is not None  # what was served last
    assert broker.cancelled == []  # the job was never there


async def test_a_full_queue_says_when_to_come_back(front: Front, broker: FakeBroker) -> None:
    """20 photos per second, told by what is answered while others wait: 100 that wait take five seconds."""
    broker.waiting["interactive"] = 100
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < 0.5:
        broker.answered = int(20 * passed)
        await asyncio.sleep(0.005)
    broker.refuses = QueueFullError(100)
    [task] = asked(front, job("1"))
    problem = await refusal(task)
    assert problem.code == "overloaded"
    assert problem.retry_after is not None
    assert 4 <= problem.retry_after <= 8  # the first guess still counts a little
    assert broker.cancelled == []


async def test_a_store_that_was_lost_gets_all_outstanding_jobs_again_under_their_ids(
    front: Front, broker: FakeBroker
) -> None:
    tasks = asked(front, job("1"), job("2"))
    await until(lambda: len(broker.submitted) == 2)
    broker.raises = LOST
    await until(lambda: front.state is None)
    begin = time.monotonic()
    [refused] = asked(front, job("3"))
    problem = await refusal(refused)
    assert (problem.code, problem.kind.status) == ("unavailable", 503)
    assert problem.retry_after
    assert time.monotonic() - begin < 0.5
    with pytest.raises(Problem, match="cannot be reached"):
        front.check_ready()
    broker.submitted.clear()  # it comes back empty
    broker.raises = None
    await until(lambda: len(broker.submitted) == 2)
    assert [each.id for each in broker.submitted] == ["1", "2"]
    assert front.check_ready()
    assert (front.store_losses, front.resubmitted) == (1, 2)
    for each in broker.submitted:
        broker.say(answer_to(each))
    assert [text(answer) for answer in await asyncio.gather(*tasks)] == ["request-1", "request-2"]


async def test_jobs_submitted_again_wait_for_a_worker_and_for_room(front: Front, broker: FakeBroker) -> None:
    """Once accepted, a job is not refused any more: workers join the new store a moment after the front."""
    [task] = asked(front, job("1"))
    await until(lambda: len(broker.submitted) == 1)
    broker.raises = LOST
    await until(lambda: front.state is None)
    broker.submitted.clear()
    broker.refuses = NoWorkerError("none yet")
    broker.raises = None
    await until(lambda: front.state is not None)
    await asyncio.sleep(0.05)
    assert not task.done()
    broker.refuses = None
    await until(lambda: len(broker.submitted) == 1)
    broker.say(answer_to(job("1")))
    assert text(await task) == "request-1"


async def test_a_job_given_up_while_the_store_was_lost_is_not_submitted_again(front: Front, broker: FakeBroker) -> None:
    tasks = asked(front, job("1"), job("2"))
    await until(lambda: len(broker.submitted) == 2)
    broker.raises = LOST
    await until(lambda: front.state is None)
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    broker.submitted.clear()
    broker.raises = None
    await until(lambda: bool(broker.submitted))
    await asyncio.sleep(0.05)
    assert [each.id for each in broker.submitted] == ["2"]
    tasks[1].cancel()


async def test_a_job_given_up_while_it_is_submitted_again_is_given_up_after_that_too(broker: FakeBroker) -> None:
    """Else it would be in the queue again, for nobody."""
    front = Front(broker, poll_seconds=0.01, remind_seconds=0.05, store_seconds=5.0)
    await front.start()
    await until(lambda: front.info is not None)
    [task] = asked(front, job("1"))
    await until(lambda: len(broker.submitted) == 1)
    broker.slow_submit = True
    broker.submitted.clear()  # the store lost it
    await until(lambda: broker.submitting)
    task.cancel()
    await until(lambda: broker.cancelled == ["1"])
    broker.slow_submit = False
    await until(lambda: len(broker.submitted) == 1 and broker.cancelled == ["1", "1"])
    await front.stop()


async def test_one_slow_submission_is_one_requests_trouble(front: Front, broker: FakeBroker) -> None:
    """A large photo over a slow link, while the store is well."""
    [other] = asked(front, job("other"))
    await until(lambda: len(broker.submitted) == 1)
    broker.slow_submit = True
    begin = time.monotonic()
    [task] = asked(front, job("large"))
    problem = await refusal(task)
    assert (problem.code, problem.kind.status) == ("unavailable", 503)
    assert problem.retry_after
    assert 0.15 < time.monotonic() - begin < 1.0
    broker.slow_submit = False
    await until(lambda: broker.cancelled == ["large"])  # it may be there
    await asyncio.sleep(0.05)
    assert front.store_losses == 0
    assert front.check_ready()
    [after] = asked(front, job("after"))
    await until(lambda: broker.submitted[-1].id == "after")
    for name in ("other", "after"):
        broker.say(answer_to(job(name)))
    assert [text(await each) for each in (other, after)] == ["request-other", "request-after"]


async def test_a_slow_submission_again_does_not_keep_the_others(broker: FakeBroker) -> None:
    front = Front(broker, poll_seconds=0.01, remind_seconds=0.05, store_seconds=0.1)
    await front.start()
    await until(lambda: front.info is not None)
    tasks = asked(front, job("1"), job("2"))
    await until(lambda: len(broker.submitted) == 2)
    broker.submitted = [each for each in broker.submitted if each.id == "2"]
    broker.slow_submit = True
    await until(lambda: broker.submitting)
    broker.reminded.clear()
    await until(lambda: broker.reminded.count("2") >= 2)
    assert front.store_losses == 0
    broker.slow_submit = False
    await until(lambda: any(each.id == "1" for each in broker.submitted))
    for name in ("1", "2"):
        broker.say(answer_to(job(name)))
    await asyncio.gather(*tasks)
    await front.stop()


async def test_a_store_that_hangs_is_a_store_that_is_lost(front: Front, broker: FakeBroker) -> None:
    broker.hangs = True
    begin = time.monotonic()
    [task] = asked(front, job("1"))
    assert (await refusal(task)).code == "unavailable"
    assert time.monotonic() - begin < 1.0
    broker.hangs = False
    await until(lambda: front.state is not None)
    [task] = asked(front, job("2"))
    await until(lambda: any(each.id == "2" for each in broker.submitted))
    broker.say(answer_to(job("2")))
    assert text(await task) == "request-2"


async def test_a_job_that_takes_long_is_asked_for_and_its_photo_does_not_travel_again(broker: FakeBroker) -> None:
    """The store may have lost it, and nobody would hear of it."""
    front = Front(broker, poll_seconds=0.01, remind_seconds=0.05)
    await front.start()
    await until(lambda: front.info is not None)
    [task] = asked(front, job("1"))
    await until(lambda: len(broker.reminded) >= 3)
    assert [each.id for each in broker.submitted] == ["1"]
    assert front.resubmitted == 0
    broker.submitted.clear()  # and so it did
    await until(lambda: [each.id for each in broker.submitted] == ["1"])
    assert front.resubmitted == 1
    broker.say(answer_to(job("1")))
    await task
    reminded = len(broker.reminded)
    await asyncio.sleep(0.1)
    assert len(broker.reminded) == reminded  # answered: never more
    await front.stop()


async def test_a_moments_trouble_is_no_loss_and_all_jobs_are_asked_for(front: Front, broker: FakeBroker) -> None:
    """What one call could not do may have cost a job; where the state is told, the store is there."""
    tasks = asked(front, job("1"), job("2"))
    await until(lambda: len(broker.submitted) == 2)
    broker.submitted = [each for each in broker.submitted if each.id == "1"]
    broker.trouble = LOST
    await until(lambda: sorted(broker.reminded) == ["1", "2"])
    await until(lambda: [each.id for each in broker.submitted] == ["1", "2"])
    assert front.store_losses == 0
    for name in ("1", "2"):
        broker.say(answer_to(job(name)))
    await asyncio.gather(*tasks)


async def test_a_store_that_is_not_there_at_the_start_is_waited_for() -> None:
    broker = FakeBroker()
    broker.raises = LOST
    front = Front(broker, poll_seconds=0.01)
    await front.start()
    await until(lambda: front.store_losses == 1)
    assert not front.started
    with pytest.raises(Problem, match="cannot be reached"):
        front.check_ready()
    broker.raises = None
    await until(lambda: front.started)
    assert broker.opened
    assert front.check_ready().name == "fake"
    await front.stop()
    assert broker.closed


async def test_a_reply_that_is_none_does_not_stop_the_others(
    front: Front, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    [task] = asked(front, job("1"))
    await until(lambda: bool(broker.submitted))
    broker.raises = ValueError("not a reply at all")
    await asyncio.sleep(0.05)
    broker.raises = None
    broker.say(answer_to(job("1")))
    assert text(await task) == "request-1"


async def test_the_model_of_most_workers_is_the_one_shown(front: Front, broker: FakeBroker) -> None:
    broker.workers = (worker_state("a", "old"), worker_state("b", "new"), worker_state("c", "new"))
    await until(lambda: front.check_ready().revision == "new")
    broker.workers = (worker_state("a", "old"), worker_state("b", "new"))
    await asyncio.sleep(0.05)
    assert front.check_ready().revision == "new"  # between equals the one that was shown
    broker.workers = (worker_state("a", "old"), *(worker_state(id, "new", ready=False) for id in "bc"))
    await until(lambda: front.check_ready().revision == "old")  # the others do not caption


async def test_ready_only_while_captions_go_through_somewhere(front: Front, broker: FakeBroker) -> None:
    assert front.check_ready()
    stale = worker_state("a")
    for workers in ((worker_state(ready=False),), (type(stale)(**{**vars(stale), "last_success": time.time() - 100}),)):
        broker.workers = workers
        await until(lambda workers=workers: front.state is not None and front.state.workers == workers)
        with pytest.raises(Problem, match="cannot caption"):
            front.check_ready()
        broker.workers = (worker_state(),)
        await until(lambda: front.state is not None and front.state.workers == broker.workers)
        assert front.check_ready()


async def test_draining_answers_what_is_under_way_and_takes_no_more(front: Front, broker: FakeBroker) -> None:
    [task] = asked(front, job("1"))
    await until(lambda: bool(broker.submitted))
    draining = asyncio.create_task(front.drain(5.0))
    await asyncio.sleep(0.01)
    [refused] = asked(front, job("2"))
    assert (await refusal(refused)).code == "stopping"
    with pytest.raises(Problem, match="stopping"):
        front.check_ready()
    assert not draining.done()
    broker.say(answer_to(job("1")))
    assert text(await task) == "request-1"
    await draining


async def test_draining_does_not_wait_for_ever_and_tells_those_who_do(front: Front, broker: FakeBroker) -> None:
    [task] = asked(front, job("1"))
    await until(lambda: bool(broker.submitted))
    begin = time.monotonic()
    await front.drain(0.1)
    assert 0.05 < time.monotonic() - begin < 1.0
    assert (await refusal(task)).code == "stopping"
    await until(lambda: broker.cancelled == ["1"])


async def test_stopping_ends_at_once_and_gives_up_what_is_under_way(front: Front, broker: FakeBroker) -> None:
    tasks = asked(front, job("1"), job("2"))
    await until(lambda: len(broker.submitted) == 2)
    begin = time.monotonic()
    await front.stop()
    assert time.monotonic() - begin < 1.0
    assert [(await refusal(task)).code for task in tasks] == ["stopping", "stopping"]
    assert sorted(broker.cancelled) == ["1", "2"]
    assert broker.closed
