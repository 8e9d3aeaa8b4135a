"""The Python client's streams, jobs and batches: what they give, and that what passes is tried again."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.client import (
    AsyncClient,
    BusyError,
    CaptionAnswer,
    Client,
    ClientError,
    DeadlineError,
    ImageRefusedError,
    Item,
    Job,
    OptionRefusedError,
    ProblemError,
    ServiceFailedError,
    StreamedWord,
    UnexpectedAnswerError,
    UnknownJobError,
    UnreachableError,
)
from service.client.retrying import Options
from tests.service import pictures
from tests.service.fakes import FakeCaptioner
from tests.service.test_client import GOOD, JPEG, Script, html, photo, problem, width
from tests.service.test_process import serving

Said = list[StreamedWord | CaptionAnswer]


@pytest.fixture
def service(app: FastAPI) -> Iterator[str]:
    """Its address."""
    with serving(app) as address, Client(address) as client:
        while not client.ready():
            time.sleep(0.01)
        yield address


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.client.retrying.FIRST_PAUSE", 0.001)


class Both:
    """Either client behind the blocking one's methods, so that one test is for both."""

    def __init__(self, asynchronous: bool, url: str = "http://test", **more: Any) -> None:
        self._asynchronous = asynchronous
        self._arguments = {"url": url, **more}

    def _ask(self, name: str, *given: Any, **options: Any) -> Any:
        if not self._asynchronous:
            with Client(**self._arguments) as client:
                return getattr(client, name)(*given, **options)

        async def there() -> Any:
            async with AsyncClient(**self._arguments) as client:
                return await getattr(client, name)(*given, **options)

        return asyncio.run(there())

    def stream(self, image: Any = JPEG, **options: Any) -> Said:
        if not self._asynchronous:
            with Client(**self._arguments) as client:
                return list(client.stream(image, **options))

        async def there() -> Said:
            async with AsyncClient(**self._arguments) as client:
                return [said async for said in client.stream(image, **options)]

        return asyncio.run(there())

    def captions(self, images: Any, **options: Any) -> list[Item]:
        return self._ask("captions", images, **options)

    def submit(self, image: Any = JPEG, **options: Any) -> Job:
        return self._ask("submit", image, **options)

    def job(self, id: str) -> Job:
        return self._ask("job", id)

    def wait(self, id: str, timeout: float | None = None) -> CaptionAnswer:
        return self._ask("wait", id, timeout)

    def cancel(self, id: str) -> bool:
        return self._ask("cancel", id)


pytestmark = pytest.mark.parametrize("asynchronous", [False, True])


def events(*those: tuple[str, Any], retry: int | None = None) -> httpx.Response:
    """A stream; `retry` belongs to its last event."""
    text = ": keep-alive\n\n"
    for number, (name, data) in enumerate(those):
        last = "" if retry is None or number < len(those) - 1 else f"retry: {retry}\n"
        text += f"event: {name}\n{last}data: {json.dumps(data)}\n\n"
    return httpx.Response(200, text=text, headers={"Content-Type": "text/event-stream"})


def word(index: int, text: str, attempt: int = 1) -> tuple[str, dict[str, Any]]:
    said = {"index": index, "text": text, "exit_layer": 2, "entropy": 0.5, "attempt": attempt, "new": 1}
    return "word", said


def told(said: Said) -> list[Any]:
    return [(each.index, each.text, each.attempt) if isinstance(each, StreamedWord) else each.caption for each in said]


