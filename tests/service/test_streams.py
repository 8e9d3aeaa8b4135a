"""`Accept: text/event-stream`: the words as they are decided, then the caption; and what a stream says of problems."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from model.caption import Word
from service.app import create_app
from service.broker.base import QueueFullError
from service.jobs import Answer, Job, Progress, Refusal, Reply
from service.settings import Settings
from tests.service import pictures
from tests.service.checks import assert_problem, assert_problem_document
from tests.service.fakes import FakeBroker, FakeCaptioner, answer_to
from tests.service.running import Event, events, listening, scrape, until, until_ready

pytestmark = pytest.mark.anyio

JPEG = pictures.jpeg()
URL = "/v1/caption"
ACCEPT = {"Accept": "text/event-stream"}


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
async def front(broker: FakeBroker, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A front over a socket, whose workers are the test."""
    async with listening(create_app(settings, broker=broker)) as client:
        await until_ready(client)
        yield client


async def taken(broker: FakeBroker) -> Job:
    await until(lambda: bool(broker.submitted))
    return broker.submitted[-1]


def word(text: str) -> Word:
    return Word(text, 2, 0.5, -0.1)


def say(broker: FakeBroker, job: Job, begin: int, *texts: str, attempt: int = 1) -> None:
    broker.say(Progress(job.id, attempt, begin, tuple(map(word, texts))))


class Asked:
    """A request for a stream, and the events that came so far."""

    def __init__(self, client: httpx.AsyncClient, **options: Any) -> None:
        self.said: list[Event] = []
        self.response: httpx.Response | None = None
        self.task = asyncio.create_task(self._ask(client, options))

    async def _ask(self, client: httpx.AsyncClient, options: dict[str, Any]) -> None:
        async with client.stream("POST", URL, content=JPEG, params=options, headers=ACCEPT) as self.response:
            if self.response.status_code != 200:
                await self.response.aread()
                return
            async for event in events(self.response):
                self.said.append(event)

    def told(self) -> list[Any]:
        """The names of events, and the words, in short."""
        return [(data["index"], data["text"], data["attempt"]) if name == "word" else name for name, data in self.said]


async def test_the_words_come_before_the_caption_is_done(front: httpx.AsyncClient, broker: FakeBroker) -> None:
    asked = Asked(front, speed="fast")
    job = await taken(broker)
    assert job.stream
    say(broker, job, 0, job.request_id, "a")
    await until(lambda: len(asked.said) == 2)
    assert asked.said[0] == (
        "word", {"index": 0, "text": job.request_id, "exit_layer": 2, "entropy": 0.5, "attempt": 1},
    )  # fmt: skip
    say(broker, job, 2, "b")
    await until(lambda: len(asked.said) == 3)
    assert asked.response is not None
    assert asked.response.headers["content-type"] == "text/event-stream"
    assert asked.response.headers["x-accel-buffering"] == "no"
    assert asked.response.headers["cache-control"] == "no-store"
    assert asked.response.headers["x-request-id"] == job.request_id
    broker.say(answer_to(job))
    await asked.task
    assert asked.told() == [(0, job.request_id, 1), (1, "a", 1), (2, "b", 1), "caption"]
    document = asked.said[-1][1]
    assert document["caption"] == f"{job.request_id} a b"
    assert document["speed"]["requested"] == "fast"
    assert document["request_id"] == job.request_id
    assert "regions" not in document
    assert broker.cancelled == []
    value = await scrape(front)
    assert value('deecap_request_duration_seconds_count{outcome="ok",route="/v1/caption",speed="fast"}') == 1


async def test_a_real_worker_tells_its_words_one_after_the_other(settings: Settings, quick_stop: None) -> None:
    """The captioner waits before each step until the test has read the word of the one before."""

    class Stepwise(FakeCaptioner):
        def __init__(self) -> None:
            super().__init__()
            self.steps = threading.Semaphore(0)
            self.waits = False

        def steps_of(self, each: Any) -> int:
            return 4

        def step(self) -> None:
            if self.waits:
                assert self.steps.acquire(timeout=10)
            super().step()

    captioner = Stepwise()
    async with listening(create_app(settings, load=lambda: captioner)) as client:
        await until_ready(client)
        captioner.waits = True
        asked = Asked(client)
        for count in (1, 2, 3):
            assert all(name == "word" for name, _ in asked.said)
            captioner.steps.release()
            await until(lambda count=count: len(asked.said) >= count)
            assert [data["index"] for _, data in asked.said] == list(range(count))
        captioner.waits = False
        captioner.steps.release()
        await asked.task
    assert [name for name, _ in asked.said] == ["word"] * 3 + ["caption"]
    assert " ".join(data["text"] for _, data in asked.said[:3]) == asked.said[-1][1]["caption"]


async def test_another_attempt_begins_again(front: httpx.AsyncClient, broker: FakeBroker) -> None:
    asked = Asked(front)
    job = await taken(broker)
    say(broker, job, 0, "some", "thing")
    say(broker, job, 0, job.request_id, attempt=2)
    broker.say(answer_to(job))
    await asked.task
    first = [(0, "some", 1), (1, "thing", 1), "restart"]
    assert asked.told() == [*first, (0, job.request_id, 2), (1, "a", 2), (2, "b", 2), "caption"]
    assert asked.said[2] == ("restart", {"attempt": 2})


async def test_an_attempt_of_which_nothing_was_heard_is_no_restart(
    front: httpx.AsyncClient, broker: FakeBroker
) -> None:
    asked = Asked(front)
    job = await taken(broker)
    say(broker, job, 0, job.request_id, attempt=2)
    broker.say(answer_to(job))
    await asked.task
    assert asked.told() == [(0, job.request_id, 2), (1, "a", 2), (2, "b", 2), "caption"]


