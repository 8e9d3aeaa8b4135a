"""An app under the real server in a thread, and connections to it byte by byte."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import uvicorn
from fastapi import FastAPI

from service.connection import Connection
from service.routes.context import Context


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Its address, on a free port."""
    protocol = partial(Connection, on_refusal=Context.of(app).metrics.refused)
    config = uvicorn.Config(app, port=0, log_level="warning", ws="none", http=cast("type[asyncio.Protocol]", protocol))
    with running(config) as address:
        yield address


@contextmanager
def running(config: uvicorn.Config) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


class Client:
    """One connection. `heard` is all that came of it."""

    def __init__(self, address: str, seconds: float = 5.0) -> None:
        self.heard = b""
        self._socket = socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=seconds)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, *pieces: bytes, pause: float = 0.0) -> None:
        for piece in pieces:
            self._socket.sendall(piece)
            time.sleep(pause)

    def until(self, ending: bytes) -> bytes:
        """What came up to and with `ending`; it must come."""
        while ending not in self.heard:
            piece = self._socket.recv(65_536)
            assert piece, f"the connection ended after {self.heard!r}"
            self.heard += piece
        found, self.heard = self.heard.split(ending, 1)
        return found + ending

    def end(self) -> bytes:
        """What came until the server ended its side."""
        while piece := self._socket.recv(65_536):
            self.heard += piece
        return self.heard
