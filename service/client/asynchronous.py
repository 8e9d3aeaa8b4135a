"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sized
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from service.client.answers import CaptionAnswer, Model, Speeds
from service.client.errors import ClientError
from service.client.images import Image, image_bytes
from service.client.many import AHEAD, Item
from service.client.retrying import TIMEOUT, Call, Options, Remaining, Tries, caption_call, read, settings
from service.progress import bar

T = TypeVar("T")


class AsyncClient:
    """Asks one service, from one event loop. `aclose` it, or use it in an `async with`."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        tries: int | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """As those of `Client`."""
        self._http = httpx.AsyncClient(transport=transport, **settings(url, api_key))
        self._timeout, self._tries = timeout, tries

    async def caption(self, image: Image, **options: Unpack[Options]) -> CaptionAnswer:
        """The photo's caption. Cancelling this hangs up, and the service stops working on it. Raises as `Client` does.

        A file is read in a thread, a Pillow image encoded in one.
        """
        data = image if isinstance(image, bytes) else await asyncio.to_thread(image_bytes, image)
        call, timeout = caption_call(data, options)
        return await self._send(call, CaptionAnswer.read, timeout)

    def caption_many(
        self, images: Iterable[Image], *, concurrency: int = 8, progress: bool = False, **options: Unpack[Options]
    ) -> AsyncIterator[Item]:
        """As that of `Client`. Closing the iterator (`aclose`) hangs up on all that is under way."""
        if concurrency < 1:
            raise ValueError("concurrency must be 1 or more")
        return self._many(images, concurrency, progress, options)

    async def speeds(self) -> Speeds:
        """The speeds to choose from. Raises `ClientError`."""
        return await self._send(Call("GET", "/v1/speeds"), Speeds.read)

    async def model(self) -> Model:
        """The model served. Raises `ClientError`."""
        return await self._send(Call("GET", "/v1/model"), Model.read)

    async def ready(self) -> bool:
        """Whether the service captions now. One try; False too where it cannot be reached."""
        try:
            return (await self._http.get("/readyz", timeout=min(5.0, self._timeout))).status_code == 200
        except httpx.TransportError:
            return False

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _many(
        self, images: Iterable[Image], concurrency: int, progress: bool, options: Options
    ) -> AsyncIterator[Item]:
        places = asyncio.Semaphore(concurrency)

        async def one(index: int, image: Image) -> Item:
            async with places:
                try:
                    return Item(index, image, await self.caption(image, **options))
                except (ClientError, OSError, TypeError) as error:
                    return Item(index, image, error=error)

        waiting: deque[asyncio.Task[Item]] = deque()
        total = len(images) if isinstance(images, Sized) else None
        with bar(progress, total) as shown:
            try:
                for index, image in enumerate(images):
                    waiting.append(asyncio.create_task(one(index, image)))
                    if len(waiting) == AHEAD * concurrency:
                        yield await waiting[0]
                        waiting.popleft()
                        shown.update()
                while waiting:
                    yield await waiting[0]
                    waiting.popleft()
                    shown.update()
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    async def _send(self, call: Call, kind: Callable[[Any], T], timeout: float | None = None) -> T:
        tries = Tries(self._timeout if timeout is None else timeout, self._tries)
        while True:
            try:
                async with asyncio.timeout(tries.seconds):
                    response = await self._http.request(
                        call.method,
                        call.path,
                        content=call.content,
                        params=call.params,
                        headers=call.headers,
                        extensions={"timeout": Remaining(tries)},
                    )
                return read(response, kind)
            except (ClientError, httpx.TransportError, httpx.DecodingError, TimeoutError) as error:
                await asyncio.sleep(tries.pause_after(error))
