"""Logs: one line per request with its ids, for machines and for people, and nothing in it that is secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from service import logs
from service.app import create_app
from service.settings import Settings
from service.trace import trace_id
from tests.service import pictures
from tests.service.fakes import FakeCaptioner
from tests.service.running import running, until_ready

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
JPEG = pictures.jpeg()


@pytest.fixture
def logged() -> Iterator[Callable[..., io.StringIO]]:
    """`logged(log_format="json")` sets logging up and returns where it goes; afterwards all is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def set_up(**settings: Any) -> io.StringIO:
        stream = io.StringIO()
        logs.set_up(Settings(**settings), stream)
        return stream

    yield set_up
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def objects(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_has_ids_fields_and_exceptions_in_one_line(logged: Callable[..., io.StringIO]) -> None:
    stream = logged(log_format="json")
    ids = logs.current.set(logs.RequestIds("r-1", TRACE))
    try:
        raise ValueError("two\nlines \udcff")
    except ValueError:
        logging.getLogger("x.y").exception("it failed: %s", "é\n", extra=logs.fields(count=3))
    logs.current.reset(ids)
    logging.getLogger("x").info("later")
    first, second = objects(stream)
    assert first["time"].endswith("+00:00")
    assert (first["level"], first["logger"], first["message"]) == ("error", "x.y", "it failed: é\n")
    assert (first["request_id"], first["trace_id"], first["count"]) == ("r-1", TRACE, 3)
    assert "ValueError: two\nlines" in first["exception"]
    assert not {"request_id", "trace_id", "exception"} & set(second)


def test_text_has_the_same(logged: Callable[..., io.StringIO]) -> None:
    stream = logged(log_format="text")
    ids = logs.current.set(logs.RequestIds("r-1"))
    logging.getLogger("x").warning("it is late", extra=logs.fields(ms=3.5))
    logs.current.reset(ids)
    assert stream.getvalue().endswith(" WARNING x: it is late request_id=r-1 ms=3.5\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_on_a_terminal_and_json_elsewhere(logged: Callable[..., io.StringIO]) -> None:
    elsewhere = logged()
    logging.getLogger("x").info("hello")
    assert objects(elsewhere)[0]["message"] == "hello"
    terminal = Terminal()
    logs.set_up(Settings(), terminal)
    logging.getLogger("x").info("hello")
    assert terminal.getvalue().endswith("INFO x: hello\n")


def test_the_level_and_the_servers_own_logs(logged: Callable[..., io.StringIO]) -> None:
    stream = logged(log_level="warning", log_format="json")
    logging.getLogger("x").info("too little")
    logging.getLogger("uvicorn.access").warning("not ours")
    logging.getLogger("uvicorn.error").warning("the server's")
    assert [line["message"] for line in objects(stream)] == ["the server's"]


@pytest.mark.anyio
async def test_one_line_for_each_request(
    captioner: FakeCaptioner, quick_stop: None, logged: Callable[..., io.StringIO]
) -> None:
    stream = logged(log_format="json")
    settings = Settings(api_keys=SecretStr("robot:correct-horse"), feature_cache_mb=0)
    app = create_app(settings, load=lambda: captioner)
    async with running(app) as client:
        await until_ready(client)

        async def line_of(request_id: str, method: str, url: str, **more: Any) -> dict[str, Any]:
            headers = {"X-Request-ID": request_id, "X-API-Key": "correct-horse", **more.pop("headers", {})}
            await client.request(method, url, headers=headers, **more)
            [line] = [
                each
                for each in objects(stream)
                if each["logger"] == logs.ACCESS and each.get("request_id") == request_id
            ]
            assert line.pop("ms") >= 0
            for name in ("time", "level", "logger", "message"):
                line.pop(name)
            return line

        parent = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
        assert await line_of("good", "POST", "/v1/caption?speed=fast", content=JPEG, headers=parent) == {
            "request_id": "good", "trace_id": TRACE, "method": "POST", "route": "/v1/caption", "status": 200,
            "outcome": "ok", "speed": "fast", "key": "robot",
        }  # fmt: skip
        assert await line_of("bad", "POST", "/v1/caption", content=b"x", headers={"traceparent": "00-0-0-0"}) == {
            "request_id": "bad", "method": "POST", "route": "/v1/caption", "status": 415,
            "outcome": "not_an_image", "speed": "balanced", "key": "robot",
        }  # fmt: skip
        assert await line_of("who", "GET", "/v1/speeds", headers={"X-API-Key": "wrong-horse"}) == {
            "request_id": "who", "method": "GET", "route": "unmatched", "status": 401, "outcome": "unauthorized",
        }  # fmt: skip
        captioner.fails = RuntimeError("secret place")
        assert (await line_of("fail", "POST", "/v1/caption", content=JPEG))["outcome"] == "internal"
        about = [line for line in objects(stream) if line.get("request_id") == "fail"]
        assert any("secret place" in line.get("exception", "") for line in about), "the worker's log has the id too"
        assert not any(line.get("route") == "/readyz" and line["status"] == 200 for line in objects(stream))
        assert "horse" not in stream.getvalue()


@pytest.mark.anyio
async def test_good_answers_to_probes_are_logged_for_who_asks_for_all(
    client: httpx.AsyncClient, logged: Callable[..., io.StringIO]
) -> None:
    stream = logged(log_format="json", log_level="debug")
    await client.get("/livez")
    assert [line["level"] for line in objects(stream) if line.get("route") == "/livez"] == ["debug"]


@pytest.mark.parametrize(
    ("header", "id"),
    [
        (f"00-{TRACE}-{SPAN}-01", TRACE),
        (f"00-{TRACE}-{SPAN}-00", TRACE),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", TRACE),  # 4.1.2: a later version may have more
        (f"cc-{TRACE}-{SPAN}-01", TRACE),
        (f"00-{TRACE}-{SPAN}-01-more", ""),
        (f"cc-{TRACE}-{SPAN}-01more", ""),
        (f"ff-{TRACE}-{SPAN}-01", ""),
        (f"00-{'0' * 32}-{SPAN}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-{SPAN}-01", ""),
        (f"00-{TRACE[1:]}-{SPAN}-01", ""),
        (f"00-{TRACE}-{SPAN}-0", ""),
        (f"00-{TRACE}-{SPAN}-01\n", ""),
        (f" 00-{TRACE}-{SPAN}-01", ""),
        ("", ""),
    ],
)
def test_traceparent(header: str, id: str) -> None:
    assert trace_id(header) == id
