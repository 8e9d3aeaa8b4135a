"""Around every request: its id, its place in the metrics, and the last resort against exceptions."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem_response
from service.metrics import Metrics

log = logging.getLogger(__name__)

# What ids are made of in practice, and nothing that could break a log line or a header.
_SAFE_ID = re.compile(r"[A-Za-z0-9._:~+/=@-]{1,128}")


class Envelope:
    """Pure ASGI, outermost: sets `request_id` and `arrived` (time.monotonic(), seconds) in the request's state."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = time.monotonic()
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if _SAFE_ID.fullmatch(sent_id) else uuid.uuid4().hex
        # A dict of its own: the server shares one between all requests.
        state = scope["state"] = {**scope.get("state", {}), "request_id": request_id, "arrived": arrived}
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, send_with_id)
            except asyncio.CancelledError:  # the server stops and waits no longer
                state["outcome"] = "cancelled"
                raise
            except Exception:
                log.exception("request %s failed", request_id)
                state["outcome"] = "internal"
                if not begun:  # else the client sees a cut answer, which is the truth
                    detail = "Something went wrong here; the request id finds it in the log."
                    await problem_response(Request(scope), "internal", detail)(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "unmatched")
                seconds = time.monotonic() - arrived
                self._metrics.request_done(route, state.get("speed", "none"), state.get("outcome", "ok"), seconds)
