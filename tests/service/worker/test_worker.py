"""A worker over the memory broker: what it takes, what it answers, and that no job is lost or answered twice."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time

import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

import service.worker
from service.broker.base import Delivery
from service.caption_maker import HASHED_AT_ONCE
from service.feature_cache import MemoryFeatureCache
from service.images import ImageLimits
from service.jobs import Answer, Job
from service.model_thread import ModelThread
from service.worker import Worker
from service.worker_metrics import WorkerMetrics
from tests.service import pictures
from tests.service.running import until
from tests.service.worker.fakes import STEPS, Stage, StepFake, text

pytestmark = pytest.mark.anyio


async def test_a_job_is_answered(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake)
    job = await stage.submit(7, speed="fast")
    answer = await stage.outcome(job)
    assert isinstance(answer, Answer)
    assert answer.caption.text == text(7, tau=2.0)
    assert answer.caption.speed == fake.speeds.resolve("fast")
    assert answer.boxes == ((0.0, 0.0, 1.0, 1.0),)
    assert (answer.model, answer.revision) == (fake.name, fake.revision)
    assert stage.replies[job.id][0].worker == worker.id
    assert fake.threads == {"model"}
    await until(lambda: not worker.state().running)


async def test_boxes_that_nobody_asked_for_do_not_travel(stage: Stage, fake: StepFake) -> None:
    await stage.add_worker(fake)
    fake.look_gate.clear()
    without, asked = await stage.submit(7, regions=False), await stage.submit(7, regions=True)  # one caption for both
    fake.look_gate.set()
    outcomes = [await stage.outcome(job) for job in (without, asked)]
    assert [len(each.boxes) for each in outcomes if isinstance(each, Answer)] == [0, 1]


async def test_the_parts_of_the_time_add_up(stage: Stage, fake: StepFake) -> None:
    fake.step_seconds = 0.01
    await stage.add_worker(fake)
    fake.look_gate.clear()
    begin = time.monotonic()
    job = await stage.submit(7)
    await until(fake.looking.is_set)
    await asyncio.sleep(0.05)
    fake.look_gate.set()
    answer = await stage.outcome(job)
    took = time.monotonic() - begin
    assert isinstance(answer, Answer)
    times = answer.timings
    assert times.look >= 0.05
    assert times.describe >= STEPS * 0.01
    assert 0 <= times.queue < took - times.look - times.describe
    assert 0 < times.decode_image < took - times.look - times.describe


async def test_captions_join_and_leave_each_other_at_any_step(stage: Stage, fake: StepFake) -> None:
    fake.step_seconds = 0.02
    await stage.add_worker(fake)
    first = await stage.submit(1)
    await until(lambda: bool(fake.steps))
    second = await stage.submit(2)
    assert await stage.caption(first) == text(1)
    assert await stage.caption(second) == text(2)
    assert fake.steps[0] == [1]
    assert [1, 2] in fake.steps
    assert fake.steps[-1] == [2]
    assert sum(1 in step for step in fake.steps) == STEPS


async def test_photos_that_wait_are_looked_at_together(stage: Stage, fake: StepFake) -> None:
    await stage.add_worker(fake, look_batch=3)
    fake.look_gate.clear()
    jobs = [await stage.submit(1)]
    await until(fake.looking.is_set)
    jobs += [await stage.submit(level) for level in (2, 3, 4, 5)]
    await until(lambda: stage.workers[0].state().running == 5)
    await asyncio.sleep(0.05)  # for their pixels
    fake.look_gate.set()
    assert [await stage.caption(job) for job in jobs] == [text(level) for level in (1, 2, 3, 4, 5)]
    assert [len(look) for look in fake.looks] == [1, 3, 1]
    assert stage.metric("deecap_look_batch_photos_sum") == 5
    assert stage.metric("deecap_look_batch_photos_count") == 3


async def test_one_photo_at_two_speeds_is_looked_at_once(stage: Stage, fake: StepFake) -> None:
    """Whether it is cached, or still being looked at."""
    await stage.add_worker(fake)
    fake.look_gate.clear()
    held = await stage.submit(1)
    await until(fake.looking.is_set)
    both = [await stage.submit(2, speed=speed) for speed in ("full", "turbo")]
    await until(lambda: stage.workers[0].state().running == 3)
    await asyncio.sleep(0.05)
    fake.look_gate.set()
    assert [await stage.caption(job) for job in both] == [text(2, 0.0), text(2, 3.0)]
    assert fake.looks == [[1], [2]]
    await stage.caption(held)
    later = await stage.submit(2, tau=0.5)
    answer = await stage.outcome(later)
    assert isinstance(answer, Answer)
    assert answer.caption.text == text(2, 0.5)
    assert (answer.timings.look, answer.timings.decode_image) == (0.0, 0.0)
    assert fake.looks == [[1], [2]]
    assert stage.metric("deecap_cache_hits_total", cache="memory") == 1
    assert stage.metric("deecap_cache_misses_total", cache="memory") == 3


async def test_a_large_file_is_known_again_like_a_small_one(stage: Stage, fake: StepFake) -> None:
    await stage.add_worker(fake)
    large = pictures.encode(Image.new("RGB", (310, 310), (9, 9, 9)), "BMP")
    assert len(large) > HASHED_AT_ONCE
    assert await stage.caption(await stage.submit(9, image=large)) == text(9)
    assert await stage.caption(await stage.submit(9, image=large, speed="full")) == text(9, 0.0)
    assert fake.looks == [[9]]


@pytest.mark.parametrize("where", ["fails_look", "fails_begin", "fails_step"])
async def test_a_poison_photo_fails_alone(
    stage: Stage, fake: StepFake, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await stage.add_worker(fake)
    getattr(fake, where).add(2)
    fake.look_gate.clear()
    held = await stage.submit(9)
    await until(fake.looking.is_set)
    jobs = {level: await stage.submit(level) for level in (1, 2, 3)}
    await until(lambda: worker.state().running == 4)
    await asyncio.sleep(0.05)
    fake.look_gate.set()
    assert await stage.refusal(jobs[2]) == "internal"
    assert [await stage.caption(jobs[level]) for level in (1, 3)] == [text(1), text(3)]
    assert await stage.caption(held) == text(9)
    assert "job job-2 failed" in caplog.text
    assert worker.ready  # the canary went through
    assert await stage.caption(await stage.submit(4)) == text(4)


async def test_what_is_not_a_photo_is_refused(stage: Stage, fake: StepFake) -> None:
    await stage.add_worker(fake)
    wrong = {
        "not_an_image": b"hello",
        "undecodable_image": pictures.truncated()["PNG"],
        "too_many_pixels": pictures.png_header(1000, 1000),
        "image_too_small": pictures.png_header(4, 4),
    }
    for code, image in wrong.items():
        assert await stage.refusal(await stage.submit(0, image=image)) == code
    assert await stage.refusal(await stage.submit(1, speed="warp")) == "unknown_speed"
    assert await stage.refusal(await stage.submit(1, beam=9)) == "invalid_option"
    assert fake.looks == []
    assert stage.workers[0].ready


async def test_a_passed_deadline_frees_the_slots(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake)
    fake.step_seconds = 0.03
    late = await stage.submit(1, seconds=0.08)
    assert await stage.refusal(late) == "deadline_exceeded"
    assert await stage.caption(await stage.submit(2)) == text(2)
    await until(lambda: not worker.state().running)
    assert fake.free == fake.slots
    assert stage.metric("deecap_worker_deadline_misses_total", place="describe") == 1


async def test_a_deadline_that_passes_before_the_look_saves_it(stage: Stage, fake: StepFake) -> None:
    await stage.add_worker(fake)
    fake.look_gate.clear()
    held = await stage.submit(1)
    await until(fake.looking.is_set)
    late = await stage.submit(2, seconds=0.1)
    await until(lambda: stage.workers[0].state().running == 2)
    await asyncio.sleep(0.12)
    fake.look_gate.set()
    assert await stage.refusal(late) == "deadline_exceeded"
    await stage.caption(held)
    assert fake.looks == [[1]]
    assert stage.metric("deecap_worker_deadline_misses_total", place="look") == 1


async def test_clients_that_go_do_not_let_more_photos_be_decoded_at_once(
    stage: Stage, fake: StepFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.caption_maker.available_cores", lambda: 1)
    decoding, gate, prepare = 0, threading.Event(), fake.prepare
    begun: list[int] = []  # how many were being decoded when one more was

    def slow(image: Image.Image) -> np.ndarray:
        nonlocal decoding
        decoding += 1
        begun.append(decoding)
        assert gate.wait(10)
        decoding -= 1
        return prepare(image)

    await stage.add_worker(fake)
    monkeypatch.setattr(fake, "prepare", slow)
    gone = await stage.submit(1)
    await until(lambda: bool(begun))
    staying = await stage.submit(2)
    await stage.broker.cancel(gone.id)
    await until(lambda: stage.outcomes()["cancelled"] == 1)
    await asyncio.sleep(0.05)
    assert begun == [1]
    gate.set()
    assert await stage.caption(staying) == text(2)
    assert begun == [1, 1]


async def test_a_wide_beam_waits_for_its_slots(stage: Stage, fake: StepFake) -> None:
    await stage.add_worker(fake)
    fake.step_seconds = 0.01
    jobs = [await stage.submit(level, beam=beam) for level, beam in ((1, 5), (2, 4), (3, 1), (4, 5))]
    texts = [await stage.caption(job) for job in jobs]
    assert texts == [text(1, beam=5), text(2, beam=4), text(3, beam=1), text(4, beam=5)]


# Identical requests.


async def hold_two_alike(stage: Stage, fake: StepFake) -> list[Job]:
    """Two jobs for the same caption, by two names of its speed, in the making."""
    worker = await stage.add_worker(fake)
    fake.frozen = True
    jobs = [await stage.submit(1, speed="full")]
    await until(lambda: fake.busy)
    jobs.append(await stage.submit(1, speed=1))
    await until(lambda: worker.state().running == 2)
    await until(lambda: stage.metric("deecap_coalesced_total") == 1)
    return jobs


async def test_identical_requests_are_computed_once(stage: Stage, fake: StepFake) -> None:
    jobs = await hold_two_alike(stage, fake)
    fake.frozen = False
    first, second = [await stage.outcome(job) for job in jobs]
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert first.caption.steps == second.caption.steps
    assert (first.caption.speed.requested, first.caption.speed.tier) == ("full", "full")
    assert (second.caption.speed.requested, second.caption.speed.tier) == (1, None)
    assert first.timings.look > 0.0
    assert second.timings.look == 0.0  # it came later, and waited for none of it
    assert fake.looks == [[1]]
    assert fake.steps == STEPS * [[1]]


@pytest.mark.parametrize("gone", [0, 1])
async def test_one_of_two_identical_requests_goes(stage: Stage, fake: StepFake, gone: int) -> None:
    jobs = await hold_two_alike(stage, fake)
    await stage.broker.cancel(jobs[gone].id)
    await until(lambda: stage.workers[0].state().running == 1)
    fake.frozen = False
    assert await stage.caption(jobs[1 - gone]) == text(1, 0.0)
    assert jobs[gone].id not in stage.replies
    assert stage.outcomes() == {"answered": 1, "cancelled": 1}


async def test_when_all_have_gone_the_slots_are_free(stage: Stage, fake: StepFake) -> None:
    jobs = await hold_two_alike(stage, fake)
    for job in jobs:
        await stage.broker.cancel(job.id)
    await until(lambda: stage.workers[0].state().running == 0)
    await until(lambda: fake.free == fake.slots)
    fake.frozen = False
    again = await stage.submit(1, speed="full")  # and not tied to the one given up
    assert await stage.caption(again) == text(1, 0.0)
    assert set(stage.replies) == {again.id}


async def test_a_later_deadline_keeps_the_caption_of_an_earlier_one(stage: Stage, fake: StepFake) -> None:
    await stage.add_worker(fake)
    fake.step_gate.clear()
    soon = await stage.submit(1, seconds=0.1)
    await until(lambda: fake.busy)
    later = await stage.submit(1)
    await until(lambda: stage.metric("deecap_coalesced_total") == 1)
    await asyncio.sleep(0.12)
    fake.step_gate.set()
    assert await stage.caption(later) == text(1)
    assert await stage.refusal(soon) == "deadline_exceeded"
    assert fake.looks == [[1]]


# What is taken, and when.


async def test_little_is_taken_ahead_so_that_what_is_urgent_can_overtake(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake, look_batch=1)
    fake.look_gate.clear()
    held = [await stage.submit(level, priority="batch") for level in (1, 2)]
    await until(lambda: worker.state().running == 2)
    slow = [await stage.submit(level, priority="batch") for level in (3, 4, 5)]
    fast = [await stage.submit(level) for level in (6, 7)]
    await asyncio.sleep(0.05)
    assert worker.state().running == 2
    fake.look_gate.set()
    for job in [*held, *slow, *fast]:
        await stage.caption(job)
    order = [level for look in fake.looks for level in look]
    assert sorted(order[:2]) == [1, 2]
    assert {6, 7} < set(order[2:5])  # one batch job was perhaps decoded faster than the last of them


async def take_and_die(stage: Stage, worker: str) -> Delivery:
    """A job taken by a worker that is never heard of again; returns once it is taken for dead."""
    state = stage.workers[0].state()
    await stage.broker.beat(type(state)(worker, state.model, True, 8, 0, 0.0))
    [delivery] = await stage.broker.take(worker, 1, 0.0)
    return delivery


async def test_a_job_that_may_have_killed_a_worker_is_alone(fake: StepFake) -> None:
    stage = Stage(worker_timeout=0.3)
    worker = await stage.add_worker(fake)
    fake.step_seconds = 0.01
    worker._model._turns.healthy = False  # so that it takes nothing meanwhile
    await asyncio.sleep(0.6)
    suspect = await stage.submit(99)
    await take_and_die(stage, "dead")
    worker._model._turns.healthy = True
    jobs = []
    for level in range(20):
        jobs.append(await stage.submit(level))
        await asyncio.sleep(0.03)
    assert await stage.caption(suspect) == text(99)
    assert [await stage.caption(job) for job in jobs] == [text(level) for level in range(20)]
    assert all(step == [99] for step in [*fake.looks, *fake.steps] if 99 in step)
    assert any(len(step) > 1 for step in fake.steps)  # the others did share
    assert stage.metric("deecap_worker_redeliveries_total") == 1
    await stage.close()


# Faults.


async def test_a_lost_broker_is_told_once_and_costs_no_job(
    stage: Stage, fake: StepFake, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    worker = await stage.add_worker(fake)
    fake.step_gate.clear()
    held = await stage.submit(1)
    await until(lambda: fake.busy)
    stage.broker.lost = True
    fake.step_gate.set()
    await until(lambda: not worker.ready)
    await asyncio.sleep(0.3)
    assert held.id not in stage.replies
    waiting = await stage.submit(2)
    stage.broker.lost = False
    assert await stage.caption(held) == text(1)
    assert await stage.caption(waiting) == text(2)
    await until(lambda: worker.ready)
    assert caplog.text.count("the broker is lost") == 1
    assert caplog.text.count("the broker is back") == 1


async def test_an_answer_that_is_dropped_leaves_nothing_with_the_worker(
    stage: Stage, fake: StepFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.worker, "UNDELIVERED_SECONDS", 0.1)
    await stage.add_worker(fake)
    fake.look_gate.clear()
    job = await stage.submit(1, seconds=0.2)
    await until(fake.looking.is_set)
    stage.broker.lost = True
    fake.look_gate.set()
    await until(lambda: stage.outcomes()["undelivered"] == 1)
    stage.broker.lost = False
    assert await stage.refusal(job) == "deadline_exceeded"  # by the broker, which has it back
    assert (await stage.broker.state()).workers[0].running == 0


async def test_a_fault_of_the_workers_own_ends_the_process(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake)
    worker._hold = None
    await stage.submit(1)
    await until(lambda: bool(stage.hung))
    assert "the worker failed" in stage.hung[0]


async def test_the_heart_stops_with_the_model_and_the_process_ends(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake, hang_seconds=0.3)
    await asyncio.sleep(0.4)
    assert stage.hung == []  # idle is not hung
    fake.look_gate.clear()
    await stage.submit(1)
    await until(fake.looking.is_set)
    await asyncio.sleep(0.1)
    beats = stage.broker.beats
    await until(lambda: bool(stage.hung))
    assert stage.broker.beats == beats
    assert "no progress" in stage.hung[0]
    assert worker.alive


async def test_a_worker_whose_model_says_nothing_is_not_ready_until_it_gets_on(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake, stall_seconds=0.3)
    await asyncio.sleep(0.4)
    assert worker.ready  # idle is not stalled
    fake.look_gate.clear()
    job = await stage.submit(1)
    await until(lambda: not worker.ready)
    fake.look_gate.set()
    assert await stage.caption(job) == text(1)
    await until(lambda: worker.ready)
    assert stage.hung == []


async def test_a_model_that_does_not_load_in_time_ends_the_process(stage: Stage, fake: StepFake) -> None:
    gate = threading.Event()

    def load() -> StepFake:
        gate.wait(10)
        return fake

    metrics = WorkerMetrics(CollectorRegistry())
    limits, cache = ImageLimits(100_000, 8), MemoryFeatureCache(0)
    worker = Worker(
        stage.broker, ModelThread(load, metrics), limits, cache, metrics, load_seconds=0.1, on_hang=stage.hung.append
    )
    starting = asyncio.create_task(worker.start())
    await until(lambda: bool(stage.hung))
    assert stage.hung == ["the model was not loaded within 0.1 s"]
    gate.set()
    await starting  # the stand-in for the process's end lets it go on
    await asyncio.sleep(0.15)
    assert len(stage.hung) == 1
    await worker.stop()


async def test_a_dead_model_thread_ends_the_process(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake, drain_seconds=0.1)
    fake.raises, fake.fails_step = SystemExit, {1}
    await stage.submit(1)
    await until(lambda: bool(stage.hung))
    assert "died" in stage.hung[0]
    assert not worker.alive
    assert not worker.ready


async def test_a_model_that_fails_takes_no_jobs_until_a_canary_goes_through(
    stage: Stage, fake: StepFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.model_turns.RETRY_CANARY_SECONDS", 0.05)
    worker = await stage.add_worker(fake)  # which always asks for more
    fake.look_gate.clear()
    broken = await stage.submit(1)
    await until(fake.looking.is_set)
    fake.fails_look = {1, 128, *range(120, 136)}
    others = [await stage.submit(level) for level in (2, 3)]
    await until(lambda: worker.state().running == 3)
    fake.look_gate.set()
    assert await stage.refusal(broken) == "internal"
    await until(lambda: not worker.ready)
    await until(lambda: worker.state().running == 0)
    waiting = (await stage.broker.state()).waiting["interactive"]
    assert waiting == 2  # given back: others may have them
    assert not worker.state().ready
    fake.fails_look = set()
    assert [await stage.caption(job) for job in others] == [text(2), text(3)]
    assert worker.ready


async def test_an_idle_worker_makes_sure_that_it_could(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake, canary_seconds=0.1)
    first = worker.state().last_success
    assert abs(first - stage.broker.clock()) < 2.0
    await until(lambda: worker.state().last_success > first + 0.05)
    assert worker.ready


# The end.


async def test_draining_finishes_what_was_begun_and_gives_the_rest_back(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake, look_batch=1)
    fake.step_gate.clear()
    begun = await stage.submit(1)
    await until(lambda: fake.busy)
    rest = [await stage.submit(level) for level in (2, 3, 4, 5)]
    await until(lambda: worker.state().running == 3)
    stopping = asyncio.create_task(worker.stop())
    await until(lambda: worker.state().running == 1)
    assert not worker.ready
    fake.step_gate.set()
    await stopping
    assert await stage.caption(begun) == text(1)
    state = await stage.broker.state()
    assert state.waiting["interactive"] == len(rest)
    assert state.workers == ()
    assert set(stage.replies) == {begun.id}
    other = StepFake()
    await stage.add_worker(other)
    for job, level in zip(rest, (2, 3, 4, 5), strict=True):
        assert await stage.caption(job) == text(level)
    assert other.looks  # not alone: being given back is no try
    stage.workers.remove(worker)


async def test_draining_ends_in_time(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake, drain_seconds=0.1)
    fake.step_gate.clear()
    await stage.submit(1)
    await until(lambda: fake.busy)
    stopping = asyncio.create_task(worker.stop())
    await until(lambda: not worker.state().running)
    assert (await stage.broker.state()).waiting["interactive"] == 1
    fake.step_gate.set()
    await stopping
    assert not stage.replies
    stage.workers.remove(worker)


# All at once.


@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_every_job_is_answered_once_with_its_own_caption(seed: int) -> None:
    """Two workers, two priorities, poison photos, cancellations, deadlines, identical requests, a lost broker."""
    chance = random.Random(seed)
    stage = Stage()
    fakes = [StepFake(step_seconds=0.001), StepFake(step_seconds=0.001)]
    for fake in fakes:
        fake.fails_step, fake.fails_look = {13}, {17}
        await stage.add_worker(fake, look_batch=chance.choice([1, 4]))
    expected: dict[str, str] = {}
    gone: set[str] = set()
    for _ in range(150):
        level, beam, tau = chance.randrange(25), chance.choice([1, 1, 1, 3, 5]), chance.choice([0.0, 1.0, 2.0])
        job = await stage.submit(level, tau=tau, beam=beam, priority=chance.choice(["interactive", "batch"]))
        expected[job.id] = "internal" if level in (13, 17) else text(level, tau, beam)
        if chance.random() < 0.1:
            await asyncio.sleep(chance.random() * 0.01)
            await stage.broker.cancel(job.id)
            gone.add(job.id)
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.01)
        if chance.random() < 0.03:
            stage.broker.lost = True
            asyncio.get_running_loop().call_later(0.05, setattr, stage.broker, "lost", False)
    for job_id in expected.keys() - gone:
        outcome = await stage.outcome(stage.jobs[job_id])
        assert (outcome.caption.text if isinstance(outcome, Answer) else outcome.code) == expected[job_id]
    await until(lambda: not any(worker.state().running for worker in stage.workers))
    assert all(len(replies) == 1 for replies in stage.replies.values())
    assert sum(fake.free for fake in fakes) == 16
    assert (await stage.broker.state()).redelivered == 0
    await stage.close()
