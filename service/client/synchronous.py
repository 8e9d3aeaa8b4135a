"""The client that blocks, for threads and scripts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from service.client.answers import CaptionAnswer, Model, Speeds
from service.client.errors import ClientError, UnreachableError
from service.client.images import Image, image_bytes
from service.client.many import AHEAD, Item
from service.client.retrying import TIMEOUT, Call, Options, Remaining, Tries, caption_call, read, settings
from service.progress import bar

T = TypeVar("T")


class Client:
    """Asks one service. May be shared by threads; `close` it, or use it in a `with`."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        tries: int | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`url`: by default of DEECAP_CLIENT_URL, else http://127.0.0.1:8000. `api_key`: by default of
        DEECAP_CLIENT_KEY; "" for none. `timeout`: seconds that one call may take with all its tries; `tries`: how many
        those may be, by default as many as fit. `transport`: httpx's, for proxies and tests.
        """
        self._http = httpx.Client(transport=transport, **settings(url, api_key))
        self._timeout, self._tries = timeout, tries

    def caption(self, image: Image, **options: Unpack[Options]) -> CaptionAnswer:
        """The photo's caption: `client.caption("photo.jpg", speed="fast")`.

        Raises `ClientError`; `OSError` and `TypeError` for a photo that cannot be read.
        """
        return self._caption(image, options, threading.Event())

    def caption_many(
        self, images: Iterable[Image], *, concurrency: int = 8, progress: bool = False, **options: Unpack[Options]
    ) -> Iterator[Item]:
        """What became of each photo, in their order, as soon as it is known; one that fails does not stop the others.

        `images` is read as it goes, a little ahead, so it may be endless. `concurrency` photos are asked for at once.
        `progress` shows a bar where tqdm is installed. The options are those of `caption`. Leaving the loop over it
        ends it: what is under way is waited for, and not tried again.
        """
        if concurrency < 1:
            raise ValueError("concurrency must be 1 or more")
        return self._many(images, concurrency, progress, options)

    def speeds(self) -> Speeds:
        """The speeds to choose from. Raises `ClientError`."""
        return self._send(Call("GET", "/v1/speeds"), Speeds.read)

    def model(self) -> Model:
        """The model served. Raises `ClientError`."""
        return self._send(Call("GET", "/v1/model"), Model.read)

    def ready(self) -> bool:
        """Whether the service captions now. One try; False too where it cannot be reached."""
        try:
            return self._http.get("/readyz", timeout=min(5.0, self._timeout)).status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _many(self, images: Iterable[Image], concurrency: int, progress: bool, options: Options) -> Iterator[Item]:
        left = threading.Event()

        def one(index: int, image: Image) -> Item:
            try:
                return Item(index, image, self._caption(image, options, left))
            except (ClientError, OSError, TypeError) as error:
                return Item(index, image, error=error)

        waiting: deque[Future[Item]] = deque()
        total = len(images) if isinstance(images, Sized) else None
        with bar(progress, total) as shown, ThreadPoolExecutor(concurrency, "deecap-client") as threads:
            try:
                for index, image in enumerate(images):
                    waiting.append(threads.submit(one, index, image))
                    if len(waiting) == AHEAD * concurrency:
                        yield waiting.popleft().result()
                        shown.update()
                while waiting:
                    yield waiting.popleft().result()
                    shown.update()
            finally:
                left.set()
                threads.shutdown(cancel_futures=True)

    def _caption(self, image: Image, options: Options, left: threading.Event) -> CaptionAnswer:
        call, timeout = caption_call(image_bytes(image), options)
        return self._send(call, CaptionAnswer.read, timeout, left)

    def _send(
        self,
        call: Call,
        kind: Callable[[Any], T],
        timeout: float | None = None,
        left: threading.Event | None = None,
    ) -> T:
        """`left` is set when nobody waits any more."""
        tries = Tries(self._timeout if timeout is None else timeout, self._tries)
        while True:
            try:
                response = self._http.request(
                    call.method,
                    call.path,
                    content=call.content,
                    params=call.params,
                    headers=call.headers,
                    extensions={"timeout": Remaining(tries)},
                )
                return read(response, kind)
            except (ClientError, httpx.TransportError, httpx.DecodingError) as error:
                if (left or threading.Event()).wait(tries.pause_after(error)):
                    raise UnreachableError("not tried again: nobody waits for it any more") from error
