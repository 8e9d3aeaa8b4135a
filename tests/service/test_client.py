"""The Python client: what it sends and reads, when it tries again, and that a rolling restart costs it no answer."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from pydantic import SecretStr

from service.app import create_app
from service.client import (
    AsyncClient,
    BusyError,
    CaptionAnswer,
    Client,
    ClientError,
    DeadlineError,
    ImageRefusedError,
    OptionRefusedError,
    ProblemError,
    QuotaError,
    ServiceFailedError,
    UnauthorizedError,
    UnexpectedAnswerError,
    UnreachableError,
    Word,
)
from service.client.images import image_bytes
from service.client.many import AHEAD
from service.client.retrying import Tries
from service.settings import Settings, SettingsError
from tests.service import pictures
from tests.service.fakes import FakeCaptioner
from tests.service.redis_server import MISSING, RedisServer, find_binary
from tests.service.test_process import free_port, serving

ROOT = Path(__file__).parents[2]
JPEG = pictures.jpeg()
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
# What runs while others come and go: a front alone, a worker, or both in one.
PROGRAM = """
import sys, time
import service.wiring
from service.serve import serve
from service.settings import Settings
from service.worker_process import run_worker
from tests.service.fakes import FakeCaptioner
class SlowCaptioner(FakeCaptioner):
    def step(self):
        time.sleep(0.02)
        super().step()
