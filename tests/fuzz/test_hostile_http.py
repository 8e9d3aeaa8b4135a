"""HTTP as no honest client writes it, over a real socket: it is refused or dropped, soon, and others are served."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import select
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.fuzz.conftest import TIMEOUT_MS
from tests.fuzz.server import URL, Server, problem_fault
from tests.service import pictures

JPEG = pictures.jpeg()
LARGER = pictures.encode(pictures.photo((240, 160)), "JPEG")  # mostly pixels, so that it may be damaged and yet decode
QUICK, LONG = 150, 5_000
PATIENCE = 0.25  # seconds: some ten times what an answer takes, where there is one
# For the answer to what was sent at once: well above what a busy machine needs, well below the service's own limit.
SECONDS = 2.5
ALLOWED = {200, 400, 401, 404, 405, 408, 413, 415, 422, 431}
TOLERANCE_MB = 4.0  # as for the rounds of mutants
LEAST_SHARE = 0.1  # of broken requests that must be captioned, and as many refused


@dataclass(frozen=True)
class Answer:
    """What came back: nothing at all has status 0."""

    status: int
    headers: dict[str, str]
    body: bytes
    rest: bytes = b""
    """Of the same connection, after this answer."""


def exchange(
    server: Server, *pieces: bytes, pause: float = 0.0, patience: float | None = None, seconds: float = 10.0
) -> Answer:
    """Sends the pieces over a connection of its own; the first answer, once the server is done.

    With `patience` the client sends the end of its side after so many seconds without an answer: what it sent may have
    been cut, and then the server waits for more. Sooner would be blind, since the server lets go of who has ended.
    """
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            while not is_whole(received):
                if patience is not None and not select.select([connection], [], [], patience)[0]:
                    connection.shutdown(socket.SHUT_WR)
                    patience = None
                piece = connection.recv(65_536)
                if not piece:
                    break
                received += piece
        except ConnectionError:  # it may hang up on whoever sends on
            pass
    return parsed(received)


def parsed(received: bytes) -> Answer:
    head, _, rest = received.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 1"):  # 100 Continue: the answer comes after it
        return parsed(rest)
    if not head:
        return Answer(0, {}, b"")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers.get("content-length", len(rest)))
    return Answer(int(first.split()[1]), headers, rest[:length], rest[length:])


def is_whole(received: bytes) -> bool:
    """Whether an answer with a Content-Length has all arrived."""
    if not received.endswith((b"\r\n", b"}")):
        return False
    answer = parsed(received)
    return "content-length" in answer.headers and len(answer.body) == int(answer.headers["content-length"])


def head(*lines: str | bytes, target: str | bytes = URL, method: bytes = b"POST", host: bool = True) -> bytes:
    """A request's head; lines as bytes go out as they are."""
    raw = [line if isinstance(line, bytes) else line.encode("latin-1") for line in lines]
    target = target if isinstance(target, bytes) else target.encode("latin-1")
    start = [method + b" " + target + b" HTTP/1.1", *([b"Host: test"] if host else [])]
    return b"\r\n".join([*start, *raw]) + b"\r\n\r\n"


def post(body: bytes, *lines: str | bytes, target: str | bytes = URL) -> bytes:
    return head(*lines, f"Content-Length: {len(body)}", target=target) + body


def form(body: bytes, boundary: str = "x") -> bytes:
    return post(body, f"Content-Type: multipart/form-data; boundary={boundary}")


def part(name: str | bytes, data: bytes, more: bytes = b"") -> bytes:
    name = name if isinstance(name, bytes) else name.encode()
    return b"--x\r\nContent-Disposition: form-data; name=" + name + more + b"\r\n\r\n" + data + b"\r\n"


FILE = part("image", JPEG, b"; filename=a")
END = b"--x--\r\n"


def fault_of(answer: Answer, nothing: bool = False) -> str:
    """Why this is no answer to nonsense, "" where it is one; with `nothing`, a closed connection is one too.

    What is no HTTP is answered by the server below the service, in plain text.
    """
    if answer.status == 0:
        return "" if nothing else "no answer"
    if answer.status not in ALLOWED:
        return f"status {answer.status}: {answer.body[:300]!r}"
    if answer.status == 400 and (not answer.body or b"Invalid HTTP request received." in answer.body):
        return ""
    if answer.status == 200:
        return ""
    return problem_fault(answer.status, answer.headers, answer.body)


def test_a_good_request_over_this_socket(server: Server) -> None:
    """Else the rest of this file would show nothing."""
    assert exchange(server, post(JPEG)).status == 200
    assert exchange(server, form(FILE + END)).status == 200
    assert fault_of(Answer(500, {}, b""))
    assert fault_of(Answer(422, {"content-type": "text/plain"}, b"no"))


