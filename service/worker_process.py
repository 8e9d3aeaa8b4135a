"""`deecap worker`: a worker in a process of its own, with its probes and metrics on a port of its own."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import warnings
from types import FrameType

import uvicorn
from prometheus_client import CollectorRegistry, ProcessCollector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service import logs, tracing
from service.broker.base import BrokerError
from service.connection import Connection
from service.errors import PROBLEM_JSON, problem_document
from service.exposition import expose
from service.listening import listen
from service.loop import new_loop
from service.settings import Settings, SettingsError, without_password
from service.settled import settled
from service.wiring import make_worker, redis_broker
from service.worker import Worker

log = logging.getLogger(__name__)


def run_worker(settings: Settings) -> None:
    """Works for the settings' Redis until SIGTERM or SIGINT, then drains and returns. A second signal ends it at once.

    Raises `SystemExit` with 1 where the port is taken or the model cannot be loaded. Where the model hangs, the process
    ends with `service.worker.HANG_STATUS`.
    """
    logs.set_up(settings)
    # Pillow warns of every oddity in a picture, and Python remembers each distinct warning for ever.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    log.info("settings", extra=logs.fields(**settings.redacted()))
    with asyncio.Runner(loop_factory=new_loop()) as runner:
        runner.run(_run(settings))


async def _run(settings: Settings) -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    try:
        traced = tracing.start(settings, "deecap-worker")
        worker = make_worker(settings, redis_broker(settings), registry, tracing=traced)
    except BrokerError as error:
        sys.exit(f"the broker cannot be used: {error}")
    except SettingsError as error:
        sys.exit(str(error))
    config = uvicorn.Config(
        health_app(worker, registry),
        http=Connection,
        host=settings.host,
        port=settings.metrics_port,
        lifespan="off",
        server_header=False,
        log_config=None,
        access_log=False,
        ws="none",
        proxy_headers=False,
    )
    server = _Server(config)
    listening = listen(config, "DEECAP_METRICS_PORT")
    serving = asyncio.create_task(server.serve([listening]))
    try:
        if await _start(worker, server):
            settled()
            print(_welcome(settings, worker, listening), flush=True)
            await server.signalled.wait()
            log.info("stopping")
        await worker.stop()  # while the port still answers
        if traced is not None:
            await traced.close()
    finally:
        server.should_exit = True
        await serving


async def _start(worker: Worker, server: _Server) -> bool:
    """False where a signal came before the model was loaded. Raises `SystemExit`."""
    starting = asyncio.create_task(worker.start())
    signalled = asyncio.create_task(server.signalled.wait())
    await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if not starting.done():
        starting.cancel()
        return False
    error = starting.exception()
    if error is not None:
        log.critical("the model cannot be loaded: %s", error, exc_info=error)
        raise SystemExit(1)
    return True


def health_app(worker: Worker, registry: CollectorRegistry) -> Starlette:
    """`/livez`: the model thread lives. `/startupz`: the model was loaded. `/readyz`: captions go through."""

    async def livez(_: Request) -> Response:
        return _status(worker.alive, "The model thread died.")

    async def startupz(_: Request) -> Response:
        return _status(worker.info is not None, "The model is being loaded.")

    async def readyz(_: Request) -> Response:
        return _status(worker.ready, "No captions go through: the model or the broker is not there, or it is stopping.")

    async def metrics(request: Request) -> Response:
        return expose(registry, request.headers.get("accept", ""))

    handlers = {"/livez": livez, "/startupz": startupz, "/readyz": readyz, "/metrics": metrics}
    return Starlette(routes=[Route(path, handler) for path, handler in handlers.items()])


def _status(good: bool, otherwise: str) -> Response:
    if good:
        return JSONResponse({"status": "ok"})
    document = problem_document("not_ready", otherwise, request_id="")
    return JSONResponse(document, document["status"], headers={"Retry-After": "2"}, media_type=PROBLEM_JSON)


class _Server(uvicorn.Server):
    """uvicorn that goes on answering after a signal, until the worker has drained."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.signalled = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called between any two steps of the main thread. uvicorn's own would send itself the signal again at the
        end, which would make a clean end look like a crash."""
        if self.signalled.is_set():  # somebody is in a hurry
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._loop.call_soon_threadsafe(self.signalled.set)


def _welcome(settings: Settings, worker: Worker, listening: socket.socket) -> str:
    queue = f"{settings.queue} at {without_password(settings.broker)}"
    port = listening.getsockname()[1]
    return f"DeeCap worker {worker.id} works for the queue {queue}; probes and metrics at port {port}"
