"""What a client may do with its connection: heads and their time, upgrades, bodies that nobody wants."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI

from service import connection
from service.connection import MAX_HEAD_BYTES, MAX_HEADERS
from tests.service import pictures
from tests.service.over_sockets import Client, serving

JPEG = pictures.jpeg()
POST = b"POST /v1/caption HTTP/1.1\r\nHost: test\r\n"
GOOD = POST + b"Content-Length: %d\r\n\r\n" % len(JPEG) + JPEG
PROBE = b"GET /livez HTTP/1.1\r\nHost: test\r\n"


@pytest.fixture
def address(app: FastAPI) -> Iterator[str]:
    with serving(app) as address:
        for _ in range(500):
            if httpx.get(f"{address}/readyz").status_code == 200:
                break
            time.sleep(0.01)
        yield address


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.3)


def rejections(address: str, reason: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(
        float(line.split()[1]) for line in lines if line.startswith(f'deecap_rejections_total{{reason="{reason}"')
    )


@pytest.mark.parametrize(
    "head",
    [
        PROBE + b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
        PROBE + b"".join(b"X-%d: a\r\n" % number for number in range(MAX_HEADERS)) + b"\r\n",
        b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: test\r\n\r\n",
        PROBE + b"X-A: " + b"a" * 1_000_000,  # and no end
        b"\r\n" * 500_000,
    ],
    ids=["bytes", "fields", "path", "no end", "empty lines"],
)
def test_a_head_has_bounds(address: str, head: bytes) -> None:
    with Client(address) as client:
        client.send(head[:100_000])
        answer = client.end()
    assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n"), answer[:200]
    assert b'"code": "head_too_large"' in answer
    assert rejections(address, "head_too_large") == 1


def test_a_head_within_the_bounds_is_taken(address: str) -> None:
    fields = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 200) for number in range(MAX_HEADERS - 2))
    with Client(address) as client:
        client.send(PROBE + fields + b"Connection: close\r\n\r\n")
        assert client.end().startswith(b"HTTP/1.1 200")


def test_a_head_in_small_pieces_has_the_same_bounds(address: str) -> None:
    with Client(address) as client:
        client.send(PROBE + b"X-A: ", *[b"a" * 1_000] * (MAX_HEAD_BYTES // 1_000 + 1), pause=0.001)
        assert client.end().startswith(b"HTTP/1.1 431")


@pytest.mark.usefixtures("quick")
def test_a_head_that_takes_its_time_is_dropped(address: str) -> None:
    begin = time.monotonic()
    with Client(address) as client, pytest.raises(OSError):  # noqa: PT011  # reset or broken pipe
        client.send(PROBE, *[b"X: a\r\n"] * 40, pause=0.05)
    assert time.monotonic() - begin < 1.5


@pytest.mark.usefixtures("quick")
def test_the_next_head_is_not_held_against_who_waits_for_an_answer(address: str) -> None:
    with Client(address) as client:
        client.send(PROBE + b"\r\n")
        client.until(b'{"status":"ok"}')
        time.sleep(0.5)  # between two requests there is more time
        client.send(PROBE + b"\r\n")
        client.until(b'{"status":"ok"}')


def test_lines_after_the_last_chunk_are_no_headers_and_have_an_end(address: str) -> None:
    chunked = POST + b"Transfer-Encoding: chunked\r\nX-Request-ID: first\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(JPEG), JPEG)
    with Client(address) as client:
        client.send(chunked + b"X-Late: a\r\nContent-Type: text/plain\r\n\r\n")
        answer = client.until(b'"request_id":"first"}').lower()
        assert answer.startswith(b"http/1.1 200"), answer
        assert b"x-request-id: first" in answer
        client.send(chunked, *[b"X-Late: " + b"a" * 10_000 + b"\r\n"] * 5)
        assert b"HTTP/1.1 431" in client.end()


def test_a_request_that_asks_for_an_upgrade_is_answered_without(address: str) -> None:
    """As Java's client sends it, in one piece and in two."""
    asks = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    head = POST + asks + b"Content-Length: %d\r\n\r\n" % len(JPEG)
    with Client(address) as client:
        for pieces in ([head + JPEG], [head, JPEG], [head + JPEG[:100], JPEG[100:]]):
            client.send(*pieces, pause=0.05)
            answer = client.until(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), answer
            client.until(b'"request_id":')
            client.until(b"}")
    assert httpx.request("CONNECT", f"{address}/x").status_code == 400


def test_what_follows_a_good_request_and_is_none_is_refused_after_its_answer(address: str) -> None:
    with Client(address) as client:
        client.send(GOOD + b"GARBAGE\r\n\r\n")
        client.until(b"HTTP/1.1 200")
        answer = client.end()
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"HTTP/1.1 400 Bad Request\r\n" in answer
    assert answer.index(b'"caption"') < answer.index(b"HTTP/1.1 400")
    with Client(address) as client:  # and with one between that waits for its turn, and whose body breaks
        broken = POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"
        client.send(GOOD + GOOD + broken)
        answer = client.end()
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"400"]


def test_a_body_that_breaks_is_told_and_counts_as_the_clients_fault(address: str) -> None:
    with Client(address) as client:
        client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"xyz\r\n", pause=0.1)
        assert client.end().startswith(b"HTTP/1.1 400")
    text = httpx.get(f"{address}/metrics").text
    assert 'outcome="internal"' not in text
    assert "deecap_disconnects_total 1.0" in text
    assert "deecap_uploads_bytes 0.0" in text


@pytest.mark.usefixtures("quick")
def test_an_answer_before_the_body_can_be_read_and_ends_the_connection(address: str) -> None:
    """The client sends on for a while, as most do, before it looks for an answer."""
    begin = time.monotonic()
    with Client(address) as client:
        client.send(POST + b"Content-Length: 100000000\r\n\r\n", bytes(50_000), bytes(50_000), pause=0.05)
        answer = client.end()
        assert answer.startswith(b"HTTP/1.1 413"), answer
        assert b"connection: close" in answer
        with pytest.raises(OSError):  # noqa: PT011  # it is not read for ever
            client.send(*[bytes(50_000)] * 30, pause=0.05)
    assert time.monotonic() - begin < 2


def test_who_waits_for_leave_to_send_is_refused_without_it(address: str) -> None:
    with Client(address) as client:
        client.send(POST + b"Expect: 100-continue\r\nContent-Length: 100000000\r\n\r\n")
        assert client.end().startswith(b"HTTP/1.1 413")
    with Client(address) as client:
        client.send(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(JPEG))
        assert client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(JPEG)
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_head_is_get_without_its_body(address: str) -> None:
    for path in ("/livez", "/readyz", "/v1/speeds", "/nowhere"):
        asked, got = httpx.head(address + path), httpx.get(address + path)
        assert (asked.status_code, asked.content) == (got.status_code, b"")
        assert asked.headers["content-type"] == got.headers["content-type"]
    assert httpx.head(f"{address}/v1/caption").status_code == 405