service.wiring.bundle_loader = lambda settings: SlowCaptioner
{"front": serve, "worker": run_worker}[sys.argv[1]](Settings.load())
"""


@pytest.fixture
def address(app: FastAPI) -> Iterator[str]:
    with serving(app) as address:
        client = Client(address)
        while not client.ready():
            time.sleep(0.01)
        yield address
        client.close()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.client.retrying.FIRST_PAUSE", 0.001)


def photo(width: int) -> bytes:
    return pictures.encode(pictures.photo((width, 32)))


def width(answer: CaptionAnswer) -> int:
    """Of the photo that the fake looked at."""
    return int(answer.caption.split()[1])


class TestAgainstTheService:
    def test_an_answer_has_types(self, address: str) -> None:
        with Client(address) as client:
            answer = client.caption(
                JPEG, speed="fast", beam=2, regions=True, request_id="mine", traceparent=TRACEPARENT
            )
            assert answer.caption.endswith(" 48 32")
            assert answer.words[1] == Word("48", 3, 1.5)
            assert (answer.speed.requested, answer.speed.tier, answer.speed.tau) == ("fast", "fast", 2.0)
            assert answer.model.name == "fake"
            assert answer.request_id == "mine"
            assert answer.regions is not None
            assert answer.regions[1].box == (0.25, 0.5, 0.75, 1.0)
            assert answer.timings_ms.total > 0
            assert client.caption(JPEG, tau=0.5).speed.requested is None
            assert client.caption(JPEG).regions is None
            speeds = client.speeds()
            assert (speeds.default, speeds.lowest, speeds.highest) == ("balanced", 1.0, 4.5)
            assert [tier.name for tier in speeds.tiers] == ["full", "balanced", "fast", "turbo"]
            assert speeds.table[0].tau == 0.0
            assert client.model().layers == 6

    def test_the_asynchronous_one_answers_the_same(self, address: str) -> None:
        async def ask() -> tuple[Any, ...]:
            async with AsyncClient(address) as client:
                one = await client.caption(JPEG, speed=2.5)
                items = [item async for item in client.caption_many([photo(20), b"none", photo(30)], concurrency=2)]
                with pytest.raises(OptionRefusedError):
                    await client.caption(JPEG, speed="warp")
                return one, items, await client.speeds(), await client.model(), await client.ready()

        one, items, speeds, model, ready = asyncio.run(ask())
        with Client(address) as client:
            other = client.caption(JPEG, speed=2.5)
            assert (one.caption, one.words, one.speed) == (other.caption, other.words, other.speed)
            assert (speeds, model, ready) == (client.speeds(), client.model(), True)
        assert [item.index for item in items] == [0, 1, 2]
        assert [item.error is None for item in items] == [True, False, True]
        assert [width(items[at].result()) for at in (0, 2)] == [20, 30]

    def test_every_way_to_hold_a_photo(self, address: str, tmp_path: Path) -> None:
        path = tmp_path / "photo.jpg"
        path.write_bytes(JPEG)
        turned = Image.open(io.BytesIO(pictures.rotated(6)))
        assert turned.size == (32, 48)
        ways: list[Any] = [JPEG, bytearray(JPEG), memoryview(JPEG), path, str(path), io.BytesIO(JPEG), turned]
        ways += [pictures.photo(), pictures.photo().convert("RGBA"), pictures.photo().convert("P")]
        with Client(address) as client, path.open("rb") as file:
            for way in [*ways, file]:
                assert client.caption(way).caption.endswith(" 48 32"), way
            with pytest.raises(FileNotFoundError):
                client.caption(tmp_path / "none.jpg")
            with pytest.raises(TypeError, match="not int"):
                client.caption(3)
            with pytest.raises(TypeError, match="binary"):
                client.caption(io.StringIO("x"))
            with pytest.raises(TypeError, match="no such option: sped"):
                client.caption(JPEG, sped="fast")
        assert image_bytes(pictures.photo()).startswith(b"\xff\xd8")
        assert image_bytes(pictures.photo().convert("RGBA")).startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("image", "options", "kind", "code"),
        [
            (b"no picture", {}, ImageRefusedError, "not_an_image"),
            (b"", {}, ImageRefusedError, "empty_body"),
            (bytes(300_000), {}, ImageRefusedError, "body_too_large"),
            (JPEG[:200], {}, ImageRefusedError, "undecodable_image"),
            (JPEG, {"speed": "warp"}, OptionRefusedError, "unknown_speed"),
            (JPEG, {"speed": "fast", "tau": 1.0}, OptionRefusedError, "invalid_option"),
            (JPEG, {"beam": 9}, OptionRefusedError, "invalid_option"),
            (JPEG, {"traceparent": "a\nb"}, ClientError, None),
        ],
    )
    def test_what_is_refused_is_told_by_type_and_code_at_once(
        self, address: str, image: bytes, options: Any, kind: type[ProblemError], code: str | None
    ) -> None:
        with Client(address) as client:
            begin = time.monotonic()
            with pytest.raises(ClientError) as caught:
                client.caption(image, **options)
            assert time.monotonic() - begin < 5
            assert type(caught.value) is kind
            if code is not None:
                assert isinstance(caught.value, ProblemError)
                assert caught.value.code == code
                assert len(caught.value.request_id) == 32

    def test_a_key_from_the_argument_or_the_environment(
        self, captioner: FakeCaptioner, quick_stop: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = Settings(api_keys=SecretStr("correct-horse"), quota_per_minute=2)
        with serving(create_app(keys, load=lambda: captioner)) as address:
            monkeypatch.setenv("DEECAP_CLIENT_URL", address + "/")
            with Client(tries=1) as client, Client(api_key="correct-horse", tries=1) as known:
                while not client.ready():
                    time.sleep(0.01)
                with pytest.raises(UnauthorizedError):
                    client.caption(JPEG)
                monkeypatch.setenv("DEECAP_CLIENT_KEY", "correct-horse")
                with Client() as from_environment:
                    assert from_environment.caption(JPEG).caption
                assert known.caption(JPEG).caption
                with pytest.raises(QuotaError) as caught:
                    known.caption(JPEG)
                assert caught.value.retry_after is not None
                assert 25 <= caught.value.retry_after <= 30
                with Client(timeout=5) as impatient:
                    begin = time.monotonic()
                    with pytest.raises(QuotaError):  # it would have to wait for longer than it may
                        impatient.caption(JPEG)
                    assert time.monotonic() - begin < 2

    def test_the_clients_variables_do_not_stop_a_server_and_a_misspelt_key_still_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DEECAP_CLIENT_KEY", "correct-horse")
        monkeypatch.setenv("DEECAP_CLIENT_URL", "http://elsewhere")
        assert Settings.load() == Settings()
        monkeypatch.setenv("DEECAP_API_KEY", "correct-horse")
        with pytest.raises(SettingsError, match="DEECAP_API_KEY is no setting"):
            Settings.load()


GOOD = {
    "caption": "a dog", "confidence": 0.5, "words": [{"text": "a", "exit_layer": 1, "entropy": 0.5, "new": 1}],
    "speed": {"requested": "fast", "tier": "fast", "tau": 2.0, "promised": 3.0}, "speedup": 2.0,
    "timings_ms": {"queue": 0, "decode_image": 0, "look": 0, "describe": 0, "total": 0, "new": 1},
    "model": {"name": "m", "revision": "r"}, "request_id": "i", "something_new": [1],
}  # fmt: skip


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    document = {"type": f"/problems/{code}", "title": "t", "status": status, "detail": "d", "code": code}
    kind = {"content-type": "application/problem+json"}
    return httpx.Response(status, json={**document, "request_id": "i"}, headers={**kind, **headers})


def html(status: int) -> httpx.Response:
    return httpx.Response(status, text="<h1>nginx</h1>")


class Script(httpx.MockTransport):
    """Answers, or raises, one after the other, and then good captions."""

    def __init__(self, *steps: httpx.Response | Exception) -> None:
        super().__init__(self._next)
        self._steps = list(steps)
        self.requests: list[httpx.Request] = []

    def _next(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self._steps.pop(0) if self._steps else httpx.Response(200, json=GOOD)
        if isinstance(step, Exception):
            raise step
        return step


def ask(script: Script, asynchronous: bool, **more: Any) -> CaptionAnswer:
    if not asynchronous:
        with Client("http://test", transport=script, **more) as client:
            return client.caption(JPEG, traceparent=TRACEPARENT)

    async def there() -> CaptionAnswer:
        async with AsyncClient("http://test", transport=script, **more) as client:
            return await client.caption(JPEG, traceparent=TRACEPARENT)

    return asyncio.run(there())


def ask_there(url: str, asynchronous: bool) -> CaptionAnswer:
    if asynchronous:
        return asyncio.run(AsyncClient(url, timeout=0.3).caption(JPEG))
    return Client(url).caption(JPEG, timeout=0.3)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.usefixtures("no_pauses")
class TestTries:
    def test_what_passes_is_tried_again_under_the_same_id(self, asynchronous: bool) -> None:
        zero = {"retry-after": "0"}
        script = Script(
            httpx.ConnectError("refused"),
            problem(503, "stopping", **zero),
            httpx.ReadError("reset"),
            httpx.RemoteProtocolError("disconnected"),
            problem(429, "quota_exceeded", **zero),
            html(502),
            html(503),
            html(504),
        )
        assert ask(script, asynchronous).caption == "a dog"
        assert len(script.requests) == 9
        assert len({request.headers["x-request-id"] for request in script.requests}) == 1
        assert {request.headers["traceparent"] for request in script.requests} == {TRACEPARENT}
        assert {request.content for request in script.requests} == {JPEG}

    @pytest.mark.parametrize(
        ("step", "kind"),
        [
            (problem(415, "not_an_image"), ImageRefusedError),
            (problem(422, "a_code_of_tomorrow"), ProblemError),
            (problem(500, "internal"), ServiceFailedError),
            (problem(500, "poison"), ServiceFailedError),
            (problem(504, "deadline_exceeded"), DeadlineError),
            (html(401), UnauthorizedError),
            (html(200), UnexpectedAnswerError),
            (html(302), UnexpectedAnswerError),
            (html(404), UnexpectedAnswerError),
            (httpx.Response(200, json={"caption": "half"}), UnexpectedAnswerError),
            (httpx.Response(200, json=[1]), UnexpectedAnswerError),
        ],
    )
    def test_what_does_not_pass_is_not(self, asynchronous: bool, step: httpx.Response, kind: type[ClientError]) -> None:
        script = Script(httpx.Response(step.status_code, headers=step.headers, content=step.content))
        with pytest.raises(ClientError) as caught:
            ask(script, asynchronous)
        assert type(caught.value) is kind
        assert len(script.requests) == 1

    def test_the_number_of_tries_can_be_bounded(self, asynchronous: bool) -> None:
        script = Script(*[problem(503, "overloaded") for _ in range(9)])
        with pytest.raises(BusyError) as caught:
            ask(script, asynchronous, tries=3)
        assert caught.value.code == "overloaded"
        assert len(script.requests) == 3

    def test_the_deadline_holds_and_the_last_reason_is_told(self, asynchronous: bool) -> None:
        script = Script(*[httpx.ConnectError("refused")] * 999)
        begin = time.monotonic()
        with pytest.raises(UnreachableError, match="refused"):
            ask(script, asynchronous, timeout=0.3)
        assert time.monotonic() - begin < 1
        assert 3 < len(script.requests) < 50

    def test_a_wait_beyond_the_deadline_is_not_begun(self, asynchronous: bool) -> None:
        script = Script(problem(503, "overloaded", **{"retry-after": "60"}))
        begin = time.monotonic()
        with pytest.raises(BusyError) as caught:
            ask(script, asynchronous, timeout=30)
        assert caught.value.retry_after == 60
        assert time.monotonic() - begin < 2

    def test_a_server_that_never_answers(self, asynchronous: bool) -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            begin = time.monotonic()
            with pytest.raises(DeadlineError):
                ask_there(url, asynchronous)
            assert 0.25 < time.monotonic() - begin < 2


class TestPauses:
    def test_they_double_up_to_a_bound_and_half_of_each_is_chance(self) -> None:
        tries = Tries(1e9, None, clock=lambda: 0.0)
        pauses = [tries.pause_after(httpx.ConnectError("x")) for _ in range(12)]
        for pause, whole in zip(pauses, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, *[5.0] * 6], strict=True):
            assert whole / 2 <= pause <= whole
        assert len({round(pause, 6) for pause in pauses[-6:]}) > 1

    @pytest.mark.parametrize("as_date", [False, True])
    def test_what_the_service_asks_for_is_waited_for_whole(self, as_date: bool) -> None:
        said = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True) if as_date else "3600"
        script = Script(problem(503, "busy", **{"retry-after": said}))
        with Client("http://test", transport=script, tries=1) as client, pytest.raises(BusyError) as caught:
            client.caption(JPEG)
        asked = caught.value.retry_after
        assert asked is not None
        assert 3500 < asked <= 3600
        assert asked < Tries(1e9, None).pause_after(caught.value) < asked + 1

    @pytest.mark.parametrize("nonsense", ["", "soon", "-1", "²"])
    def test_what_it_cannot_mean_is_passed_over(self, nonsense: str) -> None:
        headers = [(b"content-type", b"application/problem+json"), (b"retry-after", nonsense.encode())]
        response = httpx.Response(503, content=problem(503, "busy").content, headers=headers)
        with pytest.raises(BusyError) as caught, Client("http://test", transport=Script(response), tries=1) as client:
            client.caption(JPEG)
        assert caught.value.retry_after is None

    @pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http:// x"])
    def test_an_address_that_is_none(self, url: str) -> None:
        with pytest.raises(ValueError, match="must be like"):
            Client(url)


class Gate(httpx.MockTransport):
    """Answers when `go` is set; says how many wait at once."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.go = threading.Event()
        self.lock = threading.Lock()
        self.now = self.most = self.all = 0

    def _answer(self, request: httpx.Request) -> httpx.Response:
        with self.lock:
            self.now, self.all = self.now + 1, self.all + 1
            self.most = max(self.most, self.now)
        assert self.go.wait(10)
        time.sleep(0.002)
        with self.lock:
            self.now -= 1
        return httpx.Response(200, json={**GOOD, "caption": request.content.decode()})


