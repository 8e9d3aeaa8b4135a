"""`text/event-stream` answers: the words of a caption as they are decided, then the caption.

Until the first event, or the first `KEEP_ALIVE_SECONDS`, nothing has been said, and a problem is answered as any other.
After that the status is out, and a problem is an event.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from model.caption import Word
from service.errors import WENT_WRONG, Problem
from service.jobs import Answer, Job, Progress
from service.routes.asking import until_gone
from service.routes.context import context_of
from service.routes.preferences import EVENT_STREAM
from service.routes.telling import caption_document, since_arrival, told
from service.schemas import CaptionOptions

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 10.0  # proxies close what says nothing for longer than some 15
KEEP_ALIVE = b": keep-alive\n\n"
# So that nothing between here and the reader waits for more (the first is nginx's), and nothing keeps it.
_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}


async def answer_in_words(request: Request, job: Job, options: CaptionOptions) -> Response:
    """The response whose body is the stream. Raises `Problem` for one that is known before there is anything to say."""
    told_words = _Told()
    news = _News(request, replace(job, stream=True))
    try:
        first = await news.next()
    except BaseException:
        await news.close()
        raise

    async def events() -> AsyncGenerator[bytes, None]:
        """Ends after the caption or a problem, and without either where the client has gone."""
        item = first
        try:
            while not isinstance(item, Answer):
                if item is None:
                    yield KEEP_ALIVE
                else:
                    for event in told_words.hear(item):
                        yield event
                item = await news.next()
            for event in told_words.finish(item):
                yield event
            document = caption_document(
                item, request.state.request_id, with_regions=options.regions, seconds=since_arrival(request)
            )
            yield server_sent("caption", document)
        except Problem as problem:
            request.state.outcome = problem.code
            if problem.code != "client_gone":
                pause = None if problem.retry_after is None else problem.retry_after * 1000
                yield server_sent("problem", told(problem, request.state.request_id), retry_ms=pause)
        except Exception:
            log.exception("request %s failed", request.state.request_id)
            request.state.outcome = "internal"
            failed = Problem("internal", WENT_WRONG)
            yield server_sent("problem", told(failed, request.state.request_id))

    return _EventStream(events(), news.close)


def server_sent(event: str, data: Mapping[str, object], retry_ms: int | None = None) -> bytes:
    """One event in the form of the HTML standard, 9.2.6. `retry_ms`: until it is worth another try.

    In ASCII: there are readers to whom some other characters end a line.
    """
    retry = "" if retry_ms is None else f"retry: {retry_ms}\n"
    return f"event: {event}\n{retry}data: {json.dumps(data)}\n\n".encode()


class _News:
    """What comes of a job, and whether the client is there to hear it. `close` it: that gives the job up."""

    def __init__(self, request: Request, job: Job) -> None:
        self._source: AsyncIterator[Progress | Answer] = context_of(request).front.stream(job)
        self._item: asyncio.Future[Any] | None = None
        self._gone: asyncio.Future[Any] = asyncio.ensure_future(until_gone(request))

    async def next(self) -> Progress | Answer | None:
        """None where there is no news for `KEEP_ALIVE_SECONDS`.

        Raises `Problem`: the job's own, and `client_gone` where the client closed the connection.
        """
        if self._item is None:
            self._item = asyncio.ensure_future(anext(self._source))
        await asyncio.wait({self._item, self._gone}, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if self._item.done():
            item, self._item = self._item, None
            said: Progress | Answer = item.result()
            return said
        if self._gone.done():
            raise Problem("client_gone", "The client closed the connection.")
        return None

    async def close(self) -> None:
        """May be called again."""
        pending = [self._gone, *([] if self._item is None else [self._item])]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if isinstance(self._source, AsyncGenerator):
            await self._source.aclose()


class _Told:
    """Which words the client has heard, so that each is told once, whatever is lost or comes twice on the way."""

    def __init__(self) -> None:
        self._attempt = 1
        self._words: dict[int, Word] = {}

    def hear(self, progress: Progress) -> list[bytes]:
        events = []
        if progress.attempt != self._attempt:
            if self._words:
                events.append(self._restart(progress.attempt))
            self._attempt = progress.attempt
        return events + self._tell(dict(enumerate(progress.words, progress.begin)))

    def finish(self, answer: Answer) -> list[bytes]:
        """What of the caption is not told yet. With a beam that is all of it; and words on the way may be lost."""
        words = dict(enumerate(answer.caption.words))
        events = []
        if any(index not in words or words[index].text != word.text for index, word in self._words.items()):
            events.append(self._restart(self._attempt + 1))  # another worker's, whose words did not come
        return events + self._tell(words)

    def _tell(self, words: Mapping[int, Word]) -> list[bytes]:
        new = {index: word for index, word in words.items() if word.text and index not in self._words}
        self._words.update(new)
        return [server_sent("word", self._document(index, word)) for index, word in sorted(new.items())]

    def _document(self, index: int, word: Word) -> dict[str, object]:
        """A `WordEventOut` as JSON."""
        said = {"index": index, "text": word.text, "exit_layer": word.exit_layer, "entropy": word.entropy}
        return {**said, "attempt": self._attempt}

    def _restart(self, attempt: int) -> bytes:
        self._attempt = attempt
        self._words.clear()
        return server_sent("restart", {"attempt": attempt})


class _EventStream(Response):
    """Sends each event as it comes. The events themselves end where the client has gone."""

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]]) -> None:
        """`close` is called at the end, whatever the end is."""
        self.status_code = 200
        self.background = None
        self.init_headers({"Content-Type": EVENT_STREAM, **_HEADERS})
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        try:
            async with aclosing(self._events) as events:
                await send(start)
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._close()
