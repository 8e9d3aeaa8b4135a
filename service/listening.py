"""The socket that a process of the service listens on."""

from __future__ import annotations

import socket

import uvicorn


def listen(config: uvicorn.Config, setting: str) -> socket.socket:
    """To be called first of all, so that a taken port is told before a model is loaded.

    It listens at once: who reads its address in the log may use it, and waits a moment at most. Raises `SystemExit`
    where it cannot, naming the port's `setting`.
    """
    try:
        listening = config.bind_socket()
    except SystemExit as error:  # uvicorn's way to say so, without the port
        raise SystemExit(f"cannot listen on {config.host}:{config.port}: choose another with {setting}") from error
    # Small answers go out without waiting for more (Nagle's algorithm, 40 ms). asyncio sees to that where it knows the
    # protocol, and uvicorn's sockets do not name theirs.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listening.listen(config.backlog)
    return listening
