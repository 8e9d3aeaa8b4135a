"""The client that blocks, for threads and scripts."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from service.client.answers import CaptionAnswer, Job, Model, Speeds, StreamedWord
from service.client.batches import Batch
from service.client.errors import ClientError, UnreachableError
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

_FAILURES = (ClientError, httpx.TransportError, httpx.DecodingError)


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

    def captions(self, images: Iterable[Image], **options: Unpack[Options]) -> list[Item]:
        """What became of each photo, in their order, all of them asked for in one request: a service takes 32, unless
        its operator said otherwise. Those that were turned away are asked for again. For more photos, or to hear of
        each as soon as it is known, `caption_many`.

        Raises `TypeError` for an unknown option.
        """
        batch = Batch(images, options)
        timeout = options.get("timeout")
        tries = Tries(self._timeout if timeout is None else timeout, self._tries)
        while not batch.done:
            call, _ = batch.call()
            again: Exception | None
            try:
                again = self._once(call, reading(batch.read), tries)
            except _FAILURES as error:
                again = error
            if again is not None:
                try:
                    time.sleep(tries.pause_after(again))
                except ClientError as error:
                    batch.give_up(error)
        return batch.items

    def stream(self, image: Image, **options: Unpack[Options]) -> Iterator[StreamedWord | CaptionAnswer]:
        """The words of the photo's caption as they are decided, and at the end the caption itself.

        Where a word's `attempt` is higher than that of the one before, the caption was begun again, and all words
        before are void. Leaving the loop over it hangs up, and the service stops working on it. Raises as `caption`.
        """
        call, timeout = caption_call(image_bytes(image), options, Accept=EVENT_STREAM)
        return self._stream(call, Tries(self._timeout if timeout is None else timeout, self._tries))

    def submit(self, image: Image, *, idempotency_key: str | None = None, **options: Unpack[Options]) -> Job:
        """Has the photo captioned later, as a job that `job`, `wait` and `cancel` know by its `id`.

        `idempotency_key`: your own name for it, under which it is made once, however often this is called; by default
        one of chance. Raises as `caption`; `OptionRefusedError` also for a key that another request had.
        """
        key = idempotency_key or uuid.uuid4().hex
        call, timeout = caption_call(image_bytes(image), options, Prefer="respond-async", Idempotency_Key=key)
        return self._send(call, read_job, timeout)

    def job(self, id: str) -> Job:
        """How it stands with a job. Raises `ClientError`: `UnknownJobError` for one that is not there."""
        return self._send(job_call("GET", id), read_job)

    def wait(self, id: str, timeout: float | None = None) -> CaptionAnswer:
        """The caption of a job. `timeout` in seconds; by default as long as the service lets it take.

        Raises `ClientError`: what the job failed with, `UnknownJobError`, and `DeadlineError` where the time is over.
        """
        call, looks = job_call("GET", id), Looks(timeout)
        while True:
            job = self._send(call, read_job, looks.seconds)
            if job.error is not None:
                raise job.error
            if job.answer is not None:
                return job.answer
            time.sleep(looks.pause_after(job))

    def cancel(self, id: str) -> bool:
        """Cancels a job, or forgets one that is done; False where there is none. Raises `ClientError`."""
        return self._send(job_call("DELETE", id), read_cancelled)

    def speeds(self) -> Speeds:
        """The speeds to choose from. Raises `ClientError`."""
        return self._send(Call("GET", "/v1/speeds"), reading(Speeds.read))

    def model(self) -> Model:
        """The model served. Raises `ClientError`."""
        return self._send(Call("GET", "/v1/model"), reading(Model.read))

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

    def _stream(self, call: Call, tries: Tries) -> Iterator[StreamedWord | CaptionAnswer]:
        reader = StreamReader(tries)
        while True:
            try:
                with self._http.stream(call.method, call.path, **sending(call, tries)) as response:
                    if not response.is_success:
                        response.read()
                        raise problem(response)
                    reader.begin(response)
                    for line in response.iter_lines():
                        said = reader.line(line)
                        if said is not None:
                            yield said
                        if isinstance(said, CaptionAnswer):
                            return
                    reader.end()
            except _FAILURES as error:
                time.sleep(tries.pause_after(error))

    def _caption(self, image: Image, options: Options, left: threading.Event) -> CaptionAnswer:
        call, timeout = caption_call(image_bytes(image), options)
        return self._send(call, reading(CaptionAnswer.read), timeout, left)

    def _send(
        self,
        call: Call,
        read: Callable[[httpx.Response], T],
        timeout: float | None = None,
        left: threading.Event | None = None,
    ) -> T:
        """`left` is set when nobody waits any more."""
        tries = Tries(self._timeout if timeout is None else timeout, self._tries)
        while True:
            try:
                return self._once(call, read, tries)
            except _FAILURES as error:
                if (left or threading.Event()).wait(tries.pause_after(error)):
                    raise UnreachableError("not tried again: nobody waits for it any more") from error

    def _once(self, call: Call, read: Callable[[httpx.Response], T], tries: Tries) -> T:
        return read(self._http.request(call.method, call.path, **sending(call, tries)))
