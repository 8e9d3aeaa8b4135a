"""One client's connection: uvicorn's, with bounds on what a client may send and on the time that it takes.

Beyond what uvicorn does:

- A request's head has bounds in bytes and lines (431, RFC 6585) and in time. So have the lines between and after the
  chunks of a body; fields there are passed over, since they come after the answer was decided.
- What is no HTTP is refused as a problem of RFC 9457, and after the answers to the requests before it.
- An answer that goes out before its request is all there says `Connection: close`, and the client has a moment to read
  it: closing at once would make its system throw it away (RFC 9112, 9.6).
- `Upgrade` is passed over (RFC 9110, 7.8): Java's client asks for HTTP/2 with each request, and its body must be read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import httptools
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.errors import KINDS, PROBLEM_JSON, problem_document

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 32_768  # as nginx and Apache allow in sum; tracing and cookies together need a quarter of it
MAX_HEADERS = 100
HEAD_SECONDS = 10.0  # from a head's first byte to its last: it fits into one packet or a few
LINGER_SECONDS = 5.0  # that a client that still sends has to read its answer


class _HeadTooLargeError(Exception):
    """Within the parser, which tells it as one of its own."""


class Connection(HttpToolsProtocol):
    """To be given to `uvicorn.Config(http=...)`."""

    def __init__(self, *args: Any, on_refusal: Callable[[str], None] = lambda code: None, **more: Any) -> None:
        """`on_refusal` is called with the code of each problem that is told here, since no request comes of it."""
        super().__init__(*args, **more)
        self._on_refusal = on_refusal
        self._answering: RequestResponseCycle | None = None  # whose turn it is, or was last; `cycle` is the newest
        self._in_head = False
        self._head_bytes = 0  # of the fields of this head that are complete
        self._silent_bytes = 0  # in whole pieces since anything came of them: a head, a body's part, an end
        self._too_large = False
        self._last: bytes | None = None  # to be said when all requests before it are answered
        self._leaving = False  # everything has been said, and what still comes is for nobody
        self._timer: asyncio.TimerHandle | None = None  # of the head, then of the farewell

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._leaving or self._last is not None:
            return
        self._silent_bytes += len(data)
        try:
            while data:
                data = self._feed(data)
        except httptools.HttpParserError:
            if self._too_large:
                detail = f"The head of a request may have {MAX_HEAD_BYTES:,} bytes and {MAX_HEADERS} fields."
                self._refuse("head_too_large", detail)
            else:
                self._refuse("bad_request", "What was sent is no HTTP that can be read.")
        else:
            if self._silent_bytes > MAX_HEAD_BYTES:
                self._refuse("head_too_large", f"More than {MAX_HEAD_BYTES:,} bytes came without an end of a line.")

    # What the parser tells ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        self._in_head = True
        self._head_bytes = 0
        self._start_timer(HEAD_SECONDS, self._head_is_late)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return
        self._count(len(name) + len(value))
        if len(self.headers) == MAX_HEADERS:
            self._too_large = True
            raise _HeadTooLargeError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._silent_bytes = 0
        self._stop_timer()
        if self.parser.should_upgrade():
            return  # `_feed` begins again without it
        super().on_headers_complete()
        self.cycle.transport = cast(asyncio.Transport, _Parting(self, self.cycle))

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._silent_bytes = 0
        if self.parser.should_upgrade():
            return
        super().on_message_complete()

    # What uvicorn tells ---------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        if self._leaving:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        if self._last is not None and not self._busy and not self.transport.is_closing():
            self._say_last(self._last)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        async def run(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
            async def say(message: ASGISendEvent) -> None:
                if cycle.more_body:
                    cycle.keep_alive = False
                await send(message)

            await app(scope, receive, say)

        self._answering = cycle
        super()._start_asgi_task(cycle, run)

    # What follows from it -------------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> bytes:
        """Parses it, up to the end or to the end of a head that asks for an upgrade; the rest. Raises
        `httptools.HttpParserError`."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            wanted = [(name, value) for name, value in self.headers if name != b"upgrade"]
            if len(wanted) == len(self.headers):
                raise httptools.HttpParserError("CONNECT") from upgrade  # it asks for a tunnel and gets none
            start = f"{self.parser.get_method().decode()} {self.url.decode('latin-1')} HTTP/1.1"
            lines = [start.encode("latin-1"), *(name + b": " + value for name, value in wanted)]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
            self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n")
            return data[upgrade.args[0] :]
        return b""

    def _count(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > MAX_HEAD_BYTES:
            self._too_large = True
            raise _HeadTooLargeError

    @property
    def _busy(self) -> bool:
        """Whether a request waits for its answer."""
        return self._answering is not None and not self._answering.response_complete

    def _head_is_late(self) -> None:
        if self._busy:
            self._start_timer(HEAD_SECONDS, self._head_is_late)
        else:
            self.transport.close()

    def _refuse(self, code: str, detail: str) -> None:
        """Ends the connection with this problem, once what was asked before is answered."""
        log.info("%s:%s is refused: %s", *(self.client or ("", "")), code)
        self._on_refusal(code)
        answer = _answer(code, detail)
        cycle = self.cycle
        if not self._busy:
            self._say_last(answer)
        elif self._in_head or not cycle.more_body:  # what follows the last request
            self._last = answer
        elif cycle is not self._answering:  # that one, and its turn has not come
            self.pipeline.popleft()
            self._last = answer
        else:
            if not cycle.response_started:
                self.transport.write(answer)
            cycle.disconnected = True
            cycle.message_event.set()
            self._leave()

    def _say_last(self, answer: bytes) -> None:
        self.transport.write(answer)
        self._leave()

    def _leave(self) -> None:
        """Closes the connection as soon as the client has read what was said, or after a moment."""
        if self._leaving or self.transport.is_closing():
            return
        self._leaving = True
        self.flow.resume_reading()
        self._unset_keepalive_if_required()
        self.transport.write_eof()
        self._start_timer(LINGER_SECONDS, self.transport.close)

    def _start_timer(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Parting:
    """The transport of one request, whose close is a farewell where the request is not all there."""

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        if self._cycle.more_body and self._cycle.response_complete:
            self._connection._leave()
        else:
            self._connection.transport.close()


def _answer(code: str, detail: str) -> bytes:
    """A whole response."""
    request_id = uuid.uuid4().hex
    status = HTTPStatus(KINDS[code].status)
    body = json.dumps(problem_document(code, detail, request_id)).encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {PROBLEM_JSON}\r\ncontent-length: {len(body)}\r\n"
        f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
