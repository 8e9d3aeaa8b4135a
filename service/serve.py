"""`deecap serve`: the front and the model in one process, under uvicorn."""

from __future__ import annotations

import logging
import signal
import sys
import warnings

import uvicorn

from service.app import create_app
from service.settings import Settings


def serve(settings: Settings) -> None:
    """Prints the address, then serves until SIGTERM or SIGINT, lets the requests under way finish, and ends.

    Raises `SystemExit`: 0 after a signal, 1 where the port is taken or the model cannot be loaded.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Pillow warns of every oddity in a picture, and Python remembers each distinct warning for ever.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    failed = False

    def on_engine_failure() -> None:
        nonlocal failed
        failed = True
        server.should_exit = True

    app = create_app(settings, on_engine_failure=on_engine_failure)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        server_header=False,
        # A request may take this long, so a stop waits this long for the last ones.
        timeout_graceful_shutdown=settings.timeout_ms // 1000 + 1,
    )
    server = uvicorn.Server(config)
    try:
        socket = config.bind_socket()  # first of all, so that a taken port is told before a model is loaded
    except SystemExit as error:  # uvicorn's way to say so, without the port
        place = f"{settings.host}:{settings.port}"
        raise SystemExit(f"cannot listen on {place}: choose another with --port or DEECAP_PORT") from error
    # uvicorn sends itself the signal again once it is done; by default that would look like a crash.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    print(_welcome(settings.host, socket.getsockname()[1]), flush=True)
    server.run(sockets=[socket])
    if failed:
        raise SystemExit(1)


def _welcome(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    address = f"http://{shown}:{port}"
    return (
        f"DeeCap answers at {address} (how to ask: {address}/docs); the model is ready in a few seconds.\n"
        f"  curl -F image=@photo.jpg -F speed=fast {address}/v1/caption"
    )
