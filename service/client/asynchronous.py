"""The client for asyncio."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sized
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from service.client.answers import CaptionAnswer, Job, Model, Speeds, StreamedWord
from service.client.batches import Batch
from service.client.errors import ClientError
from service.client.images import Image, image_bytes
from service.client.many import AHEAD, Item
from service.client.retrying import (
    TIMEOUT,
    Call,
    Looks,
    Options,
    Tries,
    caption_call,
    job_call,
    problem,
    read_cancelled,
    read_job,
    reading,
    sending,
    settings,
)
from service.client.streaming import EVENT_STREAM, StreamReader
from service.progress import bar

T = TypeVar("T")

_FAILURES = (ClientError, httpx.TransportError, httpx.DecodingError, TimeoutError)


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
        call, timeout = caption_call(await _bytes(image), options)
        return await self._send(call, reading(CaptionAnswer.read), timeout)

    def caption_many(
        self, images: Iterable[Image], *, concurrency: int = 8, progress: bool = False, **options: Unpack[Options]
    ) -> AsyncIterator[Item]:
        """As that of `Client`. Closing the iterator (`aclose`) hangs up on all that is under way."""
        if concurrency < 1:
            raise ValueError("concurrency must be 1 or more")
        return self._many(images, concurrency, progress, options)

    async def captions(self, images: Iterable[Image], **options: Unpack[Options]) -> list[Item]:
        """As that of `Client`."""
        batch = await asyncio.to_thread(Batch, images, options)
        timeout = options.get("timeout")
        tries = Tries(self._timeout if timeout is None else timeout, self._tries)
        while not batch.done:
            call, _ = batch.call()
            again: Exception | None
            try:
                again = await self._once(call, reading(batch.read), tries)
            except _FAILURES as error:
                again = error
            if again is not None:
                try:
                    await asyncio.sleep(tries.pause_after(again))
                except ClientError as error:
                    batch.give_up(error)
        return batch.items

    async def stream(self, image: Image, **options: Unpack[Options]) -> AsyncGenerator[StreamedWord | CaptionAnswer]:
        """As that of `Client`. Close the iterator (`aclose`) to leave it early."""
        call, timeout = caption_call(await _bytes(image), options, Accept=EVENT_STREAM)
        tries = Tries(self._timeout if timeout is None else timeout, self._tries)
        reader = StreamReader(tries)
        while True:
            try:
                async with self._http.stream(call.method, call.path, **sending(call, tries)) as response:
                    if not response.is_success:
                        await response.aread()
                        raise problem(response)
                    reader.begin(response)
                    async for line in response.aiter_lines():
                        said = reader.line(line)
                        if said is not None:
                            yield said
                        if isinstance(said, CaptionAnswer):
                            return
                    reader.end()
            except _FAILURES as error:
                await asyncio.sleep(tries.pause_after(error))

    async def submit(self, image: Image, *, idempotency_key: str | None = None, **options: Unpack[Options]) -> Job:
        """As that of `Client`."""
        key = idempotency_key or uuid.uuid4().hex
        call, timeout = caption_call(await _bytes(image), options, Prefer="respond-async", Idempotency_Key=key)
        return await self._send(call, read_job, timeout)

    async def job(self, id: str) -> Job:
        """As that of `Client`."""
        return await self._send(job_call("GET", id), read_job)

    async def wait(self, id: str, timeout: float | None = None) -> CaptionAnswer:
        """As that of `Client`. Cancelling this leaves the job as it is."""
        call, looks = job_call("GET", id), Looks(timeout)
        while True:
            job = await self._send(call, read_job, looks.seconds)
            if job.error is not None:
                raise job.error
            if job.answer is not None:
                return job.answer
            await asyncio.sleep(looks.pause_after(job))

    async def cancel(self, id: str) -> bool:
        """As that of `Client`."""
        return await self._send(job_call("DELETE", id), read_cancelled)

    async def speeds(self) -> Speeds:
        """The speeds to choose from. Raises `ClientError`."""
        return await self._send(Call("GET", "/v1/speeds"), reading(Speeds.read))

    async def model(self) -> Model:
        """The model served. Raises `ClientError`."""
        return await self._send(Call("GET", "/v1/model"), reading(Model.read))

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

    async def _send(self, call: Call, read: Callable[[httpx.Response], T], timeout: float | None = None) -> T:
        tries = Tries(self._timeout if timeout is None else timeout, self._tries)
        while True:
            try:
                return await self._once(call, read, tries)
            except _FAILURES as error:
                await asyncio.sleep(tries.pause_after(error))

    async def _once(self, call: Call, read: Callable[[httpx.Response], T], tries: Tries) -> T:
        async with asyncio.timeout(tries.seconds):
            response = await self._http.request(call.method, call.path, **sending(call, tries))
        return read(response)


async def _bytes(image: Image) -> bytes:
    return image if isinstance(image, bytes) else await asyncio.to_thread(image_bytes, image)