class TestMany:
    def test_order_and_bounds(self) -> None:
        gate = Gate()
        taken = itertools.count()
        read: list[int] = []

        def photos() -> Iterator[bytes]:
            for number in taken:
                read.append(number)
                yield str(number).encode()

        with Client("http://test", transport=gate) as client:
            gate.go.set()
            items = client.caption_many(photos(), concurrency=3)
            first = list(itertools.islice(items, 50))
            assert [item.result().caption for item in first] == [str(number) for number in range(50)]
            assert [item.image for item in first[:2]] == [b"0", b"1"]
            assert gate.most == 3
            assert len(read) <= 50 + AHEAD * 3
            items.close()
            assert gate.now == 0
            assert gate.all <= len(read)

    def test_leaving_does_not_wait_for_a_pause(self) -> None:
        """The first photo is answered; the other's next try is most of a minute away."""
        refused = threading.Event()

        def answer(request: httpx.Request) -> httpx.Response:
            if request.content == b"first":
                return httpx.Response(200, json=GOOD)
            refused.set()
            return problem(503, "overloaded", **{"retry-after": "50"})

        with Client("http://test", transport=httpx.MockTransport(answer)) as client:
            items = client.caption_many([b"first", b"second"])
            assert next(iter(items)).answer is not None
            assert refused.wait(5)
            begin = time.monotonic()
            items.close()
            assert time.monotonic() - begin < 5

    def test_each_photo_has_its_own_error(self, address: str, tmp_path: Path) -> None:
        photos: list[Any] = [photo(20), b"none", tmp_path / "none.jpg", 3, photo(30)]
        with Client(address) as client:
            items = list(client.caption_many(photos, speed="fast"))
        assert [item.index for item in items] == [0, 1, 2, 3, 4]
        assert [type(item.error) for item in items[1:4]] == [ImageRefusedError, FileNotFoundError, TypeError]
        assert [width(items[at].result()) for at in (0, 4)] == [20, 30]
        with pytest.raises(ImageRefusedError):
            items[1].result()

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_the_bar_is_shown_when_asked_for_and_only_then(
        self, asynchronous: bool, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for progress in (False, True):
            if asynchronous:

                async def there(progress: bool) -> int:
                    async with AsyncClient("http://test", transport=Script()) as client:
                        return len([item async for item in client.caption_many([JPEG] * 7, progress=progress)])

                assert asyncio.run(there(progress)) == 7
            else:
                with Client("http://test", transport=Script()) as client:
                    assert len(list(client.caption_many([JPEG] * 7, progress=progress))) == 7
            assert ("7/7" in capfd.readouterr().err) is progress

    def test_without_tqdm_there_is_no_bar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with Client("http://test", transport=Script()) as client:
            assert len(list(client.caption_many([JPEG] * 3, progress=True))) == 3

    def test_leaving_the_asynchronous_one_hangs_up(self) -> None:
        async def there() -> tuple[int, int]:
            hung_up = asked = 0

            async def answer(request: httpx.Request) -> httpx.Response:
                nonlocal hung_up, asked
                asked += 1
                if asked == 1:
                    return httpx.Response(200, json=GOOD)
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    hung_up += 1
                    raise
                raise AssertionError

            async with AsyncClient("http://test", transport=httpx.MockTransport(answer)) as client:
                items = client.caption_many([JPEG] * 9, concurrency=2)
                async for _ in items:
                    break
                await items.aclose()
            return asked, hung_up

        asked, hung_up = asyncio.run(there())
        assert (asked, hung_up) == (asked, asked - 1)
        assert hung_up in (1, 2)


def test_it_loads_neither_torch_nor_the_service() -> None:
    heavy = {"torch", "numpy", "fastapi", "pydantic", "PIL", "tqdm", "service.settings", "model"}
    code = f"import sys, service.client; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


class Process:
    """One of ours that can be restarted in the same place."""

    def __init__(self, role: str, **settings: object) -> None:
        self._role = role
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DEECAP_")}
        ours = {f"DEECAP_{name.upper()}": str(value) for name, value in settings.items()}
        self._environment = {**clean, **ours, "OMP_NUM_THREADS": "1"}
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, self._role],
            cwd=ROOT, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline()  # it listens, or works

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self._process.send_signal(how)
        assert self._process.wait(20) == (0 if how == signal.SIGTERM else -how)

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.stop(how)
        self.start()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def photos_until(done: Callable[[], bool]) -> Iterator[bytes]:
    """Each a little wider than the one before, so that an answer proves whose it is."""
    for number in itertools.count():
        if done():
            return
        yield photo(16 + number)


