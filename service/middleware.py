"""Around every request: its ids, its place in metrics and log, its key, and the last resort against exceptions."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import KINDS, WENT_WRONG, printable, problem_response
from service.keys import ApiKeys, Quota
from service.logs import ACCESS, RequestIds, current, fields
from service.metrics import Metrics
from service.trace import trace_id
from service.tracing import RequestSpan, Tracing

log = logging.getLogger(__name__)
access = logging.getLogger(ACCESS)

# What ids are made of in practice, and nothing that could break a log line or a header.
_SAFE_ID = re.compile(r"[A-Za-z0-9._:~+/=@-]{1,128}")
# Their good answers would bury the rest of the log.
PROBES = frozenset({"/livez", "/readyz", "/startupz", "/metrics", "/v2/health/live", "/v2/health/ready"})
PAGES = frozenset({"/", "/docs", "/openapi.json"})  # how to ask; what is in `/web/` and `/problems/` is open too


class CannotSendError(Exception):
    """The server cannot send the answer: the connection is gone, or what came over it broke the protocol."""


class Envelope:
    """Pure ASGI, outermost: sets `request_id`, `traceparent` ("" for none that is valid; with tracing, that of its own
    span) and `arrived` (time.monotonic(), seconds) in the request's state; counts the request and logs its one line.

    At the end the request's `upload` counts no more, and what it was `charged` is given back where the service
    could not serve it (503).
    HEAD is answered as GET; the server below leaves the body out.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, quota: Quota, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._quota = quota
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = time.monotonic()
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if _SAFE_ID.fullmatch(sent_id) else uuid.uuid4().hex
        parents = headers.getlist("traceparent")
        traced = trace_id(parents[0]) if len(parents) == 1 else ""
        traceparent = parents[0] if traced else ""
        span = None
        if self._tracing is not None and scope["path"] not in PROBES:
            span = self._tracing.request(scope["method"], traceparent, headers.get("tracestate", ""))
            traced, traceparent = span.trace_id, span.traceparent
        # A dict of its own: the server shares one between all requests.
        state = {**scope.get("state", {}), "request_id": request_id, "traceparent": traceparent, "arrived": arrived}
        asked = scope["method"]
        # A copy of the scope, too: the server looks into its own for HEAD.
        scope = {**scope, "state": state, "method": "GET" if asked == "HEAD" else asked}
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            try:
                await send(message)
            except Exception as error:
                raise CannotSendError from error

        ids = current.set(RequestIds(request_id, traced))
        try:
            with self._metrics.in_flight.track_inprogress():
                await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server stops and waits no longer
            state["outcome"] = "cancelled"
            raise
        except CannotSendError as error:
            log.info("the answer cannot be sent: %r", error.__cause__)
            state["outcome"] = "client_gone"
        except Exception:
            log.exception("request %s failed", request_id)
            state["outcome"] = "internal"
            if status == 0:  # else the client sees a cut answer, which is the truth
                await problem_response(Request(scope), "internal", WENT_WRONG)(scope, receive, send_with_id)
        finally:
            self._done(scope, asked, status, time.monotonic() - arrived, span)
            current.reset(ids)

    def _done(self, scope: Scope, method: str, status: int, seconds: float, span: RequestSpan | None) -> None:
        state = scope["state"]
        if (upload := state.get("upload")) is not None:
            upload.close()
        route = getattr(scope.get("route"), "path", "unmatched")
        outcome = state.get("outcome", "ok")
        # Not by the status alone: a stream has told 200 by then.
        if "charged" in state and outcome in KINDS and KINDS[outcome].status == 503:
            self._quota.give_back(state["key"], state["charged"])
        speed = state.get("speed", "none")
        self._metrics.request_done(method, route, speed, outcome, seconds, state["request_id"])
        if span is not None:
            span.end(route, status, outcome, speed, state["request_id"])
        said = fields(
            method=printable(method, 16),
            route=route,
            status=status,
            outcome=outcome,
            ms=round(seconds * 1000, 1),
            **({"speed": speed} if "speed" in state else {}),
            **({"key": state["key"]} if "key" in state else {}),
        )
        access.log(logging.DEBUG if route in PROBES and status == 200 else logging.INFO, "request", extra=said)


class KeyGuard:
    """Pure ASGI, within the envelope: lets in who has a key, and puts its name as `key` into the request's state.

    What needs no key is named here; all else does, so that a new address is never open by oversight.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_probes: bool) -> None:
        self._app = app
        self._keys = keys
        self._open = PAGES | PROBES if open_probes else PAGES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys:
            await self._app(scope, receive, send)
            return
        presented = _presented_key(Headers(scope=scope))
        name = None if presented is None else self._keys.find(presented)
        if name is not None:
            scope["state"]["key"] = name
        elif not (scope["path"] in self._open or scope["path"].startswith(("/problems/", "/web/"))):
            what = "There is none in this request" if presented is None else "The one in this request is not known"
            challenge = 'Bearer realm="deecap"' + ("" if presented is None else ', error="invalid_token"')
            detail = f"{what}: send Authorization: Bearer <key>, or X-API-Key: <key>."
            headers = {"WWW-Authenticate": challenge}
            response = problem_response(Request(scope), "unauthorized", detail, headers=headers)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _presented_key(headers: Headers) -> str | None:
    """The key of `Authorization: Bearer` (RFC 6750, 2.1), else of `X-API-Key`; None for neither."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return headers.get("x-api-key")
