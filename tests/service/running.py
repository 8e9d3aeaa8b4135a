"""Apps that run within a test, and waiting for what comes about."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """The app from the begin to the end of its lifespan, and a client that talks to it without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=10) as client,
    ):
        yield client


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Returns once the condition holds; fails where that takes longer."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"did not come about in {seconds} seconds"
        await asyncio.sleep(0.005)


async def until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(1000):
        if (await client.get("/readyz")).status_code == 200:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("not ready in five seconds")


async def scrape(client: httpx.AsyncClient) -> Callable[[str], float]:
    """The metrics now: `value('deecap_x_total{label="a"}')` is that series, and there must be exactly one."""
    lines = (await client.get("/metrics")).text.splitlines()

    def value(series: str) -> float:
        found = [line for line in lines if line.startswith(series + " ")]
        assert len(found) == 1, (series, found)
        return float(found[0].rsplit(" ", 1)[1])

    return value