def test_a_rolling_restart_of_workers_and_front_in_mid_batch() -> None:
    """Each in turn is stopped as an operator does it and started again in its place, while photos keep coming."""
    if find_binary() is None:
        pytest.skip(MISSING)
    redis = RedisServer()
    redis.start()
    with ExitStack() as stack:
        stack.callback(redis.close)
        settings = {"broker": redis.url, "feature_cache_mb": 0, "worker_timeout_s": 2}
        port = free_port()
        processes = [Process("worker", **settings, metrics_port=0)]
        stack.callback(processes[0].end)
        processes.append(Process("front", **settings, port=port))
        stack.callback(processes[1].end)
        restarted: list[float] = []
        begun = threading.Event()  # a start takes as long as the machine lets it

        def roll() -> None:
            begun.wait()
            for process in processes:
                time.sleep(0.3)
                process.restart()
                restarted.append(time.monotonic())

        rolling = threading.Thread(target=roll)
        with Client(f"http://127.0.0.1:{port}", timeout=40) as client:
            rolling.start()
            answered: list[float] = []
            for item in client.caption_many(photos_until(lambda: not rolling.is_alive()), concurrency=4):
                assert width(item.result()) == 16 + item.index
                answered.append(time.monotonic())
                begun.set()
        rolling.join()
        assert len(restarted) == 2
        assert answered[0] < restarted[0] < restarted[1] < answered[-1]


