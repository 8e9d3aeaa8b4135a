"""A front that streams what the test tells it to, event by event: the page's side of server-sent events."""

from __future__ import annotations

import asyncio
import json
import queue
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from service.routes import home
from tests.service.over_sockets import running

END = None  # the answer ends
CUT = ("cut", {})  # the connection closes in the midst of it


def word(index: int, text: str, layer: int, attempt: int = 1) -> tuple[str, dict[str, Any]]:
    return "word", {"index": index, "text": text, "exit_layer": layer, "entropy": 0.5 * layer, "attempt": attempt}


def caption(*words: tuple[str, int]) -> tuple[str, dict[str, Any]]:
    """The closing event: these words and an end that left at layer 6."""
    steps = len(words) + 1
    return "caption", {
        "caption": " ".join(text for text, _ in words),
        "confidence": 0.5,
        "words": [{"text": text, "exit_layer": layer, "entropy": 0.5 * layer} for text, layer in words],
        "speed": {"requested": "balanced", "tier": "balanced", "tau": 1.0, "promised": 2.0},
        "speedup": 6 * steps / (sum(layer for _, layer in words) + 6),
        "timings_ms": {"queue": 0.1, "decode_image": 1.0, "look": 20.0, "describe": 10.0, "total": 31.1},
        "model": {"name": "stand-in", "revision": "0"},
        "request_id": "r",
        "regions": [],
    }


class StandIn:
    """`say` the events of the captions that are asked for, the first being 0."""

    def __init__(self) -> None:
        self.accepted: list[str] = []  # the Accept header of each caption asked for
        self.left: set[int] = set()  # captions whose client hung up before they were done
        self.status = 200  # what /readyz answers
        self.looks = 0  # how often it was asked
        self.highest = 3  # SpeedUp; there is a named speed for each whole number up to it
        self._said: defaultdict[int, queue.Queue[tuple[str, dict[str, Any]] | None]] = defaultdict(queue.Queue)
        self.app = FastAPI(docs_url=None)
        self.app.include_router(home.router)
        self.app.get("/readyz")(self._readyz)
        self.app.get("/v1/model")(lambda: {"name": "stand-in", "layers": 6, "device": "cpu"})
        self.app.get("/v1/speeds")(self._speeds)
        self.app.post("/v1/caption")(self._caption)

    def say(self, *events: tuple[str, dict[str, Any]] | None, to: int = 0) -> None:
        for event in events:
            self._said[to].put(event)

    async def _readyz(self) -> JSONResponse:
        self.looks += 1
        if self.status == 200:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"title": "Not now", "detail": "It says so.", "status": self.status}, self.status)

    def _speeds(self) -> dict[str, Any]:
        names = ["full", "balanced", "fast", "turbo"][: self.highest]
        tiers = [{"name": name, "target": i, "promised": i} for i, name in enumerate(names, start=1)]
        return {"default": "balanced", "tiers": tiers, "range": {"lowest": 1.0, "highest": float(self.highest)}}

    async def _caption(self, request: Request) -> StreamingResponse:
        await request.body()
        number = len(self.accepted)
        said = self._said[number]
        self.accepted.append(request.headers["accept"])

        async def lines() -> AsyncIterator[str]:
            yield ": keep-alive\n\n"
            while True:
                while said.empty():
                    if await request.is_disconnected():
                        self.left.add(number)
                        return
                    await asyncio.sleep(0.01)
                event = said.get()
                if event is END:
                    return
                if event == CUT:
                    raise ConnectionAbortedError("as the test wants it")
                name, data = event
                # In two pieces, as a network may cut it.
                yield f"event: {name}\nda"
                await asyncio.sleep(0.01)
                yield f"ta: {json.dumps(data)}\n\n"
                if name in ("caption", "problem"):
                    return

        async def noted() -> AsyncIterator[str]:
            try:
                async for line in lines():
                    yield line
            except asyncio.CancelledError:  # the framework may see it first
                self.left.add(number)
                raise

        return StreamingResponse(noted(), media_type="text/event-stream")

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serves it on a free port; gives its address."""
        with running(uvicorn.Config(self.app, port=0, log_level="warning", timeout_graceful_shutdown=1)) as address:
            yield address
