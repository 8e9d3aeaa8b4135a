"""Many large bodies at once, sent slowly or never to their end: the process holds no more of them than it may."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuzz.server import URL, Server, serving
from tests.service import pictures

MOST = 24_000_000  # bytes of all bodies
BODY = pictures.jpeg() + bytes(6_000_000)  # what follows a JPEG's end is passed over
CROWD = 60  # 360 MB in all
# Beside the bodies: what a vector has to spare, and for each connection what was read and not looked at yet.
BESIDE_MB = 45.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    limits = {"max_body_bytes": 8_000_000, "max_batch_bytes": 8_000_000, "max_uploads_bytes": MOST, "timeout_ms": 6_000}
    with serving(tmp_path, **limits) as server:
        server.assert_it_captions()
        yield server
        server.assert_it_captions()
        assert held(server) == 0
        server.assert_no_exception_was_logged()


def held(server: Server) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("deecap_uploads_bytes "))


def upload(server: Server, share: float, chunked: bool) -> bytes:
    """Sends that share of a body in ten pieces within a second or two; the answer's head, or nothing."""
    length = b"Transfer-Encoding: chunked\r\n\r\n%x" % len(BODY) if chunked else b"Content-Length: %d\r\n" % len(BODY)
    body = BODY + (b"\r\n0\r\n\r\n" if chunked else b"")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        try:
            connection.sendall(b"POST %b HTTP/1.1\r\nHost: test\r\n%b\r\n" % (URL.encode(), length))
            sent = body[: int(share * len(body))]
            for number in range(10):
                time.sleep(0.1)
                connection.sendall(sent[number * len(sent) // 10 : (number + 1) * len(sent) // 10])
            if share < 1:
                time.sleep(0.5)
                return b""  # it hangs up
        except ConnectionError:
            pass  # refused, and the answer is there to be read
        answer = b""
        try:
            while b"\r\n\r\n" not in answer and (piece := connection.recv(65_536)):
                answer += piece
        except ConnectionError:
            pass
        return answer.split(b"\r\n\r\n")[0].lower()


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
@pytest.mark.parametrize("share", [1.0, 0.9], ids=["whole", "cut"])
def test_a_crowd_of_large_bodies(server: Server, share: float, chunked: bool) -> None:
    before = server.megabytes()
    most = most_held = 0.0
    with ThreadPoolExecutor(CROWD) as threads:
        crowd = [threads.submit(upload, server, share, chunked) for _ in range(CROWD)]
        while not all(each.done() for each in crowd):
            most, most_held = max(most, server.megabytes()), max(most_held, held(server))
            time.sleep(0.02)
    assert MOST / 2 < most_held <= MOST, "the bodies never came near the limit, or went beyond it"
    assert most - before < MOST / 1e6 * 1.25 + BESIDE_MB, f"{before:.0f} MB, at most {most:.0f} MB"
    answers = [each.result() for each in crowd]
    if share == 1:
        assert any(answer.startswith(b"http/1.1 200") for answer in answers)
        refused = [answer for answer in answers if answer.startswith(b"http/1.1 503")]
        assert len(refused) > CROWD / 3, answers
        assert all(b"retry-after: " in answer for answer in refused)
        assert any(b"connection: close" in answer for answer in refused), "none was refused before its end"
    end = time.monotonic() + 5
    while held(server) and time.monotonic() < end:
        time.sleep(0.05)


def test_while_a_large_form_comes_others_are_answered_at_once(tmp_path: Path) -> None:
    """It is parsed in pieces as it comes, and at no time keeps others waiting for all of it."""
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    form = part + pictures.jpeg() + b"\r\n--" * 8_000_000 + b"\r\n--x--\r\n"  # almost boundaries, the dearest
    head = b"POST /v1/caption HTTP/1.1\r\nHost: test\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    took: list[float] = []
    with (
        serving(tmp_path, max_body_bytes=40_000_000) as server,
        ThreadPoolExecutor(2) as threads,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
    ):
        sending = threads.submit(connection.sendall, head + b"Content-Length: %d\r\n\r\n" % len(form) + form)
        receiving = threads.submit(connection.recv, 12)
        while not receiving.done():
            begin = time.perf_counter()
            assert server.client.get("/livez").status_code == 200
            took.append(time.perf_counter() - begin)
        sending.result()
        assert receiving.result() == b"HTTP/1.1 200"
    assert len(took) > 20
    assert max(took) < sum(took) / 4, f"a probe waited {1000 * max(took):.0f} ms of {1000 * sum(took):.0f}"