def test_a_rolling_restart_in_the_middle_of_everything_else() -> None:
    """Batches in one request, streams and jobs, each by a thread of its own, until all was restarted."""
    if find_binary() is None:
        pytest.skip(MISSING)
    redis = RedisServer()
    redis.start()
    with ExitStack() as stack:
        stack.callback(redis.close)
        settings = {"broker": redis.url, "feature_cache_mb": 0, "worker_timeout_s": 2}
        port = free_port()
        processes = [Process("worker", **settings, metrics_port=0), Process("front", **settings, port=port)]
        for process in processes:
            stack.callback(process.end)
        client = stack.enter_context(Client(f"http://127.0.0.1:{port}", timeout=40))
        rolled = threading.Event()
        done = {"batch": 0, "stream": 0, "job": 0}

        def batch() -> None:
            items = client.captions([photo(16 + number) for number in range(5)])
            assert [width(item.result()) for item in items] == [16, 17, 18, 19, 20]

        def stream() -> None:
            *_, answer = client.stream(photo(30))
            assert isinstance(answer, CaptionAnswer)
            assert width(answer) == 30

        def job() -> None:
            assert width(client.wait(client.submit(photo(40)).id)) == 40

        def again(name: str, one: Callable[[], None]) -> None:
            while not rolled.is_set():
                one()
                done[name] += 1

        with ThreadPoolExecutor(3) as threads:
            ways = [("batch", batch), ("stream", stream), ("job", job)]
            running = [threads.submit(again, name, one) for name, one in ways]
            try:
                for restart in [*(process.restart for process in processes), lambda: None]:
                    before = dict(done)
                    while any(done[name] == before[name] for name in done):
                        assert not any(each.done() for each in running), [each.exception() for each in running]
                        time.sleep(0.02)
                    restart()
            finally:
                rolled.set()
            for each in running:
                each.result()
        assert min(done.values()) >= 3, done  # before, between and after the two restarts


def test_a_service_that_is_killed_and_comes_back_at_the_same_port() -> None:
    """With the asynchronous client: connections break in the middle of everything."""
    port = free_port()
    process = Process("front", port=port, feature_cache_mb=0)

    async def there() -> None:
        count, captioned = 0, threading.Event()

        def restart() -> None:
            assert captioned.wait(20)
            process.restart(signal.SIGKILL)

        restarting = asyncio.create_task(asyncio.to_thread(restart))
        async with AsyncClient(f"http://127.0.0.1:{port}", timeout=40) as client:
            photos = photos_until(lambda: restarting.done() and count >= 40)
            async for item in client.caption_many(photos, concurrency=4):
                assert width(item.result()) == 16 + item.index
                count += 1
                if count == 10:
                    captioned.set()
        await restarting

    try:
        asyncio.run(there())
    finally:
        process.end()