async def test_words_that_were_lost_or_came_from_elsewhere_are_made_good_at_the_end(
    front: httpx.AsyncClient, broker: FakeBroker
) -> None:
    asked = Asked(front)
    job = await taken(broker)
    say(broker, job, 1, "a")  # and never the one before
    broker.say(answer_to(job))
    await asked.task
    assert asked.told() == [(1, "a", 1), (0, job.request_id, 1), (2, "b", 1), "caption"]
    asked = Asked(front, regions=True)
    await until(lambda: len(broker.submitted) == 2)
    job = broker.submitted[-1]
    say(broker, job, 0, "other", "words", "than", "those")
    broker.say(answer_to(job))
    await asked.task
    assert asked.told()[4:] == ["restart", (0, job.request_id, 2), (1, "a", 2), (2, "b", 2), "caption"]
    assert len(asked.said[-1][1]["regions"]) == 2


async def test_problems_before_the_first_event_are_as_ever(
    front: httpx.AsyncClient, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def problem(content: bytes = JPEG, **options: Any) -> httpx.Response:
        return await front.post(URL, content=content, params=options, headers=ACCEPT)

    assert_problem(await problem(b"none"), 415, "not_an_image")
    assert_problem(await problem(speed="warp"), 422, "unknown_speed")
    assert_problem(await problem(timeout_ms=50), 504, "deadline_exceeded")
    broker.refuses = QueueFullError(2)
    response = await problem()
    assert_problem(response, 503, "overloaded")
    assert int(response.headers["retry-after"]) >= 1
    broker.refuses = None
    before = len(broker.submitted)
    asked = Asked(front)
    await until(lambda: len(broker.submitted) > before)
    broker.say(Reply(broker.submitted[-1].id, Refusal("undecodable_image", "made up"), "w"))
    await asked.task
    assert asked.response is not None
    assert_problem(asked.response, 422, "undecodable_image", "made up")


async def test_a_problem_after_the_first_event_is_one(front: httpx.AsyncClient, broker: FakeBroker) -> None:
    asked = Asked(front)
    job = await taken(broker)
    say(broker, job, 0, "a")
    await until(lambda: len(asked.said) == 1)
    broker.say(Reply(job.id, Refusal("stopping", "made up", retry_after=3), "w"))
    await asked.task
    assert asked.told() == [(0, "a", 1), "retry", "problem"]
    assert asked.said[1] == ("retry", 3000)
    assert_problem_document(asked.said[2][1], 503, job.request_id)
    value = await scrape(front)
    assert value('deecap_request_duration_seconds_count{outcome="stopping",route="/v1/caption",speed="balanced"}') == 1


async def test_a_deadline_after_the_first_event(front: httpx.AsyncClient, broker: FakeBroker) -> None:
    asked = Asked(front, timeout_ms=400)
    job = await taken(broker)
    say(broker, job, 0, "a")
    await asked.task
    assert asked.told() == [(0, "a", 1), "problem"]
    assert asked.said[1][1]["code"] == "deadline_exceeded"
    await until(lambda: broker.cancelled == [job.id])


async def test_silence_is_filled_with_comments(
    front: httpx.AsyncClient, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.routes.streams.KEEP_ALIVE_SECONDS", 0.05)
    asked = Asked(front)
    job = await taken(broker)
    await until(lambda: len(asked.said) >= 3)
    assert set(asked.said) == {("", "keep-alive")}
    broker.say(Reply(job.id, Refusal("poison", "made up"), "w"))  # its status is out already
    await asked.task
    assert asked.said[-1][1]["code"] == "poison"


@pytest.mark.parametrize("words", [0, 2])
async def test_to_hang_up_stops_the_work(front: httpx.AsyncClient, broker: FakeBroker, words: int) -> None:
    asked = Asked(front)
    job = await taken(broker)
    say(broker, job, 0, *["a"] * words)
    await until(lambda: len(asked.said) == words)
    began = time.monotonic()
    asked.task.cancel()
    await until(lambda: broker.cancelled == [job.id])
    assert time.monotonic() - began < 2, "it was not noticed before the next event"
    for _ in range(200):
        value = await scrape(front)
        if value("deecap_disconnects_total") == 1:
            break
        await asyncio.sleep(0.01)
    assert value("deecap_disconnects_total") == 1
    assert value("deecap_captions_under_way") == 0


async def test_a_failure_inside_is_told_too(
    front: httpx.AsyncClient, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(front)
    job = await taken(broker)
    say(broker, job, 0, "a")
    await until(lambda: len(asked.said) == 1)
    reply = answer_to(job)
    assert isinstance(reply.outcome, Answer)
    broker.say(replace(reply, outcome=replace(reply.outcome, timings=None)))
    await asked.task
    assert asked.told()[-1] == "problem"
    assert asked.said[-1][1]["code"] == "internal"


@pytest.mark.parametrize(
    ("accept", "stream"),
    [
        ("text/event-stream", True),
        ("TEXT/Event-Stream;q=0.5, */*;q=0.1", True),
        ("application/json, text/event-stream", True),
        ("application/json, text/event-stream;q=0.9", False),
        ("text/event-stream;q=0", False),
        ("text/event-stream;q=nonsense", False),
        ("*/*", False),
        ("text/*", False),
        ("", False),
    ],
)
async def test_who_gets_a_stream(client: httpx.AsyncClient, accept: str, stream: bool) -> None:
    response = await client.post(URL, content=JPEG, headers={"Accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"] == ("text/event-stream" if stream else "application/json")
    assert ("event: caption" in response.text) is stream


async def test_a_beam_tells_its_words_at_the_end(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, params={"beam": 3}, content=JPEG, headers=ACCEPT)
    names = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    assert names == ["word"] * 3 + ["caption"]
