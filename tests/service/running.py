"""Apps that run within a test, waiting for what comes about, and reading what a stream says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

Event = tuple[str, Any]  # its name and its data; ("", comment) for a comment


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """The app from the begin to the end of its lifespan, and a client that talks to it without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=10) as client,
    ):
        yield client


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """As `running`, over a real socket: what is sent is there before the answer is whole."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield client
    finally:
        server.should_exit = True
        await serving


async def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Returns once the condition holds; fails where that takes longer."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"did not come about in {seconds} seconds"
        await asyncio.sleep(0.005)


async def until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(3000):
        if (await client.get("/readyz")).status_code == 200:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("not ready in fifteen seconds")


async def scrape(client: httpx.AsyncClient) -> Callable[[str], float]:
    """The metrics now: `value('deecap_x_total{label="a"}')` is that series, and there must be exactly one."""
    lines = (await client.get("/metrics")).text.splitlines()

    def value(series: str) -> float:
        found = [line for line in lines if line.startswith(series + " ")]
        assert len(found) == 1, (series, found)
        return float(found[0].rsplit(" ", 1)[1])

    return value


async def events(response: httpx.Response) -> AsyncIterator[Event]:
    """What a `text/event-stream` says, as it comes. The field `retry` comes as an event of that name before its own."""
    name = ""
    async for line in response.aiter_lines():
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line.startswith(":"):
            yield "", value
        elif field == "event":
            name = value
        elif field == "retry":
            yield "retry", int(value)
        elif field == "data":
            yield name, json.loads(value)
        else:
            assert line == "", f"no line of such a stream: {line!r}"
