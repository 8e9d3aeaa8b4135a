"""`deecap serve`: the front under uvicorn, and, over the memory broker, the model in the same process."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import sys
import time
import warnings
from functools import partial
from types import FrameType
from typing import cast

import uvicorn

from service import logs
from service.app import create_app
from service.connection import Connection
from service.front import Front
from service.listening import listen
from service.routes.context import Context
from service.settings import MEMORY, Settings, without_password
from service.settled import settled

log = logging.getLogger(__name__)

# Longer than proxies keep idle connections (60 s is usual): else a request may meet one that is just being closed.
KEEP_ALIVE_SECONDS = 75


def serve(settings: Settings) -> None:
    """Prints the address, then serves until SIGTERM or SIGINT.

    Then no more captions are taken, those under way are answered, and the process ends; a second signal ends it at
    once. Where the model hangs, it ends with `service.worker.HANG_STATUS`. Raises `SystemExit` with 1 where the port is
    taken or the model cannot be loaded, and what `create_app` raises.
    """
    failed = False

    def on_failure() -> None:
        nonlocal failed
        failed = True
        server.should_exit = True

    app = create_app(settings, on_failure=on_failure, on_loaded=settled)
    logs.set_up(settings)
    # Pillow warns of every oddity in a picture, and Python remembers each distinct warning for ever.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    context = Context.of(app)
    config = uvicorn.Config(
        app,
        # Each connection gets one of these; uvicorn's types know classes alone.
        http=cast("type[asyncio.Protocol]", partial(Connection, on_refusal=context.metrics.refused)),
        host=settings.host,
        port=settings.port,
        server_header=False,
        log_config=None,
        access_log=False,
        ws="none",
        proxy_headers=False,  # nobody here asks for the client's address
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    server = DrainingServer(config, context.front, settings.drain_timeout_s)
    listening = listen(config, "--port or DEECAP_PORT")
    for number in (signal.SIGTERM, signal.SIGINT):  # until the server takes them over, there is nothing to finish
        signal.signal(number, lambda *_: sys.exit(0))
    log.info("settings", extra=logs.fields(**settings.redacted()))
    print(_welcome(settings, listening.getsockname()[1]), flush=True)
    settled()
    server.run(sockets=[listening])
    if failed:
        raise SystemExit(1)


class DrainingServer(uvicorn.Server):
    """uvicorn that goes on listening after a signal until the captions under way are answered.

    So probes can see that it is not ready, and new captions are refused with 503 rather than with a closed port.
    """

    def __init__(self, config: uvicorn.Config, front: Front, seconds: float) -> None:
        """`seconds` that captions under way may take after a signal, and with them the last answers."""
        super().__init__(config)
        self._front = front
        self._seconds = seconds
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called between any two steps of the main thread. uvicorn's own would send itself the signal again at the
        end, which would make a clean end look like a crash."""
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._draining is not None:  # somebody is in a hurry
            self.should_exit = self.force_exit = True
            return
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        end = time.monotonic() + self._seconds
        log.info("stopping: %d captions are under way", self._front.under_way)
        await self._front.drain(self._seconds)
        self.config.timeout_graceful_shutdown = max(1, math.ceil(end - time.monotonic()))
        self.should_exit = True


def _welcome(settings: Settings, port: int) -> str:
    host = settings.host
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    address = f"http://{shown}:{port}"
    alone = "the model is ready in a few seconds"
    front = f"captions come from the workers of the queue {settings.queue} at {without_password(settings.broker)}"
    return (
        f"DeeCap answers at {address} (how to ask: {address}/docs); {alone if settings.broker == MEMORY else front}.\n"
        f"  curl -F image=@photo.jpg -F speed=fast {address}/v1/caption"
    )
