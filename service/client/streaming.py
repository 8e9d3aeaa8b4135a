"""From the lines of a `text/event-stream` to words and their caption, without I/O: for both clients."""

from __future__ import annotations

import json
from typing import Any

import httpx

from service.client.answers import CaptionAnswer, StreamedWord, read_problem
from service.client.errors import DeadlineError, UnexpectedAnswerError, UnreachableError
from service.client.retrying import Tries, unexpected

EVENT_STREAM = "text/event-stream"


class StreamReader:
    """Reads one stream after the other, each a try of the same call, so that attempts are counted over all of them."""

    def __init__(self, tries: Tries) -> None:
        self._tries = tries
        self._before = self._attempt = 0
        self._event = ""
        self._retry: float | None = None

    def begin(self, response: httpx.Response) -> None:
        """A new try. Raises `UnexpectedAnswerError` where it is no stream."""
        if not response.headers.get("content-type", "").startswith(EVENT_STREAM):
            raise unexpected(response)
        self._before = self._attempt
        self._event, self._retry = "", None

    def line(self, line: str) -> StreamedWord | CaptionAnswer | None:
        """What the line completes, None for nothing that the caller wants.

        Raises `ProblemError` where that is a problem, `DeadlineError` where the time is over, and
        `UnexpectedAnswerError` for what this service never says.
        """
        if self._tries.over:
            raise DeadlineError(504, "", "the service did not answer in time")
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        try:
            if field == "event":
                self._event, self._retry = value, None
            elif field == "retry":
                self._retry = int(value) / 1000
            elif field == "data":
                return self._read(json.loads(value))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnexpectedAnswerError(f"a stream says something else than captions: {line[:100]!r}") from error
        return None  # a comment, the end of an event, or a field of a newer service

    def end(self) -> None:
        """The stream is over, and there was no caption. Raises `UnreachableError`."""
        raise UnreachableError("the connection ended before the caption")

    def _read(self, said: Any) -> StreamedWord | CaptionAnswer | None:
        if self._event == "word":
            self._attempt = self._before + int(said["attempt"])
            text, exit_layer, entropy = str(said["text"]), int(said["exit_layer"]), float(said["entropy"])
            return StreamedWord(text, exit_layer, entropy, int(said["index"]), self._attempt)
        if self._event == "caption":
            return CaptionAnswer.read(said)
        if self._event == "problem":
            raise read_problem(said, self._retry)
        return None  # `restart`: the attempt of the next word says it