class TestStreams:
    def test_words_then_the_caption(self, service: str, asynchronous: bool) -> None:
        said = Both(asynchronous, service).stream(speed="fast")
        answer = said[-1]
        assert isinstance(answer, CaptionAnswer)
        words = [each for each in said if isinstance(each, StreamedWord)]
        assert words == said[:-1]
        assert [each.text for each in words] == answer.caption.split() == [each.text for each in answer.words]
        assert [each.index for each in words] == [0, 1, 2]
        assert answer.speed.requested == "fast"
        assert not answer.speed.moved_by_load

    def test_what_is_refused(self, service: str, asynchronous: bool) -> None:
        with pytest.raises(ImageRefusedError):
            Both(asynchronous, service).stream(b"none")
        with pytest.raises(OptionRefusedError):
            Both(asynchronous, service).stream(speed="warp")
        with pytest.raises(TypeError, match="sped"):
            Both(asynchronous, service).stream(sped=1)

    def test_what_passes_is_tried_again_and_attempts_go_on_counting(self, asynchronous: bool) -> None:
        def broken() -> Iterator[bytes]:
            yield b'event: word\ndata: {"index": 0, "text": "x", "exit_layer": 1, "entropy": 0.1, "attempt": 1}\n\n'
            raise httpx.ReadError("reset")

        async def broken_there() -> AsyncIterator[bytes]:
            for chunk in broken():
                yield chunk

        kind = {"Content-Type": "text/event-stream"}
        script = Script(
            problem(503, "overloaded", **{"retry-after": "0"}),
            httpx.Response(200, content=broken_there() if asynchronous else broken(), headers=kind),
            events(word(0, "y"), ("restart", {"attempt": 2}), word(0, "z", 2)),  # and no more
            events(word(0, "u"), ("problem", problem(503, "stopping").json()), retry=0),
            events(("something_new", 1), word(0, "a"), word(1, "dog"), ("caption", GOOD)),
        )
        said = Both(asynchronous, transport=script).stream()
        assert told(said) == [
            (0, "x", 1), (0, "y", 2), (0, "z", 3), (0, "u", 4), (0, "a", 5), (1, "dog", 5), "a dog",
        ]  # fmt: skip
        assert len({request.headers["x-request-id"] for request in script.requests}) == 1
        assert {request.headers["accept"] for request in script.requests} == {"text/event-stream"}

    def test_a_problem_that_does_not_pass(self, asynchronous: bool) -> None:
        script = Script(events(word(0, "a"), ("problem", problem(500, "poison").json())))
        with pytest.raises(ServiceFailedError) as caught:
            Both(asynchronous, transport=script).stream()
        assert (caught.value.code, caught.value.request_id) == ("poison", "i")
        assert len(script.requests) == 1

    def test_what_the_service_asks_for_is_waited_for(self, asynchronous: bool) -> None:
        script = Script(events(("problem", problem(503, "stopping").json()), retry=60_000))
        begin = time.monotonic()
        with pytest.raises(BusyError) as caught:  # it would take too long
            Both(asynchronous, transport=script, timeout=30).stream()
        assert caught.value.retry_after == 60
        assert time.monotonic() - begin < 5

    @pytest.mark.parametrize(
        "response",
        [httpx.Response(200, json=GOOD), html(200), events(("caption", {"caption": "half"})), events(("word", [1]))],
    )
    def test_something_else_than_captions(self, asynchronous: bool, response: httpx.Response) -> None:
        again = httpx.Response(200, headers=response.headers, content=response.content)
        with pytest.raises(UnexpectedAnswerError):
            Both(asynchronous, transport=Script(again)).stream()

    def test_a_stream_that_only_stays_alive_ends_at_the_deadline(self, asynchronous: bool) -> None:
        def alive() -> Iterator[bytes]:
            while True:
                time.sleep(0.01)
                yield b": keep-alive\n\n"

        async def alive_there() -> AsyncIterator[bytes]:
            while True:
                await asyncio.sleep(0.01)
                yield b": keep-alive\n\n"

        kind = {"Content-Type": "text/event-stream"}
        script = Script(httpx.Response(200, content=alive_there() if asynchronous else alive(), headers=kind))
        begin = time.monotonic()
        with pytest.raises(DeadlineError):
            Both(asynchronous, transport=script, timeout=0.3).stream()
        assert 0.2 < time.monotonic() - begin < 5

    def test_leaving_early_stops_the_work(
        self, service: str, captioner: FakeCaptioner, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(captioner, "steps_of", lambda _: 1_000_000)  # it never ends by itself
        monkeypatch.setattr(captioner, "words_of", slow_words(captioner))

        def until_idle() -> None:
            end = time.monotonic() + 10
            while captioner.making:
                assert time.monotonic() < end, "nobody waits for it, and it goes on"
                time.sleep(0.01)

        if asynchronous:

            async def there() -> None:
                async with AsyncClient(service) as client:
                    words = client.stream(JPEG)
                    assert isinstance(await anext(words), StreamedWord)
                    await words.aclose()
                    await asyncio.to_thread(until_idle)

            asyncio.run(there())
        else:
            with Client(service) as client:
                words = client.stream(JPEG)
                assert isinstance(next(words), StreamedWord)
                words.close()
                until_idle()


def slow_words(captioner: FakeCaptioner) -> Any:
    """The captioner's words, as many as it has steps; each step takes some milliseconds."""
    words_of = captioner.words_of

    def of(each: Any) -> Any:
        time.sleep(0.002)
        *words, end = words_of(each)
        return (*(words * 400), end)

    return of


class TestJobs:
    def test_the_way_of_a_job(self, service: str, asynchronous: bool) -> None:
        client = Both(asynchronous, service)
        job = client.submit(photo(20), speed="fast", regions=True, timeout_ms=200_000)
        assert job.state in ("queued", "running", "done")
        answer = client.wait(job.id, timeout=10)
        assert width(answer) == 20
        assert answer.regions is not None
        done = client.job(job.id)
        assert (done.state, done.over, done.retry_after) == ("done", True, None)
        assert done.answer == answer
        assert client.cancel(job.id)
        assert not client.cancel(job.id)
        with pytest.raises(UnknownJobError):
            client.wait(job.id)

    def test_a_key_makes_it_once(self, service: str, asynchronous: bool) -> None:
        client = Both(asynchronous, service)
        jobs = [client.submit(photo(20), idempotency_key="mine") for _ in range(2)]
        assert jobs[0].id == jobs[1].id
        with pytest.raises(OptionRefusedError) as caught:
            client.submit(photo(21), idempotency_key="mine")
        assert caught.value.code == "key_reused"
        assert client.submit(photo(20)).id != client.submit(photo(20)).id

    def test_one_that_failed(self, service: str, asynchronous: bool) -> None:
        client = Both(asynchronous, service)
        job = client.submit(pictures.truncated()["PNG"])  # its header is fine
        with pytest.raises(ProblemError) as caught:
            client.wait(job.id, timeout=10)
        assert caught.value.code == "undecodable_image"
        failed = client.job(job.id)
        assert failed.state == "failed"
        assert isinstance(failed.error, ImageRefusedError)

    def test_submitting_is_tried_again_under_the_same_key(self, asynchronous: bool) -> None:
        taken = {"id": "a/b", "state": "queued", "position": 2, "result": None, "problem": None, "new": 1}
        script = Script(
            httpx.ReadError("reset"),
            problem(503, "overloaded", **{"retry-after": "0"}),
            httpx.Response(202, json=taken, headers={"Retry-After": "3"}),
        )
        job = Both(asynchronous, transport=script).submit()
        assert job == Job("a/b", "queued", 2, retry_after=3.0)
        assert len({request.headers["idempotency-key"] for request in script.requests}) == 1
        assert {request.headers["prefer"] for request in script.requests} == {"respond-async"}

    def test_waiting_asks_as_often_as_the_service_says(self, asynchronous: bool) -> None:
        job = {"id": "a/b", "state": "running", "position": None, "result": None, "problem": None}
        script = Script(
            httpx.Response(200, json=job, headers={"Retry-After": "0"}),
            problem(503, "unavailable", **{"retry-after": "0"}),
            httpx.Response(200, json=job, headers={"Retry-After": "0"}),
            httpx.Response(200, json={**job, "state": "done", "result": GOOD}),
        )
        assert Both(asynchronous, transport=script).wait("a/b").caption == "a dog"
        assert {request.url.raw_path for request in script.requests} == {b"/v1/jobs/a%2Fb"}
        assert len(script.requests) == 4

    def test_waiting_ends_with_the_time_and_one_more_look(self, asynchronous: bool) -> None:
        job = {"id": "a", "state": "running", "position": None, "result": None, "problem": None}
        running = httpx.Response(200, json=job, headers={"Retry-After": "30"})
        waits = Script(running, running)
        begin = time.monotonic()
        with pytest.raises(DeadlineError, match="still running"):
            Both(asynchronous, transport=waits).wait("a", timeout=0.3)
        assert 0.25 < time.monotonic() - begin < 3
        assert len(waits.requests) == 2
        done = Script(running, httpx.Response(200, json={**job, "state": "done", "result": GOOD}))
        assert Both(asynchronous, transport=done).wait("a", timeout=0.1).caption == "a dog"

    def test_a_look_takes_no_longer_than_is_left(self, asynchronous: bool) -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            begin = time.monotonic()
            with pytest.raises(DeadlineError, match="in time"):
                Both(asynchronous, f"http://127.0.0.1:{silent.getsockname()[1]}").wait("a", timeout=0.3)
            assert time.monotonic() - begin < 3

    def test_something_else_than_jobs(self, asynchronous: bool) -> None:
        for response in (httpx.Response(202, json=[1]), httpx.Response(202, json={"id": "a"}), html(202)):
            with pytest.raises(UnexpectedAnswerError):
                Both(asynchronous, transport=Script(response)).submit()
        with pytest.raises(UnexpectedAnswerError):
            Both(asynchronous, transport=Script(html(200))).cancel("a")
        with pytest.raises(BusyError):
            Both(asynchronous, transport=Script(*[problem(503, "unavailable")] * 2), tries=2).cancel("a")


class TestBatches:
    def test_each_photo_has_its_own_outcome(self, service: str, asynchronous: bool, tmp_path: Path) -> None:
        photos: list[Any] = [photo(20), b"none", tmp_path / "none.jpg", 3, b"", photo(30)]
        items = Both(asynchronous, service).captions(photos, speed="fast", regions=True)
        assert [item.index for item in items] == [0, 1, 2, 3, 4, 5]
        assert [item.image for item in items] == photos
        kinds = [ImageRefusedError, FileNotFoundError, TypeError, ImageRefusedError]
        assert [type(item.error) for item in items[1:5]] == kinds
        assert [width(items[at].result()) for at in (0, 5)] == [20, 30]
        assert items[0].result().regions is not None

    def test_none_and_what_is_wrong_with_all(self, service: str, asynchronous: bool) -> None:
        client = Both(asynchronous, service)
        assert client.captions([]) == []
        assert [type(item.error) for item in client.captions([JPEG, JPEG], speed="warp")] == [OptionRefusedError] * 2
        assert [item.error.code for item in client.captions([JPEG] * 33)] == ["too_many_images"] * 33
        with pytest.raises(TypeError, match="sped"):
            client.captions([JPEG], sped=1)

    def test_those_that_were_turned_away_are_asked_for_again(self, asynchronous: bool) -> None:
        def results(*codes: str) -> httpx.Response:
            items = []
            for index, code in enumerate(codes):
                status = {"ok": 200, "overloaded": 503}.get(code, 415)
                said = None if code == "ok" else problem(status, code).json()
                caption = GOOD if code == "ok" else None
                items.append({"index": index, "status": status, "caption": caption, "problem": said, "retry_after": 0})
            return httpx.Response(200, json={"results": items, "request_id": "i"})

        script = Script(
            problem(503, "stopping", **{"retry-after": "0"}),
            results("overloaded", "ok", "overloaded", "not_an_image"),
            httpx.ReadError("reset"),
            results("ok", "overloaded"),
            results("ok"),
        )
        items = Both(asynchronous, transport=script).captions([b"one", b"two", b"three", b"four"])
        assert [item.error is None for item in items] == [True, True, True, False]
        sent = [[each for each in (b"one", b"two", b"three", b"four") if each in r.content] for r in script.requests]
        assert sent == [[b"one", b"two", b"three", b"four"]] * 2 + [[b"one", b"three"]] * 2 + [[b"three"]]
        assert len({request.headers["x-request-id"] for request in script.requests}) == 1
        tired = Script(results("overloaded", "ok"), results("overloaded"))
        items = Both(asynchronous, transport=tired, tries=2).captions([b"one", b"two"])
        assert [type(item.error) for item in items] == [BusyError, type(None)]
        gone = Script(results("overloaded", "ok"), *[httpx.ConnectError("refused")] * 9)
        items = Both(asynchronous, transport=gone, tries=2).captions([b"one", b"two"])
        assert [type(item.error) for item in items] == [BusyError, type(None)]  # what it was told of the photo itself
        silent = Script(*[httpx.ConnectError("refused")] * 9)
        items = Both(asynchronous, transport=silent, tries=2).captions([b"one", b"two"])
        assert [type(item.error) for item in items] == [UnreachableError] * 2

    def test_something_else_than_captions(self, asynchronous: bool) -> None:
        for said in ([1], {"results": []}, {"results": [{"index": 0}]}):
            (item,) = Both(asynchronous, transport=Script(httpx.Response(200, json=said))).captions([JPEG])
            assert type(item.error) is UnexpectedAnswerError
            assert isinstance(item.error, ClientError)


def test_the_bounds_of_speed_are_options(service: str, asynchronous: bool) -> None:
    options: Options = {"min_speed": "balanced", "max_speed": "turbo"}
    said = Both(asynchronous, service).stream(**options)
    assert isinstance(said[-1], CaptionAnswer)
    assert said[-1].speed.requested == "balanced"