TYPE = "Content-Type: multipart/form-data; boundary=x"
SPLIT = part("image", b"\xff\xd8\xff\r\n--x\r\n" + JPEG, b"; filename=a")
LINES = part("image", JPEG, b"; filename=a" + b"\r\nX-A: b" * 50_000)

FORMS: dict[str, tuple[bytes, set[int]]] = {
    "no end": (form(FILE), {422}),
    "cut in the head of a part": (form(FILE[:30]), {400, 422}),
    "another boundary": (form(FILE + END, "y"), {400}),
    "a boundary within the picture": (form(SPLIT + END), {400}),
    "an empty boundary": (form(FILE + END, ""), {400}),
    "a boundary of 100,000": (form(FILE + END, "x" * 50_000), {400, 431}),
    "a boundary of line breaks": (form(FILE + END, '"\\r\\n"'), {400}),
    "a boundary that is no ASCII": (form(FILE + END, "\xe9\xff"), {400}),
    "thousands of fields": (form(b"".join(part(f"f{n}", b"") for n in range(5_000)) + FILE + END), {400}),
    "thousands of files": (form(b"".join(part(f"f{n}", b"a", b"; filename=a") for n in range(5_000)) + END), {422}),
    "thousands of images": (form(FILE * 20 + END), {422}),
    "thousands of lines in a part": (form(LINES + END), {200, 400}),
    "a line of a megabyte in a part": (form(part("image", JPEG, b"; filename=" + b"a" * 1_000_000) + END), {200, 400}),
    "a name of a megabyte": (form(part("n" * 1_000_000, b"") + FILE + END), {400, 422}),
    "a name that is no UTF-8": (form(part(b"\xff\xfe\x80", b"fast") + FILE + END), {400, 422}),
    "a value that is no UTF-8": (form(part("speed", b"\xff\xfe\x80") + FILE + END), {400, 422}),
    "a file name that is no UTF-8": (form(part("image", JPEG, b'; filename="\xff\xfe"') + END), {200, 400}),
    "a charset that is none": (post(FILE + END, TYPE + "; charset=no"), {200, 400}),
    "a charset that doubles": (post(FILE + END, TYPE + "; charset=utf-16"), {200, 400, 422}),
    "no names": (form(b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n" + FILE + END), {400, 422}),
    "no line breaks": (form(b"--x" * 100_000), {400, 422}),
    "dashes": (form(b"-" * 1_000_000), {400}),
    "a million almost boundaries": (form(part("image", b"\r\n--" * 250_000, b"; filename=a") + END), {415}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms(server: Server, name: str) -> None:
    sent, statuses = FORMS[name]
    begin = time.monotonic()
    answer = exchange(server, sent)
    assert not fault_of(answer)
    assert answer.status in statuses, answer
    assert time.monotonic() - begin < SECONDS


CAPTION = head(f"Content-Length: {len(JPEG)}") + JPEG
HEADS: dict[str, tuple[bytes, set[int]]] = {
    "no length": (head(), {400}),
    "two lengths": (head("Content-Length: 5", "Content-Length: 6") + b"hello", {400}),
    "a length that is negative": (head("Content-Length: -1") + JPEG, {400}),
    "a length of digits that are not ASCII": (head(b"Content-Length: \xb2\xb3") + JPEG, {400}),
    "a length of thousands of digits": (head("Content-Length: " + "9" * 5_000) + JPEG, {400, 413}),
    "a length beyond 64 bits": (head("Content-Length: " + "9" * 20) + JPEG, {400, 413}),
    "a length and chunks": (head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n", {400}),
    "chunks twice": (head("Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n", {400, 501}),
    "an unknown coding": (head("Transfer-Encoding: gzip") + JPEG, {400, 501}),
    "a chunk's length that is none": (head("Transfer-Encoding: chunked") + b"xyz\r\nabc\r\n0\r\n\r\n", {400}),
    "a chunk's length that is negative": (head("Transfer-Encoding: chunked") + b"-5\r\nabc\r\n0\r\n\r\n", {400}),
    "a chunk of 2^70": (head("Transfer-Encoding: chunked") + b"f" * 18 + b"\r\nabc", {400, 408}),
    "an empty chunked body": (head("Transfer-Encoding: chunked") + b"0\r\n\r\n", {400}),
    "no host": (head(f"Content-Length: {len(JPEG)}", host=False) + JPEG, {200, 400}),
    "two hosts": (head("Host: other", f"Content-Length: {len(JPEG)}") + JPEG, {200, 400}),
    "a host that is none": (post(JPEG, "X: y").replace(b"Host: test", b"Host: \xff%00@:99999"), {200, 400}),
    "thousands of headers": (post(JPEG, *(f"X-{n}: a" for n in range(5_000))), {200, 400, 431}),
    "a header of 200,000": (post(JPEG, "X-A: " + "a" * 200_000), {400, 431}),
    "a header with a zero": (post(JPEG, b"X-A: a\x00b"), {400}),
    "a header with a lone line feed": (post(JPEG, b"X-A: a\nX-B: b"), {200, 400}),
    "a header that is folded": (post(JPEG, b"X-A: a\r\n b"), {200, 400}),
    "a header without a name": (post(JPEG, b": a"), {400}),
    "a name with a space": (post(JPEG, b"X A: a"), {400}),
    "an id with a line break in it": (post(JPEG, b"X-Request-ID: a\rb"), {200, 400}),
    "an id that is no ASCII": (post(JPEG, b"X-Request-ID: \xff\xfe"), {200}),
    "an id of 10,000": (post(JPEG, "X-Request-ID: " + "a" * 10_000), {200}),
    "a traceparent that is none": (post(JPEG, b"traceparent: 00-\xff-\x80-01"), {200}),
    "two traceparents": (post(JPEG, "traceparent: a", "traceparent: b"), {200}),
    "a type that is no UTF-8": (post(JPEG, b"Content-Type: \xff\xfe/\x80"), {415}),
    "a type of 50,000": (post(JPEG, "Content-Type: a/" + "b" * 50_000), {415, 431, 400}),
    "two types": (post(JPEG, "Content-Type: image/png", "Content-Type: application/json"), {200, 400}),
    "a type of semicolons": (post(JPEG, "Content-Type: multipart/form-data" + ";" * 20_000), {400}),
    "a key that is no ASCII": (post(JPEG, b"Authorization: Bearer \xff\xfe", b"X-API-Key: \xff"), {200}),
    "an expectation": (head("Expect: 100-continue", f"Content-Length: {len(JPEG)}") + JPEG, {200}),
    "an unknown expectation": (head("Expect: the-worst", f"Content-Length: {len(JPEG)}") + JPEG, {200, 417}),
    "an upgrade": (post(JPEG, "Connection: Upgrade", "Upgrade: websocket"), {200, 400, 426}),
    "an upgrade to HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 404, 505}),
    "a query that is no UTF-8": (post(JPEG, target="/v1/caption?speed=%FF%FE&%80=%C3%28"), {422}),
    "a query of broken percents": (post(JPEG, target="/v1/caption?speed=%&tau=%zz&=&&"), {422}),
    "a query of thousands of options": (post(JPEG, target="/v1/caption?" + "a=b&" * 10_000), {400, 422, 431}),
    "a query with raw bytes": (post(JPEG, target=b"/v1/caption?speed=\xff\xfe"), {400, 422}),
    "a path that is no UTF-8": (post(JPEG, target="/v1/%FF%FE"), {404}),
    "a path upwards": (post(JPEG, target="/v1/../../etc/passwd"), {404}),
    "a path with a zero": (post(JPEG, target="/v1/caption%00"), {404}),
    "a path of 30,000": (post(JPEG, target="/" + "a" * 30_000), {404, 431}),
    "a whole address": (post(JPEG, target="http://elsewhere/v1/caption"), {200, 404}),
    "an asterisk": (head("Content-Length: 0", target="*", method=b"OPTIONS"), {400, 404, 405}),
    "a tunnel": (head(target="elsewhere:443", method=b"CONNECT"), {400, 404, 405}),
    "an unknown method": (head("Content-Length: 0", method=b"BREW"), {400, 405}),
    "a method of 10,000": (head("Content-Length: 0", method=b"A" * 10_000), {400, 405}),
    "another version": (CAPTION.replace(b"HTTP/1.1", b"HTTP/9.9"), {200, 400, 505}),
    "an old version": (CAPTION.replace(b"HTTP/1.1", b"HTTP/1.0"), {200}),
    "no HTTP at all": (random.Random(0).randbytes(10_000) + b"\r\n\r\n", {400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), {400}),
    "empty lines": (b"\r\n" * 100 + CAPTION, {200, 400}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads(server: Server, name: str) -> None:
    sent, statuses = HEADS[name]
    begin = time.monotonic()
    answer = exchange(server, sent)
    assert answer.status in statuses, answer
    assert answer.status == 200 or not fault_of(answer)
    assert time.monotonic() - begin < max(SECONDS, TIMEOUT_MS / 1000 + 1 if 408 in statuses else 0)


JSONS: dict[str, tuple[bytes, set[int]]] = {
    "not UTF-8": (b'{"image": "\xff\xfe"}', {400}),
    "UTF-16": (json.dumps({"image": base64.b64encode(JPEG).decode()}).encode("utf-16"), {200, 400}),
    "UTF-7": (b"+AHsAfQ-", {400}),
    "lone surrogates": (b'{"image": "\\ud800"}', {422}),
    "a deep array": (b"[" * 1_000_000, {400}),
    "a deep object": (b'{"a":' * 300_000 + b"1" + b"}" * 300_000, {400}),
    "hundreds of thousands of keys": (json.dumps({f"k{n}": n for n in range(200_000)}).encode(), {422}),
    "one key twice": (b'{"image": "a", "image": ""}', {422}),
    "numbers that are none": (b'{"image": "QUJD", "tau": NaN, "beam": 1e999}', {415, 422}),
    "a number of a million digits": (b'{"image": "QUJD", "tau": ' + b"1" * 1_000_000 + b"}", {400}),
    "an exponent of a million": (b'{"image": "QUJD", "tau": 1e1000000}', {422}),
    "base64 in base64": (json.dumps({"image": base64.b64encode(base64.b64encode(JPEG)).decode()}).encode(), {415}),
    "base64 of spaces": (b'{"image": "' + b" " * 5_000_000 + b'"}', {422}),
    "nested options": (b'{"image": "QUJD", "speed": {"a": [[]]}, "regions": [], "beam": {}}', {422}),
    "a data address of commas": (b'{"image": "data:' + b"," * 1_000_000 + b'"}', {422}),
}


@pytest.mark.parametrize("name", JSONS)
def test_json(server: Server, name: str) -> None:
    body, statuses = JSONS[name]
    begin = time.monotonic()
    answer = exchange(server, post(body, "Content-Type: application/json"))
    assert not fault_of(answer)
    assert answer.status in statuses, answer
    assert time.monotonic() - begin < SECONDS


CUTS: dict[str, bytes] = {
    "the request line": b"POST /v1/cap",
    "the headers": CAPTION[:40],
    "the body": CAPTION[:-100],
    "a form": form(FILE + END)[:-100],
    "a chunk": head("Transfer-Encoding: chunked") + b"1000\r\n" + JPEG[:100],
    "chunks": head("Transfer-Encoding: chunked") + b"64\r\n" + JPEG[:100] + b"\r\n",
}


@pytest.mark.parametrize("name", CUTS)
def test_connections_cut_in(server: Server, name: str) -> None:
    """With a client that waits for an answer to what it cut off, and with many that just go."""
    answer = exchange(server, CUTS[name], patience=PATIENCE)
    assert not fault_of(answer, nothing=True) or answer.status == 499, answer
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(CUTS[name])
    server.assert_it_captions()


def test_slow_bodies_have_the_services_time_and_no_more(server: Server) -> None:
    """A byte now and then keeps no request alive, and meanwhile others are served at once."""
    drops = [head(f"Content-Length: {len(JPEG)}")] + [bytes([byte]) for byte in JPEG[:100]]
    begin = time.monotonic()
    with ThreadPoolExecutor(20) as threads:
        slow = [threads.submit(exchange, server, *drops, pause=0.05) for _ in range(20)]
        server.assert_it_captions()
        assert time.monotonic() - begin < 1.5
        answers = [each.result() for each in slow]
    # Whoever still sends when the answer comes may miss it, as TCP goes: the connection is gone all the same.
    for answer in answers:
        assert answer.status in (0, 408), answer
        assert not fault_of(answer, nothing=True)
    assert any(answer.status == 408 for answer in answers)
    assert time.monotonic() - begin < TIMEOUT_MS / 1000 + 4


def test_requests_in_one_go_are_answered_in_turn(server: Server) -> None:
    """Pipelined: each gets its own answer, the bad ones among them too."""
    wrong = post(b"hello", "X-Request-ID: b")
    sent = post(JPEG, "X-Request-ID: a") + wrong + post(JPEG, "X-Request-ID: c") + wrong.replace(b": b", b": d")
    last = post(JPEG, "X-Request-ID: e", "Connection: close")
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(sent + last)
        while piece := connection.recv(65_536):
            received += piece
    seen = []
    while received:
        answer = parsed(received)
        assert not fault_of(answer)
        seen.append((answer.status, answer.headers["x-request-id"]))
        received = answer.rest
    assert seen == [(200, "a"), (415, "b"), (200, "c"), (415, "d"), (200, "e")]


def test_a_body_that_turns_bad_once_it_is_refused(server: Server) -> None:
    """The server below answers 400 and takes no second answer.

    That is the client's fault: were it counted and logged as a failure of ours, anybody could set off the alarm.
    """
    before = internal_failures(server)
    for path in ("/nowhere", URL):
        bad = head("Transfer-Encoding: chunked", "Content-Encoding: gzip", target=path) + b"xyz\r\n"
        assert exchange(server, bad).status == 400
    assert internal_failures(server) == before


def internal_failures(server: Server) -> list[str]:
    lines = server.client.get("/metrics").text.splitlines()
    return [line for line in lines if "duration_seconds_count" in line and 'outcome="internal"' in line]


def test_a_body_longer_than_it_says_is_not_the_next_request_of_another(server: Server) -> None:
    """What follows the body is a request of its own, or none: it never goes into the answer of the first."""
    answer = exchange(server, head(f"Content-Length: {len(JPEG)}") + JPEG + b"GARBAGE\r\n\r\n")
    assert answer.status == 200
    assert json.loads(answer.body)["caption"]


def test_small_answers_do_not_wait_for_an_acknowledgement(server: Server) -> None:
    """Headers and body are two writes: with Nagle's algorithm on, the second waits 40 ms for a delayed acknowledgement.

    asyncio turns it off only for sockets that were made with the protocol named.
    """
    times = []
    for _ in range(21):
        begin = time.monotonic()
        assert server.client.post(URL, content=b"hello").status_code == 415
        times.append(time.monotonic() - begin)
    assert statistics.median(times) < 0.030, f"median {1000 * statistics.median(times):.0f} ms"


def test_broken_requests(server: Server) -> None:
    fuzz(server, range(QUICK))


@pytest.mark.long
def test_thousands_of_broken_requests(server: Server) -> None:
    fuzz(server, range(QUICK, QUICK + LONG))


def fuzz(server: Server, seeds: Sequence[int]) -> None:
    """Good requests of every form, damaged anywhere, sent twice over: the second time memory must not grow.

    A good part of them must still be captioned and another be refused, else nothing was looked at.
    """

    def attempt(seed: int) -> tuple[int, str]:
        """Status and fault."""
        begin = time.monotonic()
        status, fault = 0, "neither an answer nor an end"
        with contextlib.suppress(TimeoutError):
            answer = exchange(server, broken_request(seed), patience=PATIENCE)
            status, fault = answer.status, fault_of(answer, nothing=True)
        seconds = time.monotonic() - begin
        if seconds > TIMEOUT_MS / 1000 + 1:
            fault += f" took {seconds:.1f} s"
        return status, f"broken_request({seed}): {fault}" if fault else ""

    megabytes = []
    with ThreadPoolExecutor(4) as threads:
        for _ in range(2):
            attempts = list(threads.map(attempt, seeds))
            faults = [fault for _, fault in attempts if fault]
            assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:20])
            told = Counter(status // 100 for status, _ in attempts)
            assert told[2] > LEAST_SHARE * len(seeds), f"too few were captioned: {told}"
            assert told[4] > LEAST_SHARE * len(seeds), f"too few were refused: {told}"
            megabytes.append(server.megabytes())
    assert megabytes[1] - megabytes[0] < TOLERANCE_MB, megabytes


def broken_request(seed: int) -> bytes:
    """A request whose head or body was damaged; the same for the same seed."""
    rng = random.Random(seed)
    encoded = json.dumps({"image": base64.b64encode(LARGER).decode(), "speed": 2.5}).encode()
    chunks = head("Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(LARGER), LARGER)
    file = part("image", LARGER, b"; filename=a")
    good = [post(LARGER), form(part("speed", b"fast") + file + END), post(encoded, "Content-Type: application/json")]
    data = bytearray(rng.choice([*good, chunks]))
    damages: list[Callable[[int], None]] = [
        lambda at: data.__setitem__(at, rng.randrange(256)),
        lambda at: data.__setitem__(at, data[at] ^ 1 << rng.randrange(8)),
        lambda at: data.insert(at, rng.choice(b'\r\n\x00 :;%-\xff"')),
        lambda at: data.__delitem__(slice(at, at + rng.choice((1, 2, 20)))),
        lambda at: data.__setitem__(slice(at, at), data[: rng.choice((10, 100, 1_000))]),
    ]
    where = rng.choice((1, 1, 3, 8))  # the higher, the nearer to the begin: request line, headers, the head of a part
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        rng.choice(damages)(int(len(data) * rng.random() ** where))
    return bytes(data[: rng.randrange(1, len(data))] if rng.random() < 0.2 else data)
